"""Triton, host side of the backward pass: three launches a block, and three more."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mini_ht.kernels import triton_backward, triton_weights
from mini_ht.kernels.tiles import PROGRAMS, WEIGHT_PROGRAMS, Tile, padded, share_out
from mini_ht.kernels.triton_launch import WIDEST, Block, choose_for, constants, run

ROWS = 128  # of a tile where values are only read and added


def last_sums(g: Tensor, last: Block, eps: float) -> Tensor:
    """Sums of g and g * n over the last block's output, by program: [E, programs, 2, C]."""
    episodes, channels, total = g.shape[0], g.shape[-1], g[0, ..., 0].numel()
    programs, tiles = share_out(total, ROWS, episodes, PROGRAMS)
    sums = last.mean.new_empty(episodes, programs, 2, channels)
    run(
        triton_backward.output_sums, (programs, episodes), g, last.p, last.mean, last.variance, sums, total, tiles, eps,
        C=channels, CP=padded(channels, 1), BM=ROWS, WIDE=g[0].numel() * 2 > WIDEST,
    )  # fmt: skip
    return sums


class Backward:
    """The backward pass of a stack: what it was called with, and the kernels in their order."""

    def __init__(
        self,
        g: Tensor,
        g_statistics: Sequence[Tensor],
        x: Tensor,
        weights: Sequence[Tensor],
        gammas: Sequence[Tensor],
        biases: Sequence[Tensor],
        blocks: Sequence[Block],
        own: bool,
        options: tuple[float, float, str],
    ) -> None:
        self.g, self.g_statistics, self.x, self.weights, self.gammas = g, g_statistics, x, weights, gammas
        self.biases, self.blocks, self.own = biases, blocks, own
        self.slope, self.eps, self.precision = options
        self.d_weights = [torch.empty_like(weight) for weight in weights]
        self.d_biases = [torch.empty_like(bias) for bias in biases]
        self.d_given = [] if own else [b.mean.new_empty(len(x), 2, b.mean.shape[1]) for b in blocks]
        # Gradients of gammas and betas by episode, one buffer that one launch can sum: [blocks, 2, E, widest].
        widest = max(weight.shape[-1] for weight in weights)
        self.totals = blocks[0].mean.new_empty(len(weights), 2, len(x), widest)
        # The norm's backward as da = a * g + b * p + c, for each block [E, 3, C].
        self.factors = [b.mean.new_empty(len(x), 3, b.mean.shape[1]) for b in blocks]

    def __call__(self, wants_x: bool) -> list[Tensor]:
        """Sums for gammas and betas [blocks, 2, widest], dw, db, d_statistics [E, 2, C], and dx if wanted."""
        count = len(self.blocks)
        self.finish(count - 1, last_sums(self.g, self.blocks[-1], self.eps), None)
        g = self.g
        for k in reversed(range(count)):
            parts = self.weight_parts(k, g)
            sums = None
            if k or wants_x:
                g, sums = self.input_gradient(k, g)
            self.finish(k - 1, sums, parts)
        results = [self.totals.sum(2), *self.d_weights, *self.d_biases, *self.d_given]
        return [*results, g] if wants_x else results

    def source(self, k: int) -> Tensor:
        """What block k read: images, or the pooled values before it, without their norm."""
        return self.blocks[k - 1].p if k else self.x

    def weight_parts(self, k: int, g: Tensor) -> tuple[Tensor, Tensor, Tile]:
        """Programs' shares of dw and db of block k."""
        x, block, before = self.source(k), self.blocks[k], self.blocks[k - 1]
        episodes, images, height, width, inputs = x.shape
        outputs = block.p.shape[-1]
        tile = choose_for("weight", x, block.p, self.precision)
        window = tile.form == "window"
        chunks = 16 // tile.pixels if window else 3
        programs, tiles = share_out(block.p[0, ..., 0].numel(), tile.windows, episodes, WEIGHT_PROGRAMS)
        size = (64 if window else 9) * tile.inputs * tile.outputs
        dw = block.mean.new_empty(episodes, programs, size)
        db = block.mean.new_empty(episodes, programs, outputs if self.biases else 0)
        run(
            triton_weights.weight_window if window else triton_weights.weight_taps, (programs, episodes, chunks),
            x, before.scale if k else x, before.shift if k else x, g, block.p, block.code, self.factors[k], dw, db,
            images, height, width, tiles, self.slope, AFFINE=k > 0, BIAS=bool(self.biases), OWN=self.own,
            **constants(tile, inputs, outputs, self.precision, x, block.p),
        )  # fmt: skip
        return dw, db, tile

    def input_gradient(self, k: int, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """dx of block k, and by program the sums that the block before wants of it: [E, programs, 2, Cin]."""
        x, block, before = self.source(k), self.blocks[k], self.blocks[k - 1]
        episodes, images, height, width, inputs = x.shape
        tile = choose_for("input", x, block.p, self.precision)
        total = images * ((height + 1) // 2) * ((width + 1) // 2)
        programs, tiles = share_out(total, tile.windows, episodes, PROGRAMS)
        dx = torch.empty_like(x)
        sums = block.mean.new_empty(episodes, programs, 2, inputs) if k else None
        kernel = triton_backward.input_window if tile.form == "window" else triton_backward.input_taps
        run(
            kernel, (programs, episodes), g, block.p, block.code, self.factors[k], self.weights[k], x, before.mean,
            before.variance, dx, dx if sums is None else sums, images, height, width, tiles, self.slope, self.eps,
            OWN=self.own, SUMS=k > 0, **constants(tile, inputs, block.p.shape[-1], self.precision, x, block.p),
        )  # fmt: skip
        return dx, sums

    def finish(self, k: int, sums: Tensor | None, parts: tuple[Tensor, Tensor, Tile] | None) -> None:
        """dw and db of block k + 1 from its parts, and the factors of block k from its sums, where there are any."""
        has_sums, has_parts = sums is not None, parts is not None
        dummy = self.totals
        dw_parts, db_parts, tile = parts or (dummy, dummy, Tile("taps", 1, 1, 1, 1, 1))
        after = self.weights[k + 1] if has_parts else None
        inputs, outputs = (after.shape[3], after.shape[4]) if after is not None else (1, 1)
        at = max(k, 0)
        before, count = self.blocks[at], len(self.blocks)
        channels = before.mean.shape[1]
        used = bool(self.g_statistics) and has_sums
        run(
            triton_weights.finish_block, (10 if has_parts else 1, len(self.x)),
            dw_parts, self.d_weights[k + 1] if has_parts else dummy, dw_parts.shape[1], db_parts,
            self.d_biases[k + 1] if has_parts and self.biases else dummy, dummy if sums is None else sums,
            0 if sums is None else sums.shape[1], self.gammas[at], before.mean, before.variance,
            self.g_statistics[at] if used else dummy, self.g_statistics[count + at] if used else dummy,
            self.factors[at], self.totals[at], dummy if self.own else self.d_given[at], before.p[0, ..., 0].numel(),
            self.eps, self.totals.shape[-1], CI=inputs, CO=outputs, CIP=tile.inputs, COP=tile.outputs, C=channels,
            CP=padded(channels, 1), WINDOW=tile.form == "window", WEIGHTS=has_parts, BIAS=bool(self.biases),
            SUMS=has_sums, OWN=self.own, USED=used, warps=8 if tile.inputs * tile.outputs >= 1024 else 4,
        )  # fmt: skip
