"""Which form, tile and number of warps a kernel gets: one table, by channels and bytes of a value.

Chosen so that nets of one width compile without spilling registers (`python -m mini_ht.kernels.compile_report`). A list
in the file that MINI_HT_TILES names, made for one GPU by `python -m mini_ht.kernels.tune`, goes before the table.
"""

import functools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mini_ht.errors import InputError

LIST = "MINI_HT_TILES"

LARGEST = 64  # channels
KEPT = 256  # Cin * Cout of the largest window whose weights, 64 times as many, stay in shared memory: 64 KiB of float32
# For a GPU of 132 multiprocessors: six programs of a launch for each, or eight warps where every program leaves much.
PROGRAMS, WARPS = 6 * 132, 8 * 132
MOST_PARTS, FEW_BYTES = 32, 2**22  # programs of an episode, a power of two, as readers add them up; what is not much

# Where triton 3.6 or 3.9 spills a few registers or has some left, on compute capability 9 (True) or before it.
SPARED: dict[tuple[bool, str, str, int, int], dict[str, Any]] = {
    (False, "half", "forward", 32, 32): {"pixels": 1, "warps": 8},
    (False, "half", "input", 32, 32): {"pixels": 1, "warps": 8},
    (False, "half", "forward", 64, 64): {"windows": 32},
    (False, "half", "weight", 16, 16): {"windows": 32},
    (False, "half", "weight", 32, 32): {"windows": 32},
    (False, "tf32", "forward", 64, 64): {"windows": 32},
    (False, "tf32", "input", 32, 32): {"windows": 128},
    (True, "half", "weight", 32, 32): {"pixels": 8},
    (True, "tf32", "weight", 32, 32): {"pixels": 8},
    (False, "bf16x3", "forward", 8, 8): {"pixels": 8},
    (True, "bf16x3", "forward", 4, 8): {"pixels": 8},
    (True, "bf16x3", "input", 64, 64): {"windows": 64},
    (False, "bf16x3", "forward", 64, 64): {"windows": 16, "warps": 4},
    (True, "bf16x3", "forward", 16, 16): {"pixels": 8},
    (True, "bf16x3", "forward", 64, 64): {"windows": 16, "warps": 4},
    (True, "ieee", "input", 64, 64): {"windows": 16},
}


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work; `inputs` and `outputs` are channels padded to powers of two."""

    form: str  # "window": one product for the four places of a pooling window; "taps": one for each tap
    inputs: int
    outputs: int
    windows: int  # BM, pooling windows of a tile
    pixels: int  # of the 4 x 4 that a window sees, how many make one product; taps: 16 if each is read only once
    warps: int
    stages: int = 1


def padded(channels: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (channels - 1).bit_length())


def read_channels(channels: int) -> int:
    """Channels of images as the kernels read them: from three on whole words of memory, multiples of four."""
    return channels if channels <= 2 else -(-channels // 4) * 4


def job_key(job: str, inputs: int, outputs: int, dtype: str, precision: str) -> str:
    """The name of a job in a list of tiles; only float32 has products of several precisions."""
    return f"{job} {inputs}-{outputs} {dtype}" + (f" {precision}" if dtype == "float32" else "")


@functools.cache
def listed(file: str) -> dict[str, Tile]:
    """The tiles of a list; InputError for a file that cannot be read or holds something else."""
    try:
        return {key: Tile(**fields) for key, fields in json.loads(Path(file).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{LIST} names {file}, which is no list of tiles ({error}); make one with "
                         "'python -m mini_ht.kernels.tune', or unset it") from error  # fmt: skip


def candidates(tile: Tile) -> list[Tile]:
    """What a search tries beside a tile: more and fewer windows, warps and stages."""
    windows = [count for count in (tile.windows // 2, tile.windows, 2 * tile.windows) if 16 <= count <= 256]
    found = [replace(tile, windows=w, warps=n, stages=s) for w in windows for n in (4, 8) for s in (1, 2)]
    return [other for other in found if other != tile]


def choose(job: str, inputs: int, outputs: int, dtype: str, precision: str, hopper: bool = True) -> Tile:
    """The tile of a job, "forward", "input" or "weight", for float16, bfloat16 or float32 values.

    hopper: compute capability 9 or more, where tensor cores read their operands from shared memory.
    """
    if os.environ.get(LIST) and (
        found := listed(os.environ[LIST]).get(job_key(job, inputs, outputs, dtype, precision))
    ):
        return found
    tile = {"forward": forward_tile, "input": input_tile, "weight": weight_tile}[job](inputs, outputs)
    kind = "half" if dtype != "float32" else precision
    spared = SPARED.get((hopper, kind, job, tile.inputs, tile.outputs), {})
    if dtype == "float32":
        tile = for_float32(tile, precision, job)
    elif not hopper and job == "weight" and tile.inputs * tile.outputs > 1024:
        tile = replace(tile, windows=16)
    if hopper and job != "weight" and tile.form == "window" and kind in ("half", "tf32"):
        tile = replace(tile, warps=4)
    return replace(tile, **spared)


def for_float32(tile: Tile, precision: str, job: str) -> Tile:
    """Twice the bytes, fewer windows; three products need more registers, and FMAs one for every operand."""
    size = tile.inputs * tile.outputs
    if tile.form == "taps" and precision == "ieee":
        many = size >= (1024 if job == "input" else 2048)
        return replace(tile, windows=32 if job == "input" and many else 16, pixels=1, warps=8 if many else 4)
    if tile.form == "taps":  # to read each pixel once would spill
        half = precision == "bf16x3" and (size > 1024 or job == "weight")
        return replace(tile, windows=(32 if job == "weight" else 64) // (1 + half), pixels=1, warps=8)
    if precision == "ieee":
        warps = 4 if job != "weight" and (tile.inputs == 16 or tile.outputs == 32) else 8
        least = 16 // tile.outputs if job == "input" else 2  # triton 3.6 wants products over 16 values or more
        return replace(tile, windows=16, pixels=min(16, max(2, 32 // tile.inputs, least)), warps=warps)
    if precision == "bf16x3":
        warps = 8 if job == "input" else 4 if tile.inputs == tile.outputs == 16 and job == "forward" else tile.warps
        return replace(tile, windows=min(32, max(16, tile.windows // 4)), warps=warps)
    pixels = 2 if job == "input" and tile.inputs == tile.outputs == 16 else tile.pixels
    most = 64 if max(tile.inputs, tile.outputs) <= 16 else 32  # 64 are the least that make a wgmma
    return replace(tile, windows=min(most, tile.windows), pixels=pixels)


def taps_tile(inputs: int, outputs: int) -> Tile:
    """Tap by tap; up to 32 channels each pixel is read once, for all four places of a window."""
    cin, cout = padded(inputs, 16), padded(outputs, 16)
    return Tile("taps", cin, cout, 64, 16, 4) if max(cin, cout) <= 32 else Tile("taps", cin, cout, 64, 1, 8)


def forward_tile(inputs: int, outputs: int) -> Tile:
    """Few input channels make a window's 4 x 4 pixels one row of 16 * Cin; many are multiplied tap by tap."""
    cin, cout = padded(inputs, 1), padded(outputs, 4)
    if inputs > 16 or cin * cout > KEPT:
        return taps_tile(inputs, outputs)
    light = cout <= 16 and cin <= 8
    return Tile("window", cin, cout, 128 if light else 64, 16 if cin <= 2 else 4, 4 if light else 8)


