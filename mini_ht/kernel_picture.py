"""A picture of a network's kernels, with Pillow alone."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mini_ht.files import write_atomically
from mini_ht.folded import FoldedCNN

PIXEL, GAP = 6, 3  # pixels of the picture for a weight, and between kernels
LOW, HIGH = np.array([0, 114, 178]), np.array([213, 94, 0])  # blue for the least, orange for the largest; 0 is white


def draw_network(network: FoldedCNN, file: Path) -> None:
    """Write a PNG: the blocks one above the other, in each a row of kernels for every input channel.

    A block's colours reach to its largest weight: blue below 0, orange above.
    """
    parts = [block_picture(network.arrays[f"{name}.weight"]) for name in network.blocks]
    width = max(part.shape[1] for part in parts)
    space = np.full((4 * GAP, width, 3), 255, np.uint8)
    wide = [np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0)), constant_values=255) for part in parts]
    rows = [row for part in wide for row in (part, space)][:-1]
    Image.fromarray(np.concatenate(rows)).save(packed := io.BytesIO(), "PNG")
    write_atomically(file, packed.getvalue())


def block_picture(weight: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Weights [k, k, Cin, Cout] -> RGB picture, a row for each input channel and a column for each output channel."""
    k, _, inputs, outputs = weight.shape
    share = (weight / max(np.abs(weight).max(), 1e-30))[..., None]  # in [-1, 1]
    colours = 255 + np.maximum(share, 0) * (HIGH - 255) + np.maximum(-share, 0) * (LOW - 255)  # [k, k, Cin, Cout, 3]
    large = np.rint(colours).astype(np.uint8).repeat(PIXEL, 0).repeat(PIXEL, 1)
    tiles = np.pad(large, ((0, GAP), (0, GAP), (0, 0), (0, 0), (0, 0)), constant_values=255)
    side = k * PIXEL + GAP
    return tiles.transpose(2, 0, 3, 1, 4).reshape(inputs * side, outputs * side, 3)
