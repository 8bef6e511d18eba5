"""The last conv by attention among class means: directions that tell the classes of a task apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, seeds
from tolerances import TOLERANCE, assert_close, assert_different, relative_error

from mini_ht import Config, InputError, draw_parameters, generate, to_torch
from mini_ht.datasets.glyphs import glyphs
from mini_ht.discriminant import discriminant, orthonormal
from mini_ht.episodes import sample
from mini_ht.kernels import conv_block
from mini_ht.plan import plan

CONFIG = Config(way=6, channels=4, blocks=3, image_size=12, discriminant=8, layers=1)
LAYER = plan(CONFIG)[2]


def task(seed, shot=5, config=CONFIG, noise=0.5):
    """Bright maps [1, n, 3, 3, Cin] of classes with a mean each, and labels [1, n]."""
    rng = np.random.default_rng(seed)
    labels = np.arange(config.way).repeat(shot)
    means = rng.standard_normal((config.way, 3, 3, config.channels))
    maps = means[labels] + noise * rng.standard_normal((len(labels), 3, 3, config.channels))
    return 6 + maps[None], labels[None]


def drawn(seed=0, config=CONFIG):
    return draw_parameters(config, seed, np.float64)


def kernels(parameters, x, labels, mask=None, config=CONFIG):
    return discriminant(parameters, config, LAYER, x, labels, mask)


@given(seed=seeds)
def test_directions_are_orthonormal_by_the_spread(library, seed):
    """V' S V is the identity, and the span is that of the directions that came."""
    rng = np.random.default_rng(seed)
    came, root = rng.standard_normal((2, 9, 4)), rng.standard_normal((2, 9, 9))
    spread = root @ root.mT + np.eye(9)
    found = library.back(orthonormal(library.to(came), library.to(spread)))
    assert_close(found.mT @ spread @ found, np.broadcast_to(np.eye(4), (2, 4, 4)))
    assert_close(came @ np.linalg.pinv(came) @ found, found)
    assert (np.einsum("edc,edf,efc->ec", came, spread, found) > 0).all()  # each keeps its sense


@given(seed=seeds, data=st.data())
def test_names_of_classes_do_not_matter(library, seed, data):
    """Kernels are the same whatever the classes are called, in whatever order, and however many names are free."""
    x, labels = task(seed)
    names = np.array(data.draw(st.permutations(range(CONFIG.way))))
    parameters = library.to(drawn())
    found = library.back(kernels(parameters, library.to(x), library.to(labels)))
    renamed = library.back(kernels(parameters, library.to(x), library.to(names[labels])))
    assert_close(renamed, found)
    wider = dataclasses.replace(CONFIG, way=9)
    assert_close(library.back(kernels(parameters, library.to(x), library.to(labels), config=wider)), found)


@given(seed=seeds)
def test_images_that_do_not_count_change_nothing(library, seed):
    """Unlabelled images and padding, whatever is on them, leave the kernels as they are."""
    x, labels = task(seed)
    parameters = library.to(drawn())
    wanted = library.back(kernels(parameters, library.to(x), library.to(labels)))
    rng = np.random.default_rng(seed)
    more = np.concatenate([x, 9 * rng.random((1, 4, *x.shape[2:]))], axis=1)
    marks = np.concatenate([labels, [[-1, -1, 0, 3]]], axis=1)
    mask = np.arange(marks.shape[1])[None] < labels.shape[1] + 2
    assert_close(library.back(kernels(parameters, library.to(more), library.to(marks), library.to(mask))), wanted)