def input_tile(inputs: int, outputs: int) -> Tile:
    """The conv of the gradient: outputs and inputs change places."""
    cin, cout = padded(inputs, 4), padded(outputs, 4)
    if outputs > 16 or cin * cout > KEPT:
        return taps_tile(inputs, outputs)
    return Tile("window", cin, cout, 64, 4, 4 if cin * cout <= 64 else 8)


def weight_tile(inputs: int, outputs: int) -> Tile:
    """The accumulators are the weight's gradient itself, in registers throughout; of many channels a third of it."""
    if inputs > 16:
        cin, cout = padded(inputs, 16), padded(outputs, 16)
        return Tile("window", cin, cout, 64, 4, 8) if cin * cout <= 1024 else Tile("taps", cin, cout, 32, 16, 4)
    cin, cout = padded(inputs, 1), padded(outputs, 4)
    windows = {8: 128, 16: 256, 32: 128}.get(cout, 64) if cin == 1 else 64
    return Tile("window", cin, cout, windows, 16 if cin * cout <= 256 else 4, 4 if cin * cout <= 64 else 8)


def reciprocal(divisor: int) -> tuple[int, int, int]:
    """(d, f, s) with n // d == n * f >> s for 0 <= n < 2^31; f is below 2^32."""
    shift = 31 + (divisor - 1).bit_length()
    return divisor, -(-(1 << shift) // divisor), shift


def share_out(total: int, windows: int, episodes: int, programs: int) -> tuple[int, int]:
    """(programs of an episode, tiles of each) for `total` windows, about `programs` in all, every one with work."""
    tiles = -(-total // windows)
    each = max(1, -(-tiles * episodes // programs), -(-tiles // MOST_PARTS))
    return -(-tiles // each), each


def weight_programs(tile: Tile, chunks: int, size: int) -> int:
    """How many programs share a weight's gradient, each of which leaves `size` float32 values in `chunks`."""
    return min(PROGRAMS, max(WARPS // (tile.warps * chunks), FEW_BYTES // (4 * size)))
