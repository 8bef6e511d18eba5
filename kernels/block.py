"""One signature for the conv block and the shared conv; `implementation` alone picks who computes them."""

from typing import Any

import numpy as np

from mini_ht.arrays import Array, as_floats, namespace, relu
from mini_ht.errors import InputError
from mini_ht.kernels import reference

# Added to the variance, as in the released code's framework: a channel that hardly ever fires is not blown up to unit
# variance.
NORM_EPS = 1e-3

IMPLEMENTATIONS = ("reference", "torch")


def implementation(impl: str, x: Array) -> Any:
    """The module that computes on `x`: by its name, or with "auto" the one of x's own library.

    Raises InputError for an unknown name or one that cannot compute on arrays of this library.
    """
    own = "reference" if isinstance(x, np.ndarray) else "torch"
    name = own if impl == "auto" else impl
    if name not in IMPLEMENTATIONS:
        raise InputError(f"impl is {impl!r}; choose auto, {', '.join(IMPLEMENTATIONS)}")
    if name != own:
        raise InputError(f"impl {name!r} cannot compute on a {type(x).__name__}; convert it, or use impl='auto'")
    if name == "reference":
        return reference
    from mini_ht.kernels import torch_conv  # here, as torch need not be installed

    return torch_conv


def conv2d(x: Array, weight: Array, bias: Array, stride: int = 1, padding: int = 0, impl: str = "auto") -> Array:
    """One weight for all images: x [B, H, W, Cin], weight [k, k, Cin, Cout], bias [Cout] -> [B, H', W', Cout].

    H' = (H + 2 padding - k) // stride + 1.
    """
    return implementation(impl, x).conv2d(x, weight, bias, stride, padding)


def conv_block(
    x: Array,
    weight: Array,
    gamma: Array,
    beta: Array,
    *,
    bias: Array | None = None,
    statistics: tuple[Array, Array] | None = None,
    mask: Array | None = None,
    slope: float = 0.0,
    impl: str = "auto",
) -> tuple[Array, tuple[Array, Array]]:
    """conv 3x3 'same' -> (leaky) ReLU -> 2x2 max-pool (valid) -> batch norm, with other weights for every episode.

    Args:
        x: [E, N, H, W, Cin], H and W at least 2; on torch it may be bfloat16 where the rest is float32.
        weight: [E, 3, 3, Cin, Cout].
        gamma, beta: [Cout], scale and offset of the norm, shared by all episodes.
        bias: [E, Cout], added before the activation; None for none.
        statistics: (mean, variance), each [E, Cout], to normalise with; None takes those of this very pass.
        mask: [E, N], True for the images that count in the statistics; None counts all.
        slope: slope of the activation for negative inputs, in [0, 1).
        impl: "auto", "reference" (NumPy) or "torch".

    Returns:
        ([E, N, H // 2, W // 2, Cout], the (mean, variance) that were used).
    """
    computer = implementation(impl, x)
    pooled = computer.conv_max_pool(x, weight)  # [E, N, H // 2, W // 2, Cout]
    # The activation never decreases, so it may come after the pool, where there is a quarter of the values.
    if bias is not None:
        pooled = pooled + as_floats(bias, x)[:, None, None, None, :]
    active = namespace(x).where(pooled > 0, pooled, slope * pooled) if slope else relu(pooled)
    if statistics is None and mask is None:
        return computer.batch_norm(active, gamma, beta, NORM_EPS)
    active = as_floats(active, gamma)
    mean, variance = statistics or masked_statistics(active, mask)
    scale = gamma * (variance + NORM_EPS) ** -0.5  # [E, Cout]
    shift = beta - mean * scale  # [E, Cout]
    normal = active * scale[:, None, None, None, :] + shift[:, None, None, None, :]
    return as_floats(normal, x), (mean, variance)


def masked_statistics(x: Array, mask: Array) -> tuple[Array, Array]:
    """Mean and variance of each channel over the images that count: x [E, N, h, w, C], mask [E, N] -> two of [E, C]."""
    counts = as_floats(mask, x)  # [E, N]
    share = counts / (counts.sum(-1)[:, None] * (x.shape[2] * x.shape[3]))  # [E, N], sums to 1 over all values
    share = share[:, :, None, None, None]
    mean = (x * share).sum((1, 2, 3))  # [E, C]
    return mean, ((x - mean[:, None, None, None, :]) ** 2 * share).sum((1, 2, 3))