@given(seed=seeds)
def test_each_step_lowers_what_it_should(seed):
    """With small steps, the sum over pairs of exp(-distance^2 / reach^2) falls with each of them."""
    x, labels = task(seed)
    flat = x.reshape(1, labels.shape[1], -1)
    means = np.stack([flat[0, labels[0] == label].mean(0) for label in range(CONFIG.way)])  # [way, D]
    found = []
    for steps in range(1, 5):
        config = dataclasses.replace(CONFIG, discriminant=steps)
        parameters = drawn(0, config)
        parameters["conv3.discriminant.turn"] -= 4  # a fiftieth of the usual
        parameters["conv3.discriminant.lift"] -= 40  # nothing but directions
        directions = kernels(parameters, x, labels, config=config).reshape(flat.shape[-1], -1)
        places = means @ directions
        found.append(np.exp(-((places[:, None] - places) ** 2).sum(-1) / 4).sum())
    assert found == sorted(found, reverse=True) and found[-1] < found[0] - 1e-4


def test_classes_lie_further_apart_than_by_chance():
    """Over 40 tasks, new images of a class are nearest to its mean much more often than with the start's kernels."""
    hits = np.zeros(2)
    for seed in range(40):
        x, labels = task(seed, shot=10, noise=1.0)
        seen, new = np.arange(60).reshape(6, 10)[:, :5].ravel(), np.arange(60).reshape(6, 10)[:, 5:].ravel()
        for which, turn in enumerate((0, -40)):
            parameters = drawn(seed)
            parameters["conv3.discriminant.turn"] += turn  # the start's own directions, of length 1
            weight = kernels(parameters, x[:, seen], labels[:, seen]).reshape(-1, CONFIG.channels)
            places = x.reshape(60, -1) @ weight
            means = np.stack([places[seen][labels[0, seen] == label].mean(0) for label in range(6)])
            nearest = ((places[new][:, None] - means) ** 2).sum(-1).argmin(1)
            hits[which] += (nearest == labels[0, new]).mean() / 40
    assert hits[0] > 0.9 and hits[0] > hits[1] + 0.15, hits


@given(seed=seeds)
def test_a_lifted_kernel_answers_as_a_linear_map(seed):
    """On maps of 3 x 3, with lift enough, ReLU and pool pass on what the whole map gives: an affine map of the input.

    So the block's output is that answer, normalised.
    """
    x, labels = task(seed)
    parameters = drawn()
    parameters["conv3.discriminant.lift"] += 4
    weight = kernels(parameters, x, labels)
    gamma, beta = np.ones(CONFIG.channels), np.zeros(CONFIG.channels)
    block, _ = conv_block(x, weight, gamma, beta)
    answers = x.reshape(labels.shape[1], -1) @ weight.reshape(-1, CONFIG.channels)
    wanted = (answers - answers.mean(0)) / answers.std(0)
    np.testing.assert_allclose(block.reshape(wanted.shape), wanted, rtol=0, atol=1e-4)  # but for the norm's epsilon


@given(seed=st.integers(0, 2**20))
def test_gradients_are_those_of_finite_differences(seed):
    """torch's gradients of the kernels, by input and parameters, agree with central differences (float64)."""
    config = dataclasses.replace(CONFIG, channels=2, discriminant=2)
    layer = plan(config)[2]
    x, labels = task(seed, 2, config)
    parameters = to_torch(drawn(seed, config))
    names = [name for name in parameters if "discriminant" in name] + ["conv2.beta"]
    values = [parameters[name] for name in names]
    inputs = [torch.tensor(x, requires_grad=True), *values]
    y, rng = torch.from_numpy(labels), np.random.default_rng(seed)
    projection = torch.from_numpy(rng.standard_normal((3, 3, 2, 2)))

    def total(x, *values):
        return (discriminant(dict(zip(names, values, strict=True)), config, layer, x, y, None) * projection).sum()

    gradients = torch.autograd.grad(total(*inputs), inputs)
    with torch.no_grad():
        for number, gradient in enumerate(gradients):
            direction = torch.from_numpy(rng.standard_normal(tuple(gradient.shape)))
            plus, minus = (
                total(*[part + (sign * 1e-5 * direction if k == number else 0) for k, part in enumerate(inputs)])
                for sign in (1, -1)
            )
            wanted = (plus - minus) / 2e-5
            assert abs((gradient * direction).sum() - wanted) <= 1e-4 * max(1, abs(wanted)), number


