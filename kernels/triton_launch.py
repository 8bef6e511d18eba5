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
from mini_ht.kernels.tiles import PROGRAMS, Tile, choose, padded, share_out

MULTIPLIED = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
WIDEST = 2**31 - 1  # values of an episode that 32-bit offsets reach


@dataclass(frozen=True)
class Block:
    """What a block leaves for the next one and for the backward pass."""

    mean: Tensor  # [E, C]
    variance: Tensor  # [E, C]
    scale: Tensor  # [E, C], the norm as p * scale + shift
    shift: Tensor  # [E, C]
    p: Tensor  # [E, N, h, w, C], pooled values before the norm
    code: Tensor  # [E, N, h, w, C] int8: the place that won, + 4 if its value is positive


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 1, **constants: Any) -> None:
    """One launch, on the device of the first argument."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def constants(tile: Tile, inputs: int, outputs: int, precision: str, x: Tensor, p: Tensor) -> dict[str, Any]:
    """What the three matrix kernels are compiled for."""
    return {
        "CI": inputs,
        "CO": outputs,
        "CIP": tile.inputs,
        "COP": tile.outputs,
        "BM": tile.windows,
        "PIXELS": tile.pixels,
        "WIDE": max(x[0].numel(), p[0].numel()) * 2 > WIDEST,
        "PRECISION": precision,
        "DT": MULTIPLIED[x.dtype],
        "warps": tile.warps,
        "stages": tile.stages,
    }


def choose_for(job: str, x: Tensor, p: Tensor, precision: str) -> Tile:
    """The tile of a job between an input x [..., Cin] and its pooled outputs p [..., Cout]."""
    hopper = not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] >= 9
    return choose(job, x.shape[-1], p.shape[-1], str(x.dtype).removeprefix("torch."), precision, hopper)


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    biases: Sequence[Tensor],
    statistics: Sequence[Tensor],
    slope: float,
    eps: float,
    precision: str,
) -> tuple[Tensor, list[Block]]:
    """Two launches a block, and one for the last norm. statistics: all means, then all variances, or nothing."""
    count, own = len(weights), not statistics
    blocks: list[Block] = []
    source, scale, shift = x, x, x  # images come without a norm to apply
    for k, weight in enumerate(weights):
        episodes, images, height, width, inputs = source.shape
        outputs = weight.shape[-1]
        p = source.new_empty(episodes, images, height // 2, width // 2, outputs)
        code = torch.empty_like(p, dtype=torch.int8)
        tile = choose_for("forward", source, p, precision)
        total = p[0, ..., 0].numel()  # windows of an episode
        programs, tiles = share_out(total, tile.windows, episodes, PROGRAMS)
        parts = p.new_empty(episodes, programs, 2, outputs, dtype=torch.float32)
        kernel = triton_forward.forward_window if tile.form == "window" else triton_forward.forward_taps
        run(
            kernel, (programs, episodes), source, scale, shift, weight, biases[k] if biases else source, p, code, parts,
            images, height, width, tiles, slope, AFFINE=k > 0, BIAS=bool(biases), OWN=own,
            **constants(tile, inputs, outputs, precision, source, p),
        )  # fmt: skip
        source = p
        # Results of an op must not share memory, so each is allocated by itself.
        mean, variance, scale, shift = (gammas[k].new_empty(episodes, outputs) for _ in range(4))
        if not own:
            mean, variance = statistics[k], statistics[count + k]
        run(
            triton_forward.merge_statistics, (episodes,), parts, gammas[k], betas[k], mean, variance, scale, shift,
            total, programs, tiles * tile.windows, eps, CO=outputs, COP=padded(outputs, 1), BS=32, OWN=own,
        )  # fmt: skip
        blocks.append(Block(mean, variance, scale, shift, p, code))
    y = torch.empty_like(source)
    size = source[0].numel()
    run(
        triton_forward.apply_norm, (triton.cdiv(size, 1024), source.shape[0]), source, scale, shift, y, size,
        C=source.shape[-1], BLOCK=1024, WIDE=size * 2 > WIDEST,
    )  # fmt: skip
    return y, blocks
