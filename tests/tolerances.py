"""How close two results must be: one table by dtype, and one measure of error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mini_ht.kernels import NORM_EPS

# Largest relative error, max |a - b| / max |b|.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# The Triton kernels against float64, a block or a small stack. Named by what is rounded: the stored values, or float32
# products ("ieee" not at all).
TRITON_TOLERANCE = {"float32": 1e-5, "ieee": 1e-5, "bf16x3": 1e-4, "tf32": 2e-3, "float16": 1e-3, "bfloat16": 2e-2}
# What counts as different, where a law says that something must change.
DIFFERENT = 1e-6


def as_numpy(x: Any) -> np.ndarray:
    """NumPy arrays and torch tensors, as float64."""
    return np.asarray(x.detach().cpu().double() if hasattr(x, "detach") else x, dtype=np.float64)


def relative_error(a: Any, b: Any) -> float:
    """max |a - b| / max |b| of two equally shaped arrays; the same infinities, such as absent classes, agree."""
    a, b = as_numpy(a), as_numpy(b)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    assert not np.isnan(a).any() and not np.isnan(b).any(), "NaN"
    infinite = np.isinf(a) | np.isinf(b)
    assert (a[infinite] == b[infinite]).all(), "infinite in one, not in the other"
    a, b = a[~infinite], b[~infinite]
    difference, scale = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
    return float(difference / scale if scale else difference)


def assert_close(a: Any, b: Any, dtype: str = "float64", what: str = "") -> None:
    """Relative error within the table's tolerance for the dtype."""
    error = relative_error(a, b)
    assert error <= TOLERANCE[dtype], f"{what} relative error {error:.1e}, allowed {TOLERANCE[dtype]:.0e} in {dtype}"


def assert_all_close(a: Mapping[str, Any], b: Mapping[str, Any], dtype: str = "float64") -> None:
    """The same names, and every pair close."""
    assert a.keys() == b.keys()
    for name in b:
        assert_close(a[name], b[name], dtype, name)


def assert_different(a: Any, b: Any, what: str = "") -> None:
    """Different by more than rounding."""
    error = relative_error(a, b)
    assert error > DIFFERENT, f"{what} should differ; relative error {error:.1e}"


def contents(cnn: Any) -> dict[str, np.ndarray]:
    """Everything that a GeneratedCNN computes with, by name, as NumPy arrays."""
    arrays = {"logits": cnn.logits_weight, "present": cnn.present}
    for number, conv in enumerate(cnn.convs, start=1):
        arrays |= {f"conv{number}": conv.weight, f"mean{number}": conv.statistics[0]}
        # As it is used: a channel that never fires has variance 0, give or take the rounding of NORM_EPS.
        arrays |= {f"variance{number}": conv.statistics[1] + NORM_EPS}
        arrays |= {} if conv.bias is None else {f"bias{number}": conv.bias}
        arrays |= (
            {} if conv.affine is None else dict(zip((f"scale{number}", f"offset{number}"), conv.affine, strict=True))
        )
    return {name: as_numpy(array) for name, array in arrays.items()}
