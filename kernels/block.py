"""One signature for conv blocks, alone and stacked, and the shared conv; `implementation` alone picks who computes."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from mini_ht.arrays import Array, as_floats, relu
from mini_ht.errors import InputError
from mini_ht.kernels import reference

# Added to the variance, as in the released code's framework: a channel that hardly ever fires is not blown up to unit
# variance.
NORM_EPS = 1e-3

IMPLEMENTATIONS = ("reference", "torch", "triton")
Statistics = tuple[Array, Array]


@cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def implementation(impl: str, x: Array) -> Any:
    """The module that computes on `x`: by its name, or with "auto" the fastest one for x.

    Raises InputError for an unknown name or one that cannot compute on arrays of this library.
    """
    own = "reference" if isinstance(x, np.ndarray) else "torch"
    name = impl
    if impl == "auto":
        name = "triton" if own == "torch" and x.is_cuda and has_triton() else own
    if name not in IMPLEMENTATIONS:
        raise InputError(f"impl is {impl!r}; choose auto, {', '.join(IMPLEMENTATIONS)}")
    if (name == "reference") != (own == "reference"):
        raise InputError(f"impl {name!r} cannot compute on a {type(x).__name__}; convert it, or use impl='auto'")
    if name == "reference":
        return reference
    if name == "torch":
        from mini_ht.kernels import torch_conv  # here, as torch need not be installed

        return torch_conv
    if not has_triton():
        raise InputError("impl is 'triton', which is not installed: pip install mini_ht[gpu], or use impl='auto'")
    from mini_ht.kernels import triton_conv

    return triton_conv


def conv2d(x: Array, weight: Array, bias: Array, stride: int = 1, padding: int = 0, impl: str = "auto") -> Array:
    """One weight for all images: x [B, H, W, Cin], weight [k, k, Cin, Cout], bias [Cout] -> [B, H', W', Cout].

    H' = (H + 2 padding - k) // stride + 1.
    """
    return implementation(impl, x).conv2d(x, weight, bias, stride, padding)


def conv_max_pool(x: Array, weight: Array, bias: Array, impl: str = "auto", *, blur: bool = False) -> Array:
    """conv 3x3 'same' with one weight for all images, then 2x2 max-pool (valid) where a map has two rows or more.

    With blur, ReLU and a pool at every pixel, and a blur before every second row and column is dropped, so that less
    depends on which ones they are (Zhang, ICML 2019, arXiv 1904.11486).
    x [B, H, W, Cin], weight [3, 3, Cin, Cout], bias [Cout] -> [B, H // 2, W // 2, Cout], or like x.
    """
    if min(x.shape[1:3]) < 2:
        return conv2d(x, weight, bias, padding=1, impl=impl)
    if blur:
        return implementation(impl, x).blur_pool(conv2d(x, weight, bias, padding=1, impl=impl))
    return implementation(impl, x).conv_max_pool(x[None], weight[None])[0] + as_floats(bias, x)


def conv_block(
    x: Array, weight: Array, gamma: Array, beta: Array, *, bias: Array | None = None,
    statistics: Statistics | None = None, mask: Array | None = None, slope: float = 0.0, impl: str = "auto",
) -> tuple[Array, Statistics]:  # fmt: skip
    """conv 3x3 'same' -> (leaky) ReLU -> 2x2 max-pool (valid) -> batch norm, with other weights for every episode.

    Args:
        x: [E, N, H, W, Cin], H and W at least 2; on torch it may be bfloat16 where the rest is float32.
        weight: [E, 3, 3, Cin, Cout].
        gamma, beta: [Cout], scale and offset of the norm, shared by all episodes.
        bias: [E, Cout], added before the activation; None for none.
        statistics: (mean, variance), each [E, Cout], to normalise with; None takes those of this very pass.
        mask: [E, N], True for the images that count in the statistics; None counts all.
        slope: slope of the activation for negative inputs, in [0, 1).
        impl: "auto", "reference" (NumPy), "torch", or "triton" (CUDA; "auto" takes it there for what it computes).

    Returns:
        ([E, N, H // 2, W // 2, Cout], the (mean, variance) that were used).
    """
    given = None if statistics is None else [statistics]
    y, used = conv_stack(x, [weight], [gamma], [beta], [bias], given, mask, slope, impl)
    return y, used[0]


def conv_stack(
    x: Array, weights: Sequence[Array], gammas: Sequence[Array], betas: Sequence[Array],
    biases: Sequence[Array | None] | None = None, statistics: Sequence[Statistics] | None = None,
    mask: Array | None = None, slope: float = 0.0, impl: str = "auto",
) -> tuple[Array, list[Statistics]]:  # fmt: skip
    """Conv blocks one after the other; each argument holds one entry a block, as `conv_block` wants it.

    Triton puts the norm of a block into the weights of the next. Statistics over a mask it leaves to torch.
    Returns the last block's output, and each block's (mean, variance).
    """
    computer = implementation(impl, x)
    fused = hasattr(computer, "conv_stack") and (mask is None or statistics is not None)
    if fused and (impl != "auto" or computer.supports(x, weights)):
        return computer.conv_stack(x, weights, gammas, betas, biases, statistics, slope, NORM_EPS)
    used = []
    for k, weight in enumerate(weights):
        pooled = computer.conv_max_pool(x, weight)  # [E, N, H // 2, W // 2, Cout]
        bias, given = None if biases is None else biases[k], None if statistics is None else statistics[k]
        if bias is not None:
            pooled = pooled + as_floats(bias, x)[:, None, None, None, :]
        x, both = activate_and_norm(computer, pooled, gammas[k], betas[k], given, mask, slope)
        used.append(both)
    return x, used


def activate_and_norm(
    computer: Any, pooled: Array, gamma: Array, beta: Array, statistics: Statistics | None, mask: Array | None,
    slope: float,
) -> tuple[Array, Statistics]:  # fmt: skip
    """The rest of a block, after the pool: [E, N, h, w, C] -> (like it, (mean, variance))."""
    # The activation never decreases, so it may come after the pool, where there is a quarter of the values.
    active = relu(pooled, slope)
    if statistics is None and mask is None:
        return computer.batch_norm(active, gamma, beta, NORM_EPS)
    active = as_floats(active, gamma)
    mean, variance = statistics or masked_statistics(active, mask)
    scale = gamma * (variance + NORM_EPS) ** -0.5  # [E, C]
    shift = beta - mean * scale  # [E, C]
    normal = active * scale[:, None, None, None, :] + shift[:, None, None, None, :]
    return as_floats(normal, pooled), (mean, variance)


def masked_statistics(x: Array, mask: Array) -> tuple[Array, Array]:
    """Mean and variance of each channel over the images that count: x [E, N, h, w, C], mask [E, N] -> two of [E, C]."""
    counts = as_floats(mask, x)  # [E, N]
    share = counts / (counts.sum(-1)[:, None] * (x.shape[2] * x.shape[3]))  # [E, N], sums to 1 over all values
    share = share[:, :, None, None, None]
    mean = (x * share).sum((1, 2, 3))  # [E, C]
    return mean, ((x - mean[:, None, None, None, :]) ** 2 * share).sum((1, 2, 3))
