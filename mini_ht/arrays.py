"""One vocabulary for NumPy and torch: the model is written in the names that both libraries share."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

# An np.ndarray or a torch.Tensor; which one is decided by the caller and kept by every function.
Array = Any
Parameters = Mapping[str, Array]  # by name
Mask = Array | None  # of booleans, True for what counts; None where all does


def namespace(x: Array) -> Any:
    """The library that `x` belongs to: `numpy` for an ndarray, `torch` for a tensor.

    torch is looked up among the loaded modules: whoever holds a tensor has imported it, and whoever does not need not
    have it installed.
    """
    return np if isinstance(x, np.ndarray) else sys.modules["torch"]


def fused(x: Array) -> Any:
    """torch.nn.functional for a tensor, None for an ndarray: torch has as one call what NumPy spells out."""
    return None if isinstance(x, np.ndarray) else sys.modules["torch"].nn.functional


def as_floats(x: Array, like: Array) -> Array:
    """Numbers or booleans in the floating dtype of `like` (NumPy and torch spell the cast differently)."""
    return x.astype(like.dtype, copy=False) if isinstance(x, np.ndarray) else x.to(like.dtype)


def as_indices(labels: Array) -> Array:
    """Integers of any width as int64: torch takes smaller ones for masks, or refuses them."""
    return labels.astype(np.int64) if isinstance(labels, np.ndarray) else labels.long()


def belongs(labels: Array, way: int, mask: Mask = None) -> Array:
    """Which image is of which class: labels and mask [..., n] -> booleans [..., n, way]; unlabelled ones of none."""
    same = labels[..., None] == namespace(labels).arange(way, device=labels.device)  # [..., n, way]
    return same if mask is None else same & mask[..., None]


def relu(x: Array, slope: float = 0.0) -> Array:
    """max(x, slope x) with 0 <= slope < 1, a leaky ReLU above 0; the gradient at 0 is the slope."""
    if torch_functions := fused(x):
        return torch_functions.leaky_relu(x, slope) if slope else x.relu()
    return np.maximum(x, slope * x if slope else 0)
