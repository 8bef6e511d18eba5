"""The self-contained network: a generated CNN with its support statistics folded in, for the classes of one task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_ht.cnn import GeneratedCNN
from mini_ht.errors import InputError
from mini_ht.kernels import NORM_EPS, reference

Floats = NDArray[np.floating]
PRECISIONS = ("float32", "float16", "int8")  # of the numbers in a file
INT8 = 127  # whole numbers go from -127 to 127


@dataclass(frozen=True)
class FoldedCNN:
    """A few arrays that classify one image alone; calling it gives logits.

    arrays: for each block, from 1, `conv1.weight` [3, 3, Cin, Cout], `conv1.bias` [Cout] if biases were generated, and
    `conv1.scale` and `conv1.shift` [Cout], behind activation and pool; `logits.weight` [way, F], `logits.bias` [way].
    """

    arrays: Mapping[str, Floats]
    slope: float
    image_shape: tuple[int, ...]  # (H, W, C)

    def __call__(self, images: Floats) -> Floats:
        """Logits [m, way] of images [m, H, W, C] in [0, 1]; an image's logits do not depend on the others.

        Raises InputError for images of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise InputError(f"images have shape {list(images.shape)}; wanted [m, H, W, C] of {list(self.image_shape)}")
        arrays = self.arrays
        x = images.astype(arrays["logits.weight"].dtype, copy=False)[None]  # [1, m, H, W, C]
        for name in self.blocks:
            x = reference.conv_max_pool(x, arrays[f"{name}.weight"][None])  # [1, m, H // 2, W // 2, Cout]
            x = x + arrays[f"{name}.bias"] if f"{name}.bias" in arrays else x
            x = np.maximum(x, self.slope * x) * arrays[f"{name}.scale"] + arrays[f"{name}.shift"]
        return x.reshape(len(images), -1) @ arrays["logits.weight"].T + arrays["logits.bias"]

    @property
    def blocks(self) -> list[str]:
        """Names of the conv blocks, in order."""
        return [f"conv{k}" for k in range(1, len(self.arrays)) if f"conv{k}.weight" in self.arrays]

    @property
    def way(self) -> int:
        """How many classes it tells apart."""
        return len(self.arrays["logits.bias"])

    @property
    def size(self) -> int:
        """How many numbers it consists of."""
        return sum(array.size for array in self.arrays.values())

    def stored(self, precision: str) -> dict[str, NDArray[Any]]:
        """The arrays as a file holds them; `restored` leads back.

        precision: "float32", "float16", or "int8", where weights become whole numbers and `<name>.step` says what 1 is
        worth: another step for each channel or class, [1, 1, 1, Cout] or [way, 1] float32, like all other arrays.
        """
        if precision != "int8":
            return {name: array.astype(precision) for name, array in self.arrays.items()}
        found: dict[str, NDArray[Any]] = {}
        for name, array in self.arrays.items():
            found[name] = array.astype(np.float32)
            if name.endswith(".weight"):
                largest = abs(found[name]).max((0, 1, 2) if array.ndim == 4 else 1, keepdims=True)
                step = np.where(largest > 0, largest / np.float32(INT8), np.float32(1))
                found |= {name: np.rint(found[name] / step).astype(np.int8), f"{name}.step": step}
        return found

    def rounded(self, precision: str) -> FoldedCNN:
        """The same with every number rounded as a file holds it; it still computes in float32."""
        return dataclasses.replace(self, arrays=restored(self.stored(precision)))


def restored(stored: Mapping[str, NDArray[Any]]) -> dict[str, Floats]:
    """The float32 arrays of a FoldedCNN from what `stored` gave."""
    single = {name: array.astype(np.float32) for name, array in stored.items()}
    return {
        name: array * single[f"{name}.step"] if f"{name}.step" in single else array
        for name, array in single.items()
        if not name.endswith(".step")
    }


def fold(cnn: GeneratedCNN, classes: int, episode: int = 0) -> FoldedCNN:
    """One task's network: norms become a scale and a shift a channel, and only the first `classes` classes stay.

    cnn is a NumPy one, made by `generate`; what it computes with norm "support" is what the FoldedCNN computes.
    """
    arrays: dict[str, Floats] = {}
    for number, conv in enumerate(cnn.convs, start=1):
        mean, variance = (part[episode] for part in conv.statistics)  # [Cout] each
        scale = conv.gamma / np.sqrt(variance + NORM_EPS)
        shift = conv.beta - mean * scale  # [Cout]
        if conv.affine is not None:
            more, offset = (part[episode] for part in conv.affine)  # [Cout] each
            scale, shift = scale * (1 + more), shift * (1 + more) + offset
        arrays[f"conv{number}.weight"] = conv.weight[episode]
        if conv.bias is not None:
            arrays[f"conv{number}.bias"] = conv.bias[episode]
        arrays |= {f"conv{number}.scale": scale, f"conv{number}.shift": shift}
    logits = cnn.logits_weight[episode, :classes]  # [classes, F + 1]
    arrays |= {"logits.weight": logits[:, :-1], "logits.bias": logits[:, -1]}
    dtype = logits.dtype
    arrays = {name: np.ascontiguousarray(array.astype(dtype, copy=False)) for name, array in arrays.items()}
    return FoldedCNN(arrays, cnn.slope, cnn.image_shape)
