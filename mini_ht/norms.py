"""Norm statistics of a support set, shrunk towards those of many training tasks."""

from mini_ht.arrays import Array, Parameters, as_floats
from mini_ht.kernels import NORM_EPS

Statistics = tuple[Array, Array]


def shrunk(own: Statistics, learned: Statistics, share: float) -> Statistics:
    """Mean and variance of a mixture: `share` of it as learned [Cout], the rest as a support set has them [E, Cout]."""
    middle = own[0] + share * (learned[0] - own[0])  # [E, Cout]
    spreads = [variance + (mean - middle) ** 2 for mean, variance in (own, learned)]
    return middle, (1 - share) * spreads[0] + share * spreads[1]


def towards_learned(
    parameters: Parameters, name: str, share: float, x: Array, own: Statistics
) -> tuple[Array, Statistics]:
    """A conv block's output [E, N, h, w, Cout] as it would be with shrunk statistics, and these.

    `own` are the statistics with which x was normalised. Parameters without learned statistics leave it so.
    """
    if f"{name}.mean" not in parameters:
        return x, own
    new = shrunk(own, (parameters[f"{name}.mean"], parameters[f"{name}.variance"]), share)
    deviation = (new[1] + NORM_EPS) ** 0.5  # [E, Cout]
    scale = (own[1] + NORM_EPS) ** 0.5 / deviation
    gamma, beta = parameters[f"{name}.gamma"], parameters[f"{name}.beta"]
    shift = beta * (1 - scale) + gamma * (own[0] - new[0]) / deviation
    return as_floats(x * scale[:, None, None, None] + shift[:, None, None, None], x), new  # [E, 1, 1, 1, Cout] each