@given(case=cases(images=(3, 6), blocks=2, image_size=9, channels=3, slope=0.1, generate="all", discriminant=3))
def test_only_the_last_conv_is_found_so(library, case):
    """Its kernels differ from task to task and are finite with any support set, and no transformer belongs to it."""
    assert {name.split(".")[1] for name in case.parameters if name.startswith("conv2.")} >= {"discriminant", "gamma"}
    assert "conv2.xi" not in case.parameters and "conv1.xi" in case.parameters
    case = case.replace(labels=np.arange(case.labels.size).reshape(case.labels.shape) % 2, mask=None)
    cnn = case.generate(library)
    weight = library.back(cnn.convs[1].weight)
    assert weight.shape == (len(case.labels), 3, 3, case.config.channels, case.config.channels)
    assert np.isfinite(weight).all()
    other = case.replace(support=case.support[..., ::-1, :, :].copy())
    assert_different(library.back(other.generate(library).convs[1].weight), weight)


def test_one_image_a_class():
    """One shot says nothing of the spread within classes, nor does one class of the distance of two: still kernels."""
    x, labels = task(0, shot=1)
    assert np.isfinite(kernels(drawn(), x, labels)).all()
    one = np.zeros_like(labels)
    start = kernels(drawn() | {"conv3.discriminant.turn": np.full(8, -40.0)}, x, one)
    assert_close(kernels(drawn(), x, one), start)


def test_a_training_that_breaks_down(library):
    """Without length, or not finite in torch, directions are an InputError and no traceback."""
    x, labels = task(0)
    for name, value in (("start", 0.0), *([("start", np.nan), ("prior", np.inf)] * (library.name == "torch"))):
        parameters = drawn()
        parameters[f"conv3.discriminant.{name}"][:] = value
        with pytest.raises(InputError, match="train with a lower learning_rate"):
            kernels(library.to(parameters), library.to(x), library.to(labels))


def test_what_it_cannot_do_is_an_error():
    """A last conv that is not generated, maps too small, and what only a transformer writes are refused."""
    wanted = r"discriminant is 8, which wants the last of several convs generated, on maps of 3 x 3 or more"
    for fields in (
        {"generate": "logits"},
        {"generate": "first2"},
        {"blocks": 1},
        {"image_size": 8},
        {"generate_bias": True},
        {"generate_norm": True},
        {"residual_weights": True},
    ):
        with pytest.raises(InputError, match=wanted):
            dataclasses.replace(CONFIG, **fields)
    with pytest.raises(InputError, match="discriminant is -1; it must be at least 0"):
        dataclasses.replace(CONFIG, discriminant=-1)


def test_single_precision(library):
    """In float32, the logits of 20 glyph tasks are as far from float64's as the table allows, in the median.

    A step of length `TURN` can carry rounding far where two classes look alike; so no bound holds for every task. Of
    all queries, 99 % get the same class.
    """
    errors, same = [], []
    parameters = {name: x.astype(np.float32) for name, x in drawn().items()}
    for seed in range(20):
        task = sample(glyphs(seed, 6, size=12), np.random.default_rng(seed), 1, way=6, shot=5, queries=5)
        wide = generate(drawn(), CONFIG, task.support.astype(float), task.labels)(task.query.astype(float))
        support, labels, query = library.to((task.support, task.labels, task.query))
        narrow = library.back(generate(library.to(parameters), CONFIG, support, labels)(query))
        errors.append(relative_error(narrow, wide))
        same.append((narrow.argmax(-1) == wide.argmax(-1)).mean())
    assert np.median(errors) <= TOLERANCE["float32"] and np.mean(same) >= 0.99, (errors, same)
