"""The gradients that were derived by hand: against finite differences, torch's autograd, and permuted strides."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from tolerances import assert_close

from mini_ht.kernels import NORM_EPS, conv_block
from mini_ht.kernels.reference_backward import block_backward, block_forward, stack_backward


def draw_stack(seed, images=2, height=9, width=10, channels=(2, 3, 4), biased=True, given_statistics=False):
    """Random float64 arguments of a stack: x, weights, gammas, betas, biases, statistics."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, images, height, width, channels[0]))
    pairs = list(pairwise(channels))
    weights = [rng.standard_normal((2, 3, 3, *pair)) for pair in pairs]
    gammas, betas = ([rng.standard_normal(outputs) for _, outputs in pairs] for _ in range(2))
    biases = [rng.standard_normal((2, outputs)) for _, outputs in pairs]
    statistics = [(rng.standard_normal((2, outputs)), rng.random((2, outputs)) + 0.1) for _, outputs in pairs]
    return x, weights, gammas, betas, biases if biased else None, statistics if given_statistics else None


def loss_and_directions(seed, arguments, slope):
    """A linear loss of everything that a stack returns: its directions g and g_statistics."""
    x, weights, gammas, betas, biases, statistics = arguments
    rng = np.random.default_rng(seed + 1)
    found = []
    for k in range(len(weights)):
        bias, own = biases and biases[k], statistics and statistics[k]
        x, used = block_forward(x, weights[k], gammas[k], betas[k], bias, own, slope, NORM_EPS)
        found.append(used)
    g = rng.standard_normal(x.shape)
    g_statistics = [tuple(rng.standard_normal(part.shape) for part in used) for used in found]
    loss = (x * g).sum()
    for used, directions in zip(found, g_statistics, strict=True):
        loss += (used[0] * directions[0]).sum() + (used[1] * directions[1]).sum()
    return loss, g, g_statistics


def leaves(arguments):
    """Every array of a stack's arguments, in one order."""
    x, weights, gammas, betas, biases, statistics = arguments
    return [x, *weights, *gammas, *betas, *(biases or ()), *(part for pair in statistics or () for part in pair)]


def gradient_leaves(blocks):
    """The gradients in the order of `leaves`."""
    names = ("weight", "gamma", "beta", "bias")
    parts = [blocks[0].x, *(getattr(block, name) for name in names for block in blocks)]
    return [part for part in (*parts, *(p for b in blocks for p in b.statistics or ())) if part is not None]


@pytest.mark.parametrize("given_statistics", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_gradients_equal_finite_differences(given_statistics, slope):
    """Moving all arguments a little along a random direction changes the loss as the gradients say."""
    arguments = draw_stack(3, channels=(2, 3, 4), given_statistics=given_statistics)
    _, g, g_statistics = loss_and_directions(3, arguments, slope)
    gradients = gradient_leaves(stack_backward(*arguments, slope, NORM_EPS, g, g_statistics))
    for number, (leaf, gradient) in enumerate(zip(leaves(arguments), gradients, strict=True)):
        direction = np.random.default_rng(number).standard_normal(leaf.shape)
        change = []
        for sign in (1, -1):
            leaf += sign * 1e-6 * direction
            change.append(sign * loss_and_directions(3, arguments, slope)[0])
            leaf -= sign * 1e-6 * direction
        assert sum(change) / 2e-6 == pytest.approx((direction * gradient).sum(), rel=1e-5, abs=1e-6), number


@given(
    seed=seeds,
    height=st.integers(4, 9),
    width=st.integers(4, 9),
    images=st.integers(1, 3),
    inputs=st.sampled_from([1, 3, 8]),
    slope=st.sampled_from([0.0, 0.2]),
    biased=st.booleans(),
    given_statistics=st.booleans(),
)
def test_gradients_equal_torch_autograd(seed, height, width, images, inputs, slope, biased, given_statistics):
    """Forward and gradients of a stack of two are those of torch's autograd in float64."""
    arguments = draw_stack(seed, images, height, width, (inputs, 3, 4), biased, given_statistics)
    wanted, g, g_statistics = loss_and_directions(seed, arguments, slope)
    blocks = stack_backward(*arguments, slope, NORM_EPS, g, g_statistics)
    tensors = {id(leaf): torch.tensor(leaf, requires_grad=True) for leaf in leaves(arguments)}
    x, weights, gammas, betas, biases, statistics = arguments
    y, loss = tensors[id(x)], torch.zeros((), dtype=torch.float64)
    for k in range(2):
        bias = tensors[id(biases[k])] if biases else None
        own = tuple(tensors[id(part)] for part in statistics[k]) if statistics else None
        parts = (tensors[id(part)] for part in (weights[k], gammas[k], betas[k]))
        y, used = conv_block(y, *parts, bias=bias, statistics=own, slope=slope)
        for part, direction in zip(used, g_statistics[k], strict=True):
            loss = loss + (part * torch.tensor(direction)).sum()
    loss = loss + (y * torch.tensor(g)).sum()
    assert_close(loss, wanted)
    found = torch.autograd.grad(loss, [tensors[id(leaf)] for leaf in leaves(arguments)])
    for mine, other in zip(gradient_leaves(blocks), found, strict=True):
        assert_close(mine, other)


@given(seed=seeds, slope=st.sampled_from([0.0, 0.2]))
def test_strides_do_not_matter(seed, slope):
    """Arrays that lie in memory in another order give the same gradients."""
    x, weights, gammas, _, biases, _ = draw_stack(seed, channels=(3, 4))
    g = np.random.default_rng(seed).standard_normal((2, 2, 4, 5, 4))
    first = block_backward(x, weights[0], gammas[0], biases[0], None, slope, NORM_EPS, g)
    x, weight, bias, g = (np.asfortranarray(a) for a in (x, weights[0], biases[0], g))
    second = block_backward(x, weight, gammas[0], bias, None, slope, NORM_EPS, g)
    for mine, other in zip(gradient_leaves([second]), gradient_leaves([first]), strict=True):
        assert_close(mine, other)


def test_the_first_of_equal_maxima_gets_the_gradient():
    """Integer inputs make exact ties, and the gradient goes to the first pixel of the window, row by row."""
    x, weight = np.ones((1, 1, 4, 4, 1)), np.zeros((1, 3, 3, 1, 1))
    weight[0, 1, 1] = 1  # each position sees itself
    zero, one = np.zeros((1, 1)), np.ones(1)
    given_statistics = (zero, zero + 1 - NORM_EPS)
    found = block_backward(x, weight, one, None, given_statistics, 0.0, NORM_EPS, np.ones((1, 1, 2, 2, 1)))
    wanted = np.zeros_like(x)
    wanted[:, :, ::2, ::2] = 1
    assert_close(found.x, wanted)
