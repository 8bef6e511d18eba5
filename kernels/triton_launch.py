"""Triton, host side: how a kernel is launched, and the forward pass of a stack."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_ht.kernels import triton_forward
from mini_ht.kernels.tiles import PROGRAMS, Tile, choose, padded, reciprocal, share_out

MULTIPLIED = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
WIDEST = 2**31 - 1  # values of an episode that 32-bit offsets reach
ROWS = 64  # of a tile where values are only read, added and written


@dataclass(frozen=True)
class Block:
    """What a block leaves for the next one and for the backward pass."""

    mean: Tensor  # [E, C]
    variance: Tensor  # [E, C]
    p: Tensor  # [E, N, h, w, C], pooled values before the norm
    code: Tensor  # [E, N, h, w, C] int8: one of four bits, the place that won, + 16 if it is positive


def compiler_options(warps: int, stages: int) -> dict[str, Any]:
    """What a kernel is compiled with; no default of triton decides."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 1, **constants: Any) -> None:
    """One launch, on the device of the first argument."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, **compiler_options(warps, stages))


def hopper(device: torch.device) -> bool:
    """Whether tensor cores read operands from shared memory: compute capability 9 and 10, not 12; and without a GPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def constants(tile: Tile, inputs: int, outputs: int, precision: str, x: Tensor, p: Tensor) -> dict[str, Any]:
    """What the three matrix kernels are compiled for."""
    wide = max(x[0].numel(), p[0].numel()) * 2 > WIDEST
    return dict(
        CI=inputs, CO=outputs, CIP=tile.inputs, COP=tile.outputs, BM=tile.windows, PIXELS=tile.pixels,
        WINDOW=tile.form == "window", WIDE=wide, PRECISION=precision, DT=MULTIPLIED[x.dtype], warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip


def walk(images: int, height: int, width: int, odd: bool = False) -> tuple[Any, ...]:
    """N, H, W, pooling windows of an image and of a row as reciprocals; odd: one more where a pixel is left over."""
    rows, columns = (height + odd) // 2, (width + odd) // 2
    return images, height, width, reciprocal(rows * columns), reciprocal(columns)


def choose_for(job: str, x: Tensor, p: Tensor, precision: str) -> Tile:
    """The tile of a job between an input x [..., Cin] and its pooled outputs p [..., Cout]."""
    dtype = str(x.dtype).removeprefix("torch.")
    return choose(job, x.shape[-1], p.shape[-1], dtype, precision, hopper(x.device))


def forward(
    x: Tensor, weights: Sequence[Tensor], gammas: Sequence[Tensor], betas: Sequence[Tensor],
    biases: Sequence[Tensor], statistics: Sequence[Tensor], slope: float, eps: float, precision: str,
) -> tuple[Tensor, list[Block]]:  # fmt: skip
    """One launch a block, and one for the last norm. statistics: all means, then all variances, or nothing."""
    count, own = len(weights), not statistics
    blocks: list[Block] = []
    source, before, programs, windows = x, (x,) * 5, 0, 0  # images come without a norm to apply
    for k, weight in enumerate(weights):
        episodes, images, height, width, inputs = source.shape
        outputs = weight.shape[-1]
        p = source.new_empty(episodes, images, height // 2, width // 2, outputs)
        code = torch.empty_like(p, dtype=torch.int8)
        tile = choose_for("forward", source, p, precision)
        size, tiles = share_out(p[0, ..., 0].numel(), tile.windows, episodes, PROGRAMS)
        parts = p.new_empty(episodes, size, 2, outputs, dtype=torch.float32)
        run(
            triton_forward.forward, (size, episodes), source, before, programs, windows, weight,
            biases[k] if biases else source, p, code, parts, *walk(images, height, width), tiles, slope, eps,
            AFFINE=k > 0, BIAS=bool(biases), OWN=own, **constants(tile, inputs, outputs, precision, source, p),
        )  # fmt: skip
        # Results of an op must not share memory, so each is allocated by itself.
        mean, variance = (gammas[k].new_empty(episodes, outputs) for _ in range(2))
        if not own:
            mean, variance = statistics[k], statistics[count + k]
        blocks.append(Block(mean, variance, p, code))
        source, before, programs, windows = p, (parts, gammas[k], betas[k], mean, variance), size, tiles * tile.windows
    y = torch.empty_like(source)
    episodes, total, outputs = len(y), y[0, ..., 0].numel(), y.shape[-1]
    run(
        triton_forward.apply_norm, (triton.cdiv(total, ROWS), episodes), source, before, programs, windows, y, total,
        eps, C=outputs, CP=padded(outputs, 1), BM=ROWS, OWN=own, WIDE=y[0].numel() * 2 > WIDEST,
    )  # fmt: skip
    return y, blocks
