"""Steps with tasks of their own: of every kind, with ever more unlabelled images, some upright, in the end all."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from test_training import CONFIG, IMAGES, run

from mini_ht import Config, InputError
from mini_ht.datasets.images import ImageSet
from mini_ht.training import workers
from mini_ht.training.schedule import is_upright, progress
from mini_ht.training.tasks import HIDDEN, step_task, step_unlabelled, training_choice, training_episodes


def blank(classes: int, count: int) -> ImageSet:
    """Images of nothing."""
    names = tuple(map(str, range(classes)))
    return ImageSet(np.zeros((classes * count, 4, 4, 1), np.uint8), np.full(classes, count), names)


@given(seed=seeds, way=st.integers(2, 6), vary=st.integers(1, 5), spare=st.integers(1, 6), queries=st.integers(1, 3))
def test_a_steps_tasks_lie_in_range(seed, way, vary, spare, queries):
    """2 .. way classes, each with 1 .. vary support images, and images enough for all of its queries."""
    images = blank(8, vary + spare)
    config = Config(way=way, vary=vary, queries=queries, seed=seed, episodes_per_step=2, image_size=16)
    for step in range(5):
        choice, offsets = training_choice(config, images, step)
        classes = choice.classes.shape[1]
        assert 2 <= classes <= way and offsets.shape[1] == choice.labels.shape[1] + choice.query_labels.shape[1]
        of = np.searchsorted(images.starts, choice.support_rows, side="right") - 1  # [E, n], class of each image
        for e in range(2):
            counts = [int((of[e] == label).sum()) for label in choice.classes[e]]
            assert sum(counts) == choice.labels.shape[1] and 1 <= min(counts) and max(counts) <= vary
            assert set(choice.labels[e]) - {-1} == set(range(classes))
            assert not set(choice.support_rows[e]) & set(choice.query_rows[e])
        wanted = -(-queries * way // classes)
        assert wanted * classes >= choice.query_labels.shape[1] >= min(wanted, spare) * classes


def test_all_kinds_of_tasks_come():
    """Every number of classes and of images a class comes; half of the steps are balanced, a third hide labels."""
    images, config = blank(12, 20), Config(way=10, vary=8, image_size=16)
    drawn = [step_task(config, images, np.random.default_rng(seed)) for seed in range(2000)]
    ways, means = ({f(*one) for one in drawn} for f in (lambda t, n, h: t["way"], lambda t, n, h: n / t["way"]))
    assert ways == set(range(2, 11)) and means == set(range(1, 9))
    balanced = np.mean([count == task["way"] * task["shot"] for task, count, _ in drawn])
    hiding = np.array([hidden for *_, hidden in drawn])
    assert 0.5 < balanced < 0.65  # the largest numbers cannot be doubled
    assert abs((hiding > 0).mean() - 1 / 3) < 0.05 and hiding.max() <= HIDDEN


@given(upright=st.floats(0, 1), steps=st.integers(1, 60))
def test_the_last_steps_are_upright(upright, steps):
    """First come steps with turned classes, then those without, which are the wanted share of all, up to one step."""
    config = Config(upright=upright, episodes=8 * steps, episodes_per_step=8)
    found = [is_upright(config, progress(config, 8 * step, 0.0)) for step in range(steps)]
    assert found == sorted(found) and abs(sum(found) - upright * steps) <= 1
    assert any(found) or upright < 1 / steps
    assert not (any(found) and upright == 0) and (all(found) or upright < 1)


@given(seed=seeds, rotate=st.booleans(), mirror=st.booleans())
def test_an_upright_step_turns_no_class(seed, rotate, mirror):
    """It has the classes and images that it would have otherwise, as they are."""
    images = blank(8, 4)
    config = Config(way=4, seed=seed, queries=2, rotate=rotate, mirror=mirror, episodes_per_step=40)
    turned, upright = (training_choice(config, images, 3, upright=end)[0] for end in (False, True))
    kinds = {turn + 4 * flip for turn in range(4 if rotate else 1) for flip in range(2 if mirror else 1)}
    assert set(turned.query_turns.flat) == kinds and not upright.support_turns.any() and not upright.query_turns.any()
    for name in ("classes", "labels", "support_rows", "query_rows"):
        np.testing.assert_array_equal(getattr(turned, name), getattr(upright, name))


@given(seed=seeds, share=st.floats(0, 1), shift=st.integers(0, 2))
def test_some_episodes_are_turned(seed, share, shift):
    """An episode is turned as in a training that turns all of them, or not at all; nothing else depends on the share.

    The more are wanted, the more are turned, and those that a smaller share turns are among them.
    """
    images, config = blank(8, 4), Config(way=4, seed=seed, queries=2, mirror=True, shift=shift, episodes_per_step=40)
    (every, moves), (some, same), (fewer, _) = (
        training_choice(dataclasses.replace(config, turned=part), images, 3) for part in (1.0, share, share / 2)
    )
    turned, less = some.query_turns.any(1), fewer.query_turns.any(1)  # [E]
    assert (less <= turned).all() and not (turned.any() and share == 0)
    for name in ("support_turns", "query_turns"):
        np.testing.assert_array_equal(getattr(some, name), getattr(every, name) * turned[:, None])
    for name in ("classes", "labels", "support_rows", "query_rows"):
        np.testing.assert_array_equal(getattr(some, name), getattr(every, name))
    np.testing.assert_array_equal(moves, same)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_the_wanted_share_is_turned(share):
    """Over many episodes the share of turned ones is the wanted one; classes of a turned one are each turned anew."""
    config = Config(way=8, turned=share, mirror=True, episodes_per_step=4000)
    turns = training_choice(config, blank(8, 4), 0)[0].support_turns  # [E, way]
    turned = turns.any(1)  # all of 8 classes upright by chance: once in 16 million
    assert abs(turned.mean() - share) < 5 * np.sqrt(share * (1 - share) / len(turned))
    assert np.abs(np.bincount(turns[turned].flat) / turns[turned].size - 1 / 8).max() < 0.02


def test_a_training_ends_upright(tmp_path, monkeypatch):
    """Of 12 steps the last 3 are upright where a quarter is asked for, and a share above 1 is refused."""
    seen = []
    real = workers.training_episodes

    def spy(config, images, step, part, upright):
        seen.append((step, upright))
        return real(config, images, step, part, upright)

    monkeypatch.setattr(workers, "training_episodes", spy)
    run(dataclasses.replace(CONFIG, upright=0.25), tmp_path / "run", workers=1)
    assert seen == [(step, step >= 9) for step in range(12)]
    with pytest.raises(InputError, match=r"upright is 1\.5; it must be at most 1"):
        dataclasses.replace(CONFIG, upright=1.5)


def test_the_same_step_is_the_same_task():
    """A step's episodes depend on the config's seed and the step's number alone; a part of them is a slice."""
    images, config = blank(12, 20), Config(way=10, vary=8, image_size=16, episodes_per_step=4)
    one, two = (training_episodes(config, images, 5, part) for part in (slice(None), slice(1, 3)))
    np.testing.assert_array_equal(one.labels[1:3], two.labels)
    np.testing.assert_array_equal(one.support_rows[1:3], two.support_rows)
    shapes = {training_episodes(config, images, step).labels.shape for step in range(12)}
    assert len(shapes) > 4


