"""Exercises of tutorial 09: fill in the functions, then `pytest -m exercise tutorials/exercises/exercise_09.py`."""

import numpy as np
import pytest

from mini_ht.kernels import conv2d
from mini_ht.kernels.problems import Problem  # noqa: F401 (for your solutions)
from mini_ht.kernels.reference import conv_max_pool, window_outputs  # noqa: F401 (for your solutions)

pytestmark = pytest.mark.exercise


def one_for_all(weight):
    """One weight for the channels of all episodes side by side, and the share of its products that is useful.

    weight [E, 3, 3, Cin, Cout] -> ([3, 3, E * Cin, E * Cout], a number in 0 .. 1).
    """
    raise NotImplementedError("exercise 1")


def next_conv_max_pool(pooled, scale, shift, weight):
    """conv 3x3 'same' and 2x2 max-pool of z = pooled * scale + shift, without making z.

    pooled [E, N, H, W, C], scale and shift [E, C], weight [E, 3, 3, C, Cout] -> [E, N, H // 2, W // 2, Cout].
    """
    raise NotImplementedError("exercise 2")


def first_bound_by_arithmetic(channels, bandwidth, speed):
    """The least of these numbers of channels with which Problem("omniglot", 64, 80, 28, 1, ...) waits for arithmetic.

    Forward and backward, 2 bytes a value; bandwidth in bytes/s, speed in FLOP/s; None if it never does.
    """
    raise NotImplementedError("exercise 3")


def test_one_for_all():
    rng = np.random.default_rng(0)
    for episodes, inputs, outputs in ((3, 2, 4), (2, 1, 3)):
        x = rng.standard_normal((episodes, 2, 5, 6, inputs))  # [E, N, H, W, Cin]
        weight = rng.standard_normal((episodes, 3, 3, inputs, outputs))
        whole, useful = one_for_all(weight)
        assert whole.shape == (3, 3, episodes * inputs, episodes * outputs)
        side_by_side = np.concatenate(x, axis=-1)  # [N, H, W, E * Cin]
        found = conv2d(side_by_side, whole, np.zeros(episodes * outputs), padding=1)
        wanted = [conv2d(x[e], weight[e], np.zeros(outputs), padding=1) for e in range(episodes)]
        np.testing.assert_allclose(found, np.concatenate(wanted, axis=-1), atol=1e-12)
        assert np.isclose(useful, (whole != 0).mean())


def test_next_conv_max_pool(monkeypatch):
    rng = np.random.default_rng(0)
    pooled, weight = rng.standard_normal((2, 3, 7, 6, 3)), rng.standard_normal((2, 3, 3, 3, 4))
    scale, shift = rng.standard_normal((2, 2, 3))
    wanted = conv_max_pool(pooled * scale[:, None, None, None] + shift[:, None, None, None], weight)
    monkeypatch.setitem(globals(), "conv_max_pool", None)  # it would want z
    np.testing.assert_allclose(next_conv_max_pool(pooled, scale, shift, weight), wanted, atol=1e-12)


def test_first_bound_by_arithmetic():
    channels = [128, 8, 32, 512]  # not in order
    assert first_bound_by_arithmetic(channels, 1e12, 1e12) == 8
    assert first_bound_by_arithmetic(channels, 4.8e12, 989e12) == 128
    assert first_bound_by_arithmetic([64, 96], 4.8e12, 989e12) == 96  # forward alone would say 64
    assert first_bound_by_arithmetic([8, 16], 4.8e12, 989e12) is None
