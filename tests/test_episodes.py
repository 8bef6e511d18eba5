"""Laws of the sampler, on images that carry their class, their number and their orientation in their pixels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from mini_ht.datasets.images import ImageSet
from mini_ht.episodes import Episodes, choose, sample, shifted, thin
from mini_ht.errors import InputError

PATTERN = np.arange(16, dtype=np.uint8).reshape(4, 4)


def tagged(counts: Any) -> ImageSet:
    """Images [4, 4, 3]: the class in channel 0, the number within the class in channel 1, which way is up in 2."""
    pairs = [(label, number) for label, count in enumerate(counts) for number in range(count)]
    pixels = np.empty((len(pairs), 4, 4, 3), np.uint8)
    for row, (label, number) in enumerate(pairs):
        pixels[row, ..., 0], pixels[row, ..., 1], pixels[row, ..., 2] = label, number, PATTERN
    return ImageSet(pixels, np.array(counts, np.int64), tuple(f"class{i}" for i in range(len(counts))))


def tags(images: np.ndarray) -> np.ndarray:
    """[E, n, H, W, 3] floats -> whole pixel values."""
    return np.rint(images * 255).astype(int)


def turns(images: np.ndarray) -> np.ndarray:
    """[E, n, ...] -> the quarter circle of each image [E, n]; fails where it is none of the four."""
    same = [(tags(images)[..., 2] == np.rot90(PATTERN, quarter)).all((-1, -2)) for quarter in range(4)]
    assert (np.sum(same, 0) == 1).all(), "an image that is not turned by a multiple of 90 degrees"
    return np.argmax(same, 0)


def assert_same(a: Episodes, b: Episodes) -> None:
    for field in dataclasses.fields(Episodes):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert x.dtype == y.dtype, field.name
        np.testing.assert_array_equal(x, y, field.name)


@st.composite
def tasks(draw: Any, **fixed: Any) -> tuple[ImageSet, dict[str, Any]]:
    """A set with classes of unequal size, and options for which it is just large enough, or larger."""
    way, shot, queries, unlabelled = (draw(st.integers(least, 3)) for least in (2, 1, 1, 0))
    need = shot + queries + unlabelled
    counts = draw(st.lists(st.integers(need, need + 4), min_size=way, max_size=way + 4))
    options = {"way": way, "shot": shot, "queries": queries, "unlabelled": unlabelled}
    options |= {"rotate": draw(st.booleans()), "protocol": draw(st.sampled_from(["disjoint", "released"]))}
    return tagged(counts), options | fixed


def draw_from(images: ImageSet, seed: int, episodes: int, **options: Any) -> Episodes:
    return sample(images, np.random.default_rng(seed), episodes, **options)


@given(tasks(), seeds, st.integers(1, 4))
def test_every_class_has_its_images_and_labels(task, seed, count):
    """Each episode has `way` different classes, k images of each, no image twice in a set, and labels that fit."""
    images, options = task
    way, shot, unlabelled = options["way"], options["shot"], options["unlabelled"]
    batch = draw_from(images, seed, count, **options)
    assert batch.support.dtype == np.float32 and 0 <= batch.support.min() and batch.support.max() <= 1
    for e in range(count):
        assert len(set(batch.classes[e])) == way
        support, query = tags(batch.support[e]), tags(batch.query[e])
        for label, of in enumerate(batch.classes[e]):
            mine = batch.labels[e] == label
            assert mine.sum() == shot and (support[mine][..., 0] == of).all()
            theirs = batch.query_labels[e] == label
            assert theirs.sum() == options["queries"] and (query[theirs][..., 0] == of).all()
            assert ((support[:, 0, 0, 0] == of) & (batch.labels[e] == -1)).sum() == unlabelled
        assert (batch.labels[e] == -1).sum() == way * unlabelled
        assert len(set(batch.support_rows[e])) == len(batch.support_rows[e]) == way * (shot + unlabelled)
        assert len(set(batch.query_rows[e])) == len(batch.query_rows[e])
    for rows, pictures in ((batch.support_rows, batch.support), (batch.query_rows, batch.query)):
        np.testing.assert_array_equal(images.pixels[rows][..., 0, 0, :2], tags(pictures)[..., 0, 0, :2])


@given(tasks(protocol="disjoint"), seeds)
def test_support_and_query_share_no_image(task, seed):
    """Under the protocol "disjoint" no query image is in the support set, not even as an unlabelled one."""
    images, options = task
    batch = draw_from(images, seed, 4, **options)
    for e in range(4):
        support, query = ({tuple(x[0, 0, :2]) for x in tags(part[e])} for part in (batch.support, batch.query))
        assert not support & query


@given(tasks(), seeds)
def test_same_seed_same_episodes(task, seed):
    """Equal generators give the same episodes bit for bit, and the image set stays as it was."""
    images, options = task
    before = images.pixels.copy()
    assert_same(draw_from(images, seed, 3, **options), draw_from(images, seed, 3, **options))
    np.testing.assert_array_equal(images.pixels, before)


def test_other_seed_other_episodes():
    """Another seed gives other classes and other images."""
    one, two = (draw_from(tagged([20] * 30), seed, 5, way=5, shot=1, queries=2) for seed in (0, 1))
    assert (one.classes != two.classes).any() and (one.support_rows != two.support_rows).any()


@given(tasks(), seeds, st.integers(1, 5), st.data())
def test_a_part_is_a_slice_of_the_whole(task, seed, count, data):
    """A worker that asks for some of the episodes gets exactly those that the whole batch has there."""
    images, options = task
    start = data.draw(st.integers(0, count - 1))
    part = slice(start, data.draw(st.integers(start + 1, count)))
    whole = draw_from(images, seed, count, **options)
    cut = Episodes(*(getattr(whole, field.name)[part] for field in dataclasses.fields(Episodes)))
    assert_same(draw_from(images, seed, count, part=part, **options), cut)


def test_labels_are_uniform_over_classes_and_images():
    """Every class gets every label equally often, and every image of a class is drawn equally often, as query too."""
    episodes, classes, way, count = 6000, 5, 3, 4
    batch = draw_from(tagged([count] * classes), 0, episodes, way=way, shot=1, queries=1)
    seen = np.array([np.bincount(batch.classes[:, label], minlength=classes) for label in range(way)])
    expected = episodes / classes
    chi = ((seen - expected) ** 2 / expected).sum(1)  # 4 degrees of freedom: 23.5 has a probability of 1e-4
    assert chi.max() < 23.5, chi
    for rows in (batch.support_rows, batch.query_rows):
        found, expected = np.bincount(rows.ravel(), minlength=classes * count), episodes * way / (classes * count)
        assert np.abs(found - expected).max() < 5 * np.sqrt(expected), found
    pairs = {tuple(pair) for pair in batch.classes[:, :2]}
    assert len(pairs) == classes * (classes - 1), "some classes never come in some order"


@given(tasks(rotate=True), seeds)
def test_a_class_is_turned_as_a_whole(task, seed):
    """With rotation, support, query and unlabelled images of a class are turned alike."""
    images, options = task
    batch = draw_from(images, seed, 3, **options)
    pictures = np.concatenate([batch.support, batch.query], 1)
    quarter, of = turns(pictures), tags(pictures)[:, :, 0, 0, 0]
    for e in range(3):
        assert all(len(set(quarter[e][of[e] == label])) == 1 for label in batch.classes[e])


def test_all_four_turns_occur_and_none_by_default():
    """With rotation each quarter circle comes in about a quarter of the classes; without, nothing is turned."""
    options = {"way": 2, "shot": 1, "queries": 1}
    batch = draw_from(tagged([4] * 6), 0, 1000, rotate=True, **options)
    share = np.bincount(turns(batch.support).ravel(), minlength=4) / 2000
    assert np.abs(share - 0.25).max() < 0.05, share
    quarter = turns(batch.support)
    assert 0.2 < (quarter[:, 0] == quarter[:, 1]).mean() < 0.3, "the classes of an episode turn together"
    assert not turns(draw_from(tagged([4] * 6), 0, 50, **options).support).any()


@pytest.mark.parametrize("count, shot", [(10, 1), (10, 5), (5, 2)])
def test_released_protocol_shows_support_images_again(count, shot):
    """Under "released" a query image is a support image with probability shot / count; under "disjoint" never."""
    options = {"way": 3, "shot": shot, "queries": 2}
    for protocol, expected in (("released", shot / count), ("disjoint", 0.0)):
        batch = draw_from(tagged([count] * 6), 0, 2000, protocol=protocol, **options)
        again = (batch.query_rows[:, :, None] == batch.support_rows[:, None, :]).any(-1)
        slack = 5 * np.sqrt(expected * (1 - expected) / again.size)
        assert abs(again.mean() - expected) <= slack, (protocol, again.mean(), expected)


@given(tasks(), seeds, st.floats(0, 1), st.data())
def test_thinning_keeps_a_labelled_image_of_each_class(task, seed, hidden, data):
    """`count` images of each episode stay, in their order and turned as before; each class keeps a label.

    Labels only ever become -1: never with hidden 0, always but for each class's first with hidden 1.
    """
    images, options = task
    rng = np.random.default_rng(seed)
    whole = choose(images, rng, 3, **options)
    count = data.draw(st.integers(options["way"], whole.labels.shape[1]))
    for share in (0.0, hidden, 1.0):
        thinned = thin(whole, rng, count, share)
        assert thinned.labels.shape == (3, count)
        for e in range(3):
            # A row is that of one image, so it says where the image was.
            places = [whole.support_rows[e].tolist().index(row) for row in thinned.support_rows[e]]
            assert places == sorted(set(places))
            np.testing.assert_array_equal(thinned.support_turns[e], whole.support_turns[e][places])
            before, after = whole.labels[e][places], thinned.labels[e]
            assert ((after == before) | (after == -1)).all()
            assert set(after) - {-1} == set(range(options["way"]))
            if share == 0:
                np.testing.assert_array_equal(after, before)
            if share == 1:
                assert (after >= 0).sum() == options["way"]
        for name in ("classes", "query_rows", "query_turns", "query_labels"):
            np.testing.assert_array_equal(getattr(thinned, name), getattr(whole, name))


def test_thinning_drops_and_hides_at_random():
    """Images of every class and place go, and each image that may lose its label loses it with probability `hidden`."""
    rng = np.random.default_rng(0)
    whole = choose(tagged([6] * 4), rng, 3000, way=4, shot=4, queries=1)
    thinned = thin(whole, rng, 10, 0.25)
    kept = (whole.support_rows[:, :, None] == thinned.support_rows[:, None, :]).any(-1).mean(0).reshape(4, 4)
    np.testing.assert_array_equal(kept[:, 0], 1)
    assert np.abs(kept[:, 1:] - 0.5).max() < 5 * 0.5 / np.sqrt(3000)  # 6 of 12 stay
    lost = (thinned.labels < 0).mean() * 10 / 6
    assert abs(lost - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 18000)


def test_unequal_classes_are_used_whole():
    """In classes of unequal size every image occurs, the last one of the largest class, too, and none of another."""
    counts = (3, 9, 5)
    batch = draw_from(tagged(counts), 0, 400, way=3, shot=1, queries=2)
    rows = np.concatenate([batch.support_rows, batch.query_rows], 1)
    assert set(rows.ravel()) == set(range(sum(counts)))
    of = np.repeat(np.arange(3), counts)
    np.testing.assert_array_equal(of[batch.query_rows], np.repeat(batch.classes, 2, axis=1))


def test_too_few_classes():
    """Fewer classes than `way` raise InputError with both numbers."""
    with pytest.raises(InputError, match="needs 4 classes and there are 3"):
        draw_from(tagged([5, 5, 5]), 0, 1, way=4, shot=1, queries=1)


def test_too_few_images():
    """Fewer images than an episode takes raise InputError that names the class; "released" needs fewer."""
    options = {"way": 2, "shot": 2, "queries": 2, "unlabelled": 1}
    with pytest.raises(InputError, match=r"class 'class1' has 4 images; wanted 5"):
        draw_from(tagged([5, 4, 5]), 0, 1, **options)
    assert draw_from(tagged([5, 4, 5]), 0, 1, protocol="released", **options).support.shape[1] == 6
    with pytest.raises(InputError, match=r"class 'class1' has 2 images; wanted 3"):
        draw_from(tagged([5, 2, 5]), 0, 1, protocol="released", **options)


def test_mirrored_classes():
    """With mirror, all eight positions of a class occur about equally often, the same for all of its images."""
    batch = draw_from(tagged([4] * 6), 0, 600, way=3, shot=1, queries=2, rotate=True, mirror=True)
    views = [np.rot90(pattern, quarter) for pattern in (PATTERN, PATTERN[:, ::-1]) for quarter in range(4)]
    support, query = (
        np.stack([(tags(images)[..., 2] == view).all((-1, -2)) for view in views])
        for images in (batch.support, batch.query)
    )  # [8, E, n] and [8, E, m]
    assert (support.sum(0) == 1).all() and np.abs(support.mean((1, 2)) - 1 / 8).max() < 0.03
    assert (query == support.repeat(2, axis=-1)).all()


@given(seed=seeds, most=st.integers(1, 3))
def test_shifted_images(seed, most):
    """An image moves by its own offset, zeros come in where it was, and what leaves is lost."""
    rng = np.random.default_rng(seed)
    images, offsets = rng.random((2, 3, 6, 5, 2), dtype=np.float32), rng.integers(-most, most + 1, (2, 3, 2))
    offsets[0, 0, 0] = most  # the largest offset decides how much is padded
    moved = shifted(images, offsets)
    for e in range(2):
        for n in range(3):
            rows, columns = offsets[e, n]
            wanted = np.zeros_like(images[e, n])
            for i in range(6):
                for j in range(5):
                    if 0 <= i + rows < 6 and 0 <= j + columns < 5:
                        wanted[i + rows, j + columns] = images[e, n, i, j]
            np.testing.assert_array_equal(moved[e, n], wanted)
