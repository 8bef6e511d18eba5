"""The estimator: photos become ink, labels become classes, a CNN is written, and it answers for one image alone."""

from __future__ import annotations

import dataclasses
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import cases
from tolerances import assert_close, assert_different

from mini_ht import InputError, adaptation, draw_parameters, generate, ink, load_pretrained, save
from mini_ht.adaptation import Task, adapt, open_generator
from mini_ht.classifier import HyperTransformerClassifier, encode
from mini_ht.datasets import glyphs
from mini_ht.folded import fold
from mini_ht.ink import prepare, to_ink

WAY = 5


@pytest.fixture(scope="module")
def drawings():
    """[WAY, 6, 84, 84] uint8, ink 255 on 0."""
    return glyphs(seed=77, classes=WAY, drawings=6, size=84).pixels.reshape(WAY, 6, 84, 84)


@pytest.fixture(scope="module")
def generator():
    return open_generator("omniglot")


@pytest.fixture(scope="module")
def fitted(drawings):
    return HyperTransformerClassifier().fit(drawings[:, 0], list("abcde"))


def photo_of(ink, rng, dark=True):
    """A drawing [H, W] as a photo [2H, 3H] of it: off centre, under uneven light, with noise."""
    side = len(ink)
    page = np.zeros((2 * side, 3 * side))
    page[side // 2 : side // 2 + side, side : 2 * side] = ink / 255
    light = 200 + np.linspace(0, 40, page.shape[1])
    photo = light * (1 - 0.7 * page) if dark else 60 + light / 8 + 120 * page
    return (photo + rng.normal(0, 3, page.shape)).clip(0, 255).astype(np.uint8)


def alike(a, b):
    """Correlation of the pixels of two images."""
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


# Ink


@given(st.integers(0, WAY - 1), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_photo_becomes_the_ink_of_its_drawing(drawings, which, dark, seed):
    """Light, noise, place and size of a photo do not matter, nor whether ink is dark or light."""
    drawing = drawings[which, 0]
    photo = photo_of(drawing, np.random.default_rng(seed), dark)
    ink = to_ink(photo)
    assert ink.shape == (28, 28, 1) and ink.dtype == np.float32 and ink.min() == 0 and ink.max() <= 1
    assert alike(ink, to_ink(drawing)) > 0.9


def test_a_small_drawing_in_a_large_photo(drawings):
    """A drawing that takes a fifth of the photo's side is still found."""
    for drawing in drawings[:, 0]:
        page = np.pad(drawing / 255, 150)
        photo = 210 * (1 - 0.7 * page) + np.random.default_rng(0).normal(0, 3, page.shape)
        assert alike(to_ink(photo.clip(0, 255).astype(np.uint8)), to_ink(drawing)) > 0.9


def test_ink_is_centred_and_18_pixels_long(drawings):
    """Half of the ink's extent lies on each side of the middle, and the longer extent is 18 of 28 pixels."""
    for drawing in drawings[:, 0]:
        inked = to_ink(drawing)[..., 0] > 0.25
        extents = [np.flatnonzero(inked.any(axis)) for axis in (0, 1)]
        assert 17 <= max(np.ptp(extent) + 1 for extent in extents) <= 20
        assert all(abs(extent[0] + extent[-1] - 27) <= 2 for extent in extents)


def test_ink_of_ink_is_the_same(drawings):
    """What is ink already, 28 x 28 on exact 0, stays as it is but for resampling, and its negative is the same."""
    for drawing in drawings[:, 0]:
        ink = to_ink(drawing)
        assert alike(to_ink(ink), ink) > 0.97
        assert np.array_equal(to_ink((255 * ink).astype(np.uint8)), to_ink(255 - (255 * ink).astype(np.uint8)))


def test_polarity_can_be_given(drawings):
    """With a polarity nothing is guessed: the wrong one takes the paper for ink."""
    drawing = drawings[0, 0]
    assert np.array_equal(to_ink(drawing, polarity="light"), to_ink(drawing))
    assert alike(to_ink(255 - drawing, polarity="dark"), to_ink(drawing)) > 0.999
    photo = photo_of(drawing, np.random.default_rng(0))
    assert alike(to_ink(photo, polarity="light"), to_ink(photo)) < 0.5


@given(
    st.tuples(st.integers(1, 200), st.integers(1, 40)), st.booleans(), st.integers(1, 255), st.integers(0, 2**32 - 1)
)
def test_whatever_is_no_drawing(shape, tall, contrast, seed):
    """Noise of any size and strength becomes ink in [0, 1], or is refused: nothing else happens."""
    pixels = np.random.default_rng(seed).integers(0, contrast + 1, shape if tall else shape[::-1]).astype(np.uint8)
    try:
        ink = to_ink(pixels)
    except InputError as error:
        assert "no ink" in str(error)
    else:
        assert ink.shape == (28, 28, 1) and 0 <= ink.min() < ink.max() <= 1


@pytest.mark.parametrize(
    "kind", ["float", "bool", "rgb", "rgba", "pillow", "16 bits", "path", "turned", "turned in memory"]
)
def test_every_kind_of_image(drawings, tmp_path, kind):
    """Floats, booleans, colours, transparency, Pillow images, files and EXIF turns give the same ink."""
    light = drawings[0, 0]
    dark = 255 - light
    clear = np.concatenate([np.zeros((*light.shape, 3), np.uint8), light[..., None]], -1)  # black, where it is opaque
    turned = Image.fromarray(np.rot90(dark))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(dark).save(tmp_path / "plain.png")
    image = {
        "float": dark / 255,
        "bool": light > 127,
        "rgb": np.repeat(dark[..., None], 3, -1),
        "rgba": clear,
        "pillow": Image.fromarray(dark),
        "16 bits": Image.fromarray(257 * dark.astype(np.uint16)),
        "path": tmp_path / "plain.png",
        "turned": str(tmp_path / "turned.png"),
        "turned in memory": turned,
    }[kind]
    assert alike(to_ink(image), to_ink(dark)) > (0.97 if kind == "bool" else 0.999)


def test_pixels_as_they_are(drawings):
    """With preprocess "none" nothing but the type changes, and the size must fit."""
    images = drawings[:, 0, 20:48, 20:48]
    assert np.array_equal(prepare(images, "none", (28, 28, 1)), (images / np.float32(255))[..., None])
    with pytest.raises(InputError, match=r"image 0 has shape \[84, 84, 1\]; wanted \[28, 28, 1\]"):
        prepare(drawings[:, 0], "none", (28, 28, 1))


def gif(path):
    frames = [Image.fromarray(np.full((9, 9), value, np.uint8)) for value in (0, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def huge(path):
    with path.open("wb") as stream:
        stream.truncate(3 << 30)  # no room on the disk, 3 GB to whoever reads it


def bomb(path):
    """A small file whose header promises 30,000 x 30,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    chunks = (struct.pack(">I", 13) + header, struct.pack(">I", 0) + b"IDAT", struct.pack(">I", 0) + b"IEND")
    parts = (chunk + struct.pack(">I", zlib.crc32(chunk[4:])) for chunk in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


FILES = {
    "text.png": lambda path: path.write_text("no image"),
    "moving.gif": gif,
    "huge.png": huge,
    "bomb.png": bomb,
    "blank.png": lambda path: Image.new("L", (90, 90), 240).save(path),
    "missing.png": lambda path: None,
}


@pytest.mark.parametrize(
    "name, words",
    list(zip(FILES, ["not an image", "2 frames", "not an image", "exceeds", "no ink", "missing"], strict=True)),
)
def test_bad_files(tmp_path, name, words):
    """Each bad file is named with what is wrong."""
    FILES[name](tmp_path / name)
    with pytest.raises(InputError, match=f"{name}.*{words}|{words}.*{name}"):
        prepare([tmp_path / name], "ink", (28, 28, 1))


@pytest.mark.parametrize(
    "images, words",
    [
        (np.zeros((2, 784)), r"\[2, 784\]"),
        (np.zeros((2, 9, 9), np.int64), "int64"),
        (np.full((2, 9, 9), 200.0), "from 200 to 200"),
        (np.full((2, 9, 9), np.nan), "nan"),
        (np.zeros((2, 9, 9, 2)), "1, 3 or 4 channels"),
        (np.zeros((0, 9, 9)), "no image"),
        (np.zeros((1, 9, 0)), "shape"),
        (np.random.default_rng(0).normal(0.8, 0.005, (1, 90, 90)), "no ink"),
        ([7], "int"),
        ("a.png", "wanted a list"),
        (None, "wanted a list"),
    ],
)
def test_bad_arrays(images, words):
    """Arrays that are no images are refused with what came."""
    with pytest.raises(InputError, match=words):
        prepare(images, "ink", (28, 28, 1))


def test_bad_options():
    """Unknown preparations, and ink for a generator of colours, are refused."""
    image = np.zeros((1, 9, 9))
    for preprocess, polarity, shape in (("x", "auto", 1), ("ink", "x", 1), ("ink", "auto", 3)):
        with pytest.raises(InputError, match=r"choose one of|3 channels"):
            prepare(image, preprocess, (28, 28, shape), polarity)


PAGES = st.tuples(st.integers(2, 112), st.integers(2, 112), st.floats(0.25, 1), st.integers(0, 2**32 - 1))


@given(st.lists(PAGES, min_size=1, max_size=4), st.integers(4, 40))
def test_cutting_is_what_pillow_does(pages, size):
    """Each square is Pillow's Lanczos of the page with paper around it, to 1/255, whichever others are cut with it."""
    inks, wanted = [], []
    for height, width, share, seed in pages:
        rng = np.random.default_rng(seed)
        full = rng.random((height, width), np.float32) * (rng.random((height, width)) < share)  # [H, W]
        full[rng.integers(height), rng.integers(width)] = 1
        inks.append((np.rint(255 * full), full.max(1), full.max(0)))
        padded = [np.pad(part, 1)[None] for part in inks[-1][1:]]
        ends = [[float(end[0]) for end in ink._ends(part)] for part in padded]  # [row or column][begin or end]
        half = max(end - begin for begin, end in ends) / ink.SHARE / 2
        pad = int(2 * half) + 2 * ink.LOBES
        middle = [(begin + end) / 2 + pad for begin, end in ends]
        box = (middle[1] - half, middle[0] - half, middle[1] + half, middle[0] + half)
        page = Image.fromarray(np.pad(inks[-1][0].astype(np.uint8), pad))
        wanted.append(np.asarray(page.resize((size, size), Image.Resampling.LANCZOS, box)))
    assert abs(255 * ink._cut(inks, size) - np.array(wanted, float)).max() <= 1.001


# The network


@given(cases())
def test_folding_changes_nothing(case):
    """The folded network computes what the generated CNN does with norm "support", for each episode."""
    cnn = generate(case.parameters, case.config, case.support, case.labels, case.mask)
    wanted = cnn.with_norm("support")(case.query)  # [E, m, way]
    for number, query in enumerate(case.query):
        there = cnn.present[number]
        found = fold(cnn, case.config.way, number)(query)
        assert found.dtype == np.float64
        assert_close(found[:, there], wanted[number][:, there])


def test_an_image_alone(fitted, drawings):
    """Probabilities of an image are the same alone and among others, and sum to 1."""
    images = drawings[:, 1:].reshape(-1, 84, 84)
    together = fitted.predict_proba(images)
    assert together.shape == (len(images), WAY) and together.sum(-1) == pytest.approx(1)
    assert_close(np.concatenate([fitted.predict_proba(image[None]) for image in images]), together, "float32")


def test_it_classifies(fitted, drawings):
    """Unseen drawings of five symbols, seen once each, are mostly recognised: chance is 20 %."""
    images, labels = drawings[:, 1:].reshape(-1, 84, 84), np.repeat(list("abcde"), 5)
    assert fitted.score(images, labels) > 0.6
    assert fitted.score(images, labels) == np.mean(fitted.predict(images) == labels)
    assert list(fitted.classes_) == list("abcde")


def test_tasks_made_together_are_those_made_alone(generator, drawings, monkeypatch):
    """A task's network is the same to the last bit, whatever its size and whichever others share its passes."""
    monkeypatch.setattr(adaptation, "PASS", 2)
    images = prepare(drawings.reshape(-1, 84, 84), "ink", (28, 28, 1)).reshape(WAY, 6, 28, 28, 1)
    tasks = [
        Task(images[:ways, first : first + shot].reshape(-1, 28, 28, 1), np.arange(ways).repeat(shot), range(ways))
        for ways, first, shot in ((2, 0, 1), (5, 0, 3), (3, 1, 2), (3, 0, 2), (2, 3, 3), (2, 0, 3))
    ]
    for together, task in zip(adapt(generator, tasks), tasks, strict=True):
        (alone,) = adapt(generator, [task])
        assert list(together.classes_) == list(task.classes) and together.provenance == alone.provenance
        assert together.network.arrays.keys() == alone.network.arrays.keys()
        for name, array in alone.network.arrays.items():
            assert np.array_equal(together.network.arrays[name], array), name


def test_provenance_knows_the_weights(generator):
    """The digest is of every parameter's name, shape and numbers, and a classifier carries it."""
    task = Task(np.random.default_rng(0).random((2, 28, 28, 1), np.float32), np.arange(2), "ab")
    (classifier,) = adapt(generator, [task], "none")
    assert re.fullmatch("[0-9a-f]{16}", generator.digest) and classifier.provenance["weights"] == generator.digest
    name, array = next(iter(generator.parameters.items()))
    other = array.copy()
    other.flat[-1] = np.nextafter(other.flat[-1], np.float32(9))
    changed = [{name: other}, {name: array.reshape(1, *array.shape)}, {f"{name}x": array}]
    digests = {dataclasses.replace(generator, parameters={**generator.parameters, **c}).digest for c in changed}
    assert len(digests | {generator.digest}) == 4
    reordered = dict(reversed(generator.parameters.items()))
    assert dataclasses.replace(generator, parameters=reordered).digest == generator.digest


def test_unlabelled_images_count(drawings):
    """-1 and None mark unlabelled images alike; they change the network and are no class."""
    images = np.concatenate([drawings[:, 0], drawings[:, 1]])
    minus, none = (HyperTransformerClassifier().fit(images, [*range(WAY), *[mark] * WAY]) for mark in (-1, None))
    assert list(minus.classes_) == list(range(WAY))
    assert np.array_equal(minus.predict_proba(images), none.predict_proba(images))
    without = HyperTransformerClassifier().fit(drawings[:, 0], range(WAY))
    assert_different(minus.predict_proba(images), without.predict_proba(images))


# Labels and scikit-learn's conventions

LABELS = st.one_of(st.integers(0, 9), st.text(max_size=3), st.tuples(st.integers(), st.booleans()), st.floats(0, 1))


def test_labels_of_other_libraries_are_numbers():
    """A torch or NumPy vector of labels is numbered like the list of its numbers."""
    y = [4, 4, -1, 2, 2]
    for vector in (np.array(y), torch.tensor(y), np.array(y).astype(object)):
        numbers, classes = encode(vector)
        assert numbers.tolist() == [1, 1, -1, 0, 0] and classes == [2, 4]


@given(st.lists(st.one_of(LABELS, st.just(-1), st.none()), max_size=12))
def test_labels_are_numbered(y):
    """Each label's number leads back to it; -1 and None, and they alone, have none."""
    numbers, classes = encode(y)
    for number, label in zip(numbers, y, strict=True):
        assert (number == -1) == (label is None or label == -1)
        assert number == -1 or classes[number] == label
    assert len(set(classes)) == len(classes)


@pytest.mark.parametrize("y", ["ab", np.zeros((2, 2)), 3, [[1], [2]], [0, np.nan], {1, 2}.__iter__()])
def test_bad_labels(y):
    """Labels that are no vector of things to tell apart are refused."""
    with pytest.raises(InputError, match="label"):
        encode(y)


def test_parameters_are_conventional():
    """get_params gives what set_params takes; the constructor changes nothing; unknown names are refused."""
    clf = HyperTransformerClassifier(preprocess="none")
    defaults = {"checkpoint": "omniglot", "preprocess": "ink", "polarity": "auto", "views": 1}
    assert clf.get_params() == defaults | {"preprocess": "none"}
    assert clf.set_params(polarity="dark").polarity == "dark" and "polarity='dark'" in repr(clf)
    with pytest.raises(InputError, match="no parameter 'colour'"):
        clf.set_params(colour=1)


def test_with_scikit_learn(drawings):
    """clone, Pipeline, cross_val_score and is_classifier of scikit-learn work with it."""
    pytest.importorskip("sklearn")
    from sklearn.base import clone, is_classifier
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer
    from sklearn.utils.validation import check_is_fitted

    clf = HyperTransformerClassifier(polarity="light")
    copy = clone(clf)
    assert copy is not clf and copy.get_params() == clf.get_params() and is_classifier(clf)
    with pytest.raises(Exception, match="not fitted"):
        check_is_fitted(clf)
    images, labels = drawings.reshape(-1, 84, 84), np.repeat(list("abcde"), 6)
    scores = cross_val_score(clf, images, labels, cv=2)
    assert scores.shape == (2,) and scores.min() > 0.5
    pipeline = make_pipeline(FunctionTransformer(lambda x: x[:, ::2, ::2]), clf).fit(images, labels)
    check_is_fitted(pipeline)
    assert pipeline.predict_proba(images).shape == (30, WAY) and list(pipeline.classes_) == list("abcde")
    given_parameters = HyperTransformerClassifier(load_pretrained())
    assert clone(given_parameters).fit(images, labels).score(images, labels) > 0.5


def test_checkpoints(tmp_path, drawings):
    """A pretrained generator by name, a file, a run folder, and parameters with their config are all taken."""
    parameters, config = load_pretrained()
    save(tmp_path / "run", parameters, config)
    images, labels = drawings[:, 0], range(WAY)
    wanted = HyperTransformerClassifier().fit(images, labels)
    for given_one in (tmp_path / "run", str(tmp_path / "run" / "model.safetensors"), (parameters, config)):
        clf = HyperTransformerClassifier(given_one).fit(images, labels)
        assert np.array_equal(clf.predict_proba(images), wanted.predict_proba(images))
    assert open_generator(tmp_path / "run").name == "run"
    for bad in ("omniglott", tmp_path, 7, None):
        with pytest.raises(InputError, match="checkpoint"):
            open_generator(bad)


def test_other_sizes_and_channels():
    """A generator for 8 x 8 colours serves images as they are."""
    from mini_ht import Config

    config = Config(
        way=3, channels=2, blocks=2, image_size=8, image_channels=3, encoding=8, layers=1, generate_bias=True
    )
    images = np.random.default_rng(0).random((6, 8, 8, 3))
    clf = HyperTransformerClassifier((draw_parameters(config), config), preprocess="none").fit(
        images, [0, 0, 1, 1, 2, 2]
    )
    assert clf.predict(images).shape == (6,)
    with pytest.raises(InputError, match="channels"):
        clf.set_params(preprocess="ink").fit(images, [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    "count, y, words",
    [
        (3, [0, 0, 0], "1 classes.*at least 2"),
        (2, [-1, -1], "0 classes"),
        (25, range(25), "25 classes.*2 .. 20"),
        (3, [0, 1], "3 images and 2 labels"),
    ],
)
def test_bad_tasks(drawings, count, y, words):
    """Too few or too many classes, or labels that do not fit the images, are refused."""
    images = np.concatenate([drawings.reshape(-1, 84, 84)])[:count]
    with pytest.raises(InputError, match=words):
        HyperTransformerClassifier().fit(images, y)


def test_an_empty_class(generator):
    """A task with a class that no image has is refused."""
    with pytest.raises(InputError, match="no labelled image of class c"):
        adapt(generator, [Task(np.zeros((2, 28, 28, 1), np.float32), np.arange(2), list("abc"))])


def test_duplicates_are_warned_of(drawings):
    """Equal images of different classes are warned of; of one class, or unlabelled, they are not."""
    images = np.concatenate([drawings[:2, 0], drawings[:1, 0]])
    with pytest.warns(UserWarning, match="images 0 and 2 are equal"):
        HyperTransformerClassifier().fit(images, [0, 1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HyperTransformerClassifier().fit(images, [0, 1, 0])
        HyperTransformerClassifier().fit(images, [0, 1, -1])


def test_not_fitted():
    """Asked before fit, it says so."""
    for ask in ("predict", "predict_proba", "export"):
        with pytest.raises(InputError, match="fit first"):
            getattr(HyperTransformerClassifier(), ask)([])


def test_the_front_door_knows_the_classifier():
    """The names at the top of the package are the classes and functions themselves; others are refused."""
    import mini_ht
    from mini_ht.classifier_file import load_classifier

    assert mini_ht.HyperTransformerClassifier is HyperTransformerClassifier
    assert mini_ht.load_classifier is load_classifier
    with pytest.raises(AttributeError, match="no attribute 'Hypertransformer'"):
        _ = mini_ht.Hypertransformer


def test_learned_statistics_help_small_tasks():
    """Two classes of one drawing each: statistics of training tasks make a poor classifier a good one."""
    trained = open_generator("omniglot")
    plain = dataclasses.replace(trained, config=dataclasses.replace(trained.config, shrink=0.0))
    rng, right = np.random.default_rng(0), ([], [])
    drawings = glyphs(2, 40, drawings=6).pixels.reshape(40, 6, 28, 28, 1).astype(np.float32) / 255
    for _ in range(20):
        pair = drawings[rng.permutation(40)[:2]]  # [way, 6, H, W, C]
        task = Task(pair[:, 0], np.arange(2), ("a", "b"))
        for generator, rates in zip((trained, plain), right, strict=True):
            (classifier,) = adapt(generator, [task], "none")
            logits = classifier.network(pair[:, 1:].reshape(-1, 28, 28, 1))
            rates.append((logits.argmax(-1) == np.arange(2).repeat(5)).mean())
    assert np.mean(right[0]) > np.mean(right[1]) + 0.05 and np.mean(right[0]) > 0.85