def test_too_few_images_for_vary(tmp_path):
    """A class with too few images for the largest support set and its queries is noticed before training."""
    with pytest.raises(InputError, match=r"train images: class .* has 5 images; wanted 6 \(shot 4"):
        run(dataclasses.replace(CONFIG, vary=4), tmp_path / "run")
    assert not (tmp_path / "run").exists() and IMAGES["train"].counts.min() == 5


def introducing(unlabelled: int, steps: int, **fields) -> Config:
    """4-way 1-shot; each of the `unlabelled` stages lasts as many steps of 3 episodes."""
    options = {"way": 4, "queries": 2, "episodes_per_step": 3, "introduce": 3 * unlabelled * steps}
    return Config(**(options | fields), unlabelled=unlabelled, image_size=16)


@given(seed=seeds, unlabelled=st.integers(1, 4), steps=st.integers(1, 3))
def test_unlabelled_images_come_in_by_stages(seed, unlabelled, steps):
    """Each stage but the last has as many steps, and its number 0 .. unlabelled is the most that a step has."""
    config = introducing(unlabelled, steps)
    rng = np.random.default_rng(seed)
    for step in range(steps * (unlabelled + 3)):
        most = min(step // steps, unlabelled)
        # None of the most + 1 numbers is missing among 200, but for a chance of 1e-18.
        assert {step_unlabelled(config, rng, step) for _ in range(200)} == set(range(most + 1))


def test_stages_of_unequal_length():
    """Where stages are no whole steps, a step has the stage in which its first episode lies."""
    config, rng = introducing(3, 1, introduce=10), np.random.default_rng(0)
    most = [max(step_unlabelled(config, rng, step) for _ in range(200)) for step in range(6)]
    assert most == [0, 0, 1, 2, 3, 3]  # from episodes 0, 3, 6, 9, 12, 15; stages begin at 0, 3 1/3, 6 2/3, 10


def test_each_number_is_as_likely():
    """Over the steps of a training that are behind the introduction, each number 0 .. unlabelled comes as often."""
    config, images = introducing(4, 1, episodes_per_step=1), blank(5, 7)
    first = config.introduce
    numbers = [(training_choice(config, images, step)[0].labels < 0).sum() // 4 for step in range(first, first + 2000)]
    assert np.abs(np.bincount(numbers, minlength=5) / 2000 - 0.2).max() < 0.036  # 4 standard errors


@given(seed=seeds, unlabelled=st.integers(1, 3), step=st.integers(0, 12), shift=st.integers(0, 1))
def test_an_introducing_step_is_one_of_a_plain_training(seed, unlabelled, step, shift):
    """A step with u unlabelled images has the episodes of a training with always u; the first ones are supervised.

    The number follows from seed and step alone, and is the same in all of a step's episodes and in each part of it.
    """
    config, images = introducing(unlabelled, 2, seed=seed, shift=shift), blank(6, 6)
    batch = training_episodes(config, images, step)
    counts = (batch.labels < 0).sum(1)  # [E]
    assert set(counts % 4) == {0} and len(set(counts)) == 1 and (step > 1 or not counts.any())
    plain = dataclasses.replace(config, unlabelled=int(counts[0]) // 4, introduce=0)
    again, other = training_episodes(config, images, step, slice(1, 3)), training_episodes(plain, images, step)
    for name in ("support", "labels", "query", "query_labels", "support_rows", "query_rows"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))
        np.testing.assert_array_equal(getattr(batch, name)[1:3], getattr(again, name))


@pytest.mark.parametrize("fields", [{}, {"unlabelled": 2, "vary": 3}])
def test_introduce_wants_unlabelled_images_and_no_vary(fields):
    """Without unlabelled images there is nothing to introduce, and vary has its own: both are InputErrors."""
    with pytest.raises(InputError, match=r"introduce 5 came with .*; wanted unlabelled above 0 and vary 0"):
        Config(introduce=5, **fields)
    with pytest.raises(InputError, match="introduce is -1; it must be at least 0"):
        Config(introduce=-1, unlabelled=2)
    assert Config(introduce=5, unlabelled=2).introduce == 5


def test_older_checkpoints_do_not_introduce():
    """The config of a checkpoint from before `introduce` is read as one that always had all unlabelled images."""
    fields = json.loads(Config(unlabelled=2).to_json())
    assert fields.pop("introduce") == 0 and Config.from_json(json.dumps(fields)) == Config(unlabelled=2)
