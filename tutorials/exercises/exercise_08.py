"""Exercises of tutorial 08: fill in the functions, then `pytest -m exercise tutorials/exercises/exercise_08.py`."""

import dataclasses  # noqa: F401 (for your solutions)

import numpy as np
import pytest

from mini_ht.config import Config
from mini_ht.generator import generate
from mini_ht.parameters import draw_parameters
from mini_ht.plan import cnn_size

pytestmark = pytest.mark.exercise


def size_by_hand(image_size, image_channels, channels, way):
    """Numbers in a CNN of four 3x3 conv blocks and a logits layer, without generated conv biases; no `cnn_size`."""
    raise NotImplementedError("exercise 1")


def orderless_spread(weights):
    """The tutorial's spread of weights [E, 3, 3, Cin, Cout], after each task's kernels are sorted by their sum."""
    raise NotImplementedError("exercise 2")


def freeze_first(parameters, config, support, labels, count):
    """Parameters and config of a generator whose generated convs up to number `count` are frozen.

    They keep the weights that they get for the one task support [1, n, H, W, C], labels [1, n]. Generated convs behind
    them stay generated. The given mapping is left alone.
    """
    raise NotImplementedError("exercise 3")


@pytest.mark.parametrize("image_size, image_channels, channels, way", [(28, 1, 4, 5), (84, 3, 8, 5), (40, 1, 6, 20)])
def test_size_by_hand(image_size, image_channels, channels, way):
    config = Config(image_size=image_size, image_channels=image_channels, channels=channels, way=way)
    assert size_by_hand(image_size, image_channels, channels, way) == cnn_size(config)


def test_orderless_spread():
    rng = np.random.default_rng(0)
    kernels = rng.standard_normal((3, 3, 2, 6))
    shuffled = np.stack([kernels[..., rng.permutation(6)] for _ in range(8)])
    assert orderless_spread(shuffled) < 1e-12
    signs = np.stack([kernels, -kernels])  # another task has other kernels, in whatever order
    assert orderless_spread(signs) > 0.5
    ordered = kernels[..., kernels.sum((0, 1, 2)).argsort()]
    scaled = np.stack([ordered, 3 * ordered])  # mean 2, deviations of 1; root mean square sqrt(5)
    np.testing.assert_allclose(orderless_spread(scaled), 1 / np.sqrt(5))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_freeze_first(count):
    config = Config(way=3, image_size=16, encoding=8, layers=1, shared_features=8, local_features=4, generate="1,3,4")
    parameters = draw_parameters(config, seed=0)
    names = set(parameters)
    rng = np.random.default_rng(0)
    support, labels = rng.random((4, 6, 16, 16, 1), np.float32), np.tile(np.arange(6) % 3, (4, 1))
    frozen, chosen = freeze_first(parameters, config, support[:1], labels[:1], count)
    assert set(parameters) == names and chosen.generated_convs == tuple(k for k in (1, 3, 4) if k > count)
    own, first = (generate(*both, support, labels).convs for both in ((frozen, chosen), (parameters, config)))
    for number, (conv, before) in enumerate(zip(own, first, strict=True), 1):
        np.testing.assert_allclose(conv.weight[0], before.weight[0], rtol=1e-4, atol=1e-5)  # the task frozen for
        varies = np.abs(conv.weight - conv.weight[:1]).max() > 0
        assert varies == (number in chosen.generated_convs)
