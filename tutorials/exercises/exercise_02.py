"""Exercises of tutorial 02: fill in the functions, then `pytest -m exercise tutorials/exercises/exercise_02.py`."""

import math

import numpy as np
import pytest

from mini_ht.config import Config
from mini_ht.parameters import parameter_table
from mini_ht.plan import plan
from mini_ht.tokens import slices_to_conv, support_tokens

pytestmark = pytest.mark.exercise


def support_token(xi, label, local, shared, width):
    """One support image's token: xi [way + 1, d], label in -1 .. way-1, local [a], shared [b] -> [width]."""
    raise NotImplementedError("exercise 1")


def conv_to_slices(weight, bias):
    """The slices that fold to these weights: weight [E, 3, 3, Cin, Cout], bias [E, Cout] -> [E, Cout, 9 Cin + 1]."""
    raise NotImplementedError("exercise 2")


def encoder_layer_numbers(width):
    """How many learned numbers one pre-norm encoder layer has, if all its widths are that of the tokens."""
    raise NotImplementedError("exercise 3")


@pytest.mark.parametrize("label", [0, 2, -1])
def test_support_token(label):
    config = Config(way=3, channels=4, encoding=6, shared_features=5, local_features=2)
    layer, rng = plan(config)[1], np.random.default_rng(0)
    xi, local, shared = rng.standard_normal((4, 6)), rng.standard_normal(4), rng.standard_normal(5)
    labels = np.array([[label]])
    wanted = support_tokens({"conv2.xi": xi}, layer, labels, local[None, None], shared[None, None])[0, 0]
    np.testing.assert_array_equal(support_token(xi, label, local, shared, layer.token_width), wanted)


@pytest.mark.parametrize("channels", [2, 5])
def test_conv_to_slices(channels):
    config = Config(channels=channels, generate_bias=True)
    layer, rng = plan(config)[1], np.random.default_rng(0)
    weight, bias = rng.standard_normal((2, 3, 3, channels, channels)), rng.standard_normal((2, channels))
    slices = conv_to_slices(weight, bias)
    assert slices.shape == (2, layer.placeholders, layer.slice_length)
    for found, wanted in zip(slices_to_conv(slices, layer, config), (weight, bias), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("features", [8, 30])
def test_encoder_layer_numbers(features):
    config = Config(readout="linear", shared_features=features)
    for layer in plan(config):
        prefix = f"{layer.name}.generator.layer1."
        wanted = sum(
            math.prod(shape) for name, (shape, _) in parameter_table(config).items() if name.startswith(prefix)
        )
        assert encoder_layer_numbers(layer.token_width) == wanted
