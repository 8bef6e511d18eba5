"""NumPy: the conv block's gradients, derived by hand; every other implementation is held to these.

Forward, for one episode and one output channel. q is a pixel, t one of the nine taps, c an input channel, p a pooling
window, M = N * h * w the number of windows:

    y[q] = b + sum over t, c of x[q + t, c] W[t, c]      zeros outside of the image
    a[p] = f(max of y over the four pixels of p)         f(u) = u for u > 0, else slope * u
    n[p] = (a[p] - m) r, with r = (v + eps)^(-1/2)       m, v: mean and variance of a, or given ones
    z[p] = gamma n[p] + beta

Backward, from g = dL/dz and, if the returned statistics were used, from their gradients gm and gv:

    dbeta = sum of g,   dgamma = sum of g n              over windows (and episodes, who share gamma and beta)

Given statistics: a, m and v each enter z once, and dr/dv = -r^3 / 2, so

    da = gamma r g,   dm = gm - gamma r sum(g),   dv = gv - gamma r^2 sum(g n) / 2

Own statistics: m and v are functions of a, with dm/da[p] = 1 / M and dv/da[p] = 2 (a[p] - m) / M (the mean's own change
drops out of v, as deviations sum to zero). Put dm and dv of above through these, and use a - m = n / r:

    da = gamma r (g - sum(g) / M - n sum(g n) / M) + gm / M + gv 2 (a - m) / M

The pool hands da to the first of the largest pixels, f scales it: d[p] = da[p] (1 if the maximum is > 0, else slope),
dy[q] = d[p] at the pixel that won, else 0. Then

    db = sum of d,   dW[t, c] = sum over q of x[q + t, c] dy[q],   dx[q, c] = sum over t of W[t, c] dy[q - t]

so dx is the conv of dy with the flipped taps and the two channel axes exchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mini_ht.kernels.reference import Floats, neighbourhoods, window_outputs

Statistics = tuple[Floats, Floats]


@dataclass(frozen=True)
class BlockGradients:
    """What a loss gains by each argument of a block; shaped like the arguments, None for those not given."""

    x: Floats  # [E, N, H, W, Cin]
    weight: Floats  # [E, 3, 3, Cin, Cout]
    gamma: Floats  # [Cout]
    beta: Floats  # [Cout]
    bias: Floats | None  # [E, Cout]
    statistics: Statistics | None  # for mean and variance, each [E, Cout]


def winners(x: Floats, weight: Floats, bias: Floats | None) -> tuple[Floats, np.ndarray]:
    """The largest conv output of each window, and which of the four it is, the first if equal.

    x [E, N, H, W, Cin], weight [E, 3, 3, Cin, Cout], bias [E, Cout] -> two of [E, N, h, w, Cout].
    """
    four = window_outputs(x, weight)  # [E, N, h, w, 4, Cout]
    place = four.argmax(-2)  # [E, N, h, w, Cout]
    best = np.take_along_axis(four, place[..., None, :], -2)[..., 0, :]  # [E, N, h, w, Cout]
    return best if bias is None else best + spread(bias), place


def spread(x: Floats) -> Floats:
    """[E, C] -> [E, 1, 1, 1, C]."""
    return x[:, None, None, None, :]


def block_forward(
    x: Floats, weight: Floats, gamma: Floats, beta: Floats, bias: Floats | None, statistics: Statistics | None,
    slope: float, eps: float,
) -> tuple[Floats, Statistics]:  # fmt: skip
    """The block as written above; arguments and results as of `mini_ht.kernels.conv_block`."""
    best, _ = winners(x, weight, bias)
    active = np.where(best > 0, best, slope * best)
    mean, variance = statistics or (active.mean((1, 2, 3)), active.var((1, 2, 3)))  # [E, Cout]
    return gamma * (active - spread(mean)) * spread((variance + eps) ** -0.5) + beta, (mean, variance)


def block_backward(
    x: Floats, weight: Floats, gamma: Floats, bias: Floats | None, statistics: Statistics | None, slope: float,
    eps: float, g: Floats, g_statistics: Statistics | None = None,
) -> BlockGradients:  # fmt: skip
    """Gradients of a loss with dL/dz = g [E, N, h, w, Cout] and, for (mean, variance), g_statistics [E, Cout]."""
    best, place = winners(x, weight, bias)
    active = np.where(best > 0, best, slope * best)  # [E, N, h, w, Cout]
    mean, variance = statistics or (active.mean((1, 2, 3)), active.var((1, 2, 3)))
    g_mean, g_variance = g_statistics or (np.zeros_like(mean), np.zeros_like(mean))
    r = (variance + eps) ** -0.5  # [E, Cout]
    normal = (active - spread(mean)) * spread(r)  # [E, N, h, w, Cout]
    sum_g, sum_gn = g.sum((1, 2, 3)), (g * normal).sum((1, 2, 3))  # [E, Cout]
    if statistics:
        d_active = spread(gamma * r) * g
        d_statistics = g_mean - gamma * r * sum_g, g_variance - gamma * r**2 * sum_gn / 2
    else:
        count = active[0, ..., 0].size  # M
        d_active = spread(gamma * r) * (g - spread(sum_g) / count - normal * spread(sum_gn) / count)
        d_active += spread(g_mean) / count + spread(g_variance) * 2 * (active - spread(mean)) / count
        d_statistics = None
    d = np.where(best > 0, d_active, slope * d_active)  # [E, N, h, w, Cout]
    dy = unpool(d, place, x.shape[2], x.shape[3])  # [E, N, H, W, Cout]
    return BlockGradients(
        x=input_gradient(dy, weight),
        weight=weight_gradient(x, dy),
        gamma=sum_gn.sum(0),
        beta=sum_g.sum(0),
        bias=None if bias is None else d.sum((1, 2, 3)),
        statistics=d_statistics,
    )


def unpool(d: Floats, place: np.ndarray, height: int, width: int) -> Floats:
    """Each window's value at the pixel that won, zeros elsewhere: two of [E, N, h, w, C] -> [E, N, H, W, C]."""
    episodes, images, h, w, channels = d.shape
    full = np.zeros((episodes, images, height, width, channels), d.dtype)
    for k in range(4):
        full[:, :, k // 2 : 2 * h : 2, k % 2 : 2 * w : 2] = np.where(place == k, d, 0)
    return full


def weight_gradient(x: Floats, dy: Floats) -> Floats:
    """x [E, N, H, W, Cin], dy [E, N, H, W, Cout] -> [E, 3, 3, Cin, Cout]."""
    episodes, _, _, _, inputs = x.shape
    rows = neighbourhoods(np.ascontiguousarray(x).reshape(-1, *x.shape[2:]), 3, stride=1, padding=1)
    rows = rows.reshape(episodes, -1, 9 * inputs)  # [E, N * H * W, 9 * Cin]
    product = rows.mT @ dy.reshape(episodes, -1, dy.shape[-1])  # [E, 9 * Cin, Cout]
    return product.reshape(episodes, 3, 3, inputs, -1)


def input_gradient(dy: Floats, weight: Floats) -> Floats:
    """dy [E, N, H, W, Cout], weight [E, 3, 3, Cin, Cout] -> [E, N, H, W, Cin]."""
    episodes, images, height, width, outputs = dy.shape
    rows = neighbourhoods(dy.reshape(-1, height, width, outputs), 3, stride=1, padding=1)
    flipped = weight[:, ::-1, ::-1].swapaxes(3, 4).reshape(episodes, 9 * outputs, -1)  # [E, 9 * Cout, Cin]
    product = rows.reshape(episodes, -1, 9 * outputs) @ flipped  # [E, N * H * W, Cin]
    return product.reshape(episodes, images, height, width, -1)


def stack_backward(
    x: Floats, weights: Sequence[Floats], gammas: Sequence[Floats], betas: Sequence[Floats],
    biases: Sequence[Floats] | None, statistics: Sequence[Statistics] | None, slope: float, eps: float, g: Floats,
    g_statistics: Sequence[Statistics] | None = None,
) -> list[BlockGradients]:  # fmt: skip
    """Gradients of every block of a stack, first to last: what a block's input gets is the g of the one before."""
    count = len(weights)
    nothing: list[None] = [None] * count
    given, wanted, added = statistics or nothing, g_statistics or nothing, biases or nothing
    inputs = [x]
    for k in range(count - 1):
        y, _ = block_forward(inputs[k], weights[k], gammas[k], betas[k], added[k], given[k], slope, eps)
        inputs.append(y)
    results = []
    for k in reversed(range(count)):
        block = block_backward(inputs[k], weights[k], gammas[k], added[k], given[k], slope, eps, g, wanted[k])
        results.append(block)
        g = block.x
    return results[::-1]
