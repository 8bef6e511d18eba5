"""Triton, host side of the backward pass: two launches a block, one of them not for images, and two more."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mini_ht.kernels import triton_backward, triton_weights
from mini_ht.kernels.tiles import PROGRAMS, Tile, padded, share_out, weight_programs
from mini_ht.kernels.triton_launch import ROWS, WIDEST, Block, choose_for, constants, run, walk


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


@dataclass
class Backward:
    """The backward pass of a stack: what it was called with, and the kernels in their order."""

    g: Tensor
    g_statistics: Sequence[Tensor]
    x: Tensor
    weights: Sequence[Tensor]
    gammas: Sequence[Tensor]
    betas: Sequence[Tensor]
    biases: Sequence[Tensor]
    blocks: Sequence[Block]
    own: bool
    options: tuple[float, float, str]  # slope, eps, precision

    def __call__(self, wants_x: bool) -> list[Tensor]:
        """Sums for gammas and betas [blocks, 2, widest], dw, db, d_statistics [E, 2, C], and dx if wanted."""
        # Gradients of gammas and betas by episode, one buffer that one launch can sum: [blocks, 2, E, widest].
        widest = max(weight.shape[-1] for weight in self.weights)
        self.totals = self.blocks[0].mean.new_empty(len(self.weights), 2, len(self.x), widest)
        self.d_given = [] if self.own else [b.mean.new_empty(len(self.x), 2, b.mean.shape[1]) for b in self.blocks]
        self.parts: list[tuple[Tensor, Tensor, Tile]] = []  # programs' shares of dw and db, the last block's first
        g, sums = self.g, last_sums(self.g, self.blocks[-1], self.options[1])
        for k in reversed(range(len(self.blocks))):
            keep = k > 0 or wants_x
            d = self.weight_gradient(k, g, sums, keep)
            if keep:
                g, sums = self.input_gradient(k, d)
        results = [*self.add_up(), *self.d_given]
        return [*results, g] if wants_x else results

    def source(self, k: int) -> Tensor:
        """What block k read: images, or the pooled values before it, without their norm."""
        return self.blocks[k - 1].p if k else self.x

    def norm(self, k: int) -> tuple[Tensor, ...]:
        """The norm of block k as kernels take it: parts (which are merged by now), gamma, beta, mean, variance."""
        return self.x, self.gammas[k], self.betas[k], self.blocks[k].mean, self.blocks[k].variance

    def weight_gradient(self, k: int, g: Tensor, sums: Tensor, keep: bool) -> Tensor:
        """Gradients of the norm of block k, from its sums [E, programs, 2, C], and programs' shares of dw and db.

        keep: returns the gradient in the largest conv output of each window, too: [E, N, h, w, C].
        """
        x, block, (slope, eps, precision) = self.source(k), self.blocks[k], self.options
        episodes, images, height, width, inputs = x.shape
        outputs = block.p.shape[-1]
        tile = choose_for("weight", x, block.p, precision)
        chunks = 16 // tile.pixels if tile.form == "window" else 3
        size = (64 if tile.form == "window" else 9) * tile.inputs * tile.outputs
        wanted = weight_programs(tile, chunks, size)
        programs, tiles = share_out(block.p[0, ..., 0].numel(), tile.windows, episodes, wanted)
        dw = block.mean.new_empty(episodes, programs, size)
        db = block.mean.new_empty(episodes, programs, outputs if self.biases else 0)
        d = torch.empty_like(block.p) if keep else g
        used = bool(self.g_statistics)
        g_mean, g_variance = self.g_statistics[k :: len(self.blocks)] if used else (sums, sums)
        g_norm = sums, g_mean, g_variance, self.totals[k], sums if self.own else self.d_given[k]
        run(
            triton_weights.weight_gradient, (programs, episodes, chunks), x, self.norm(k - 1), g, block.p, block.code,
            self.norm(k), g_norm, sums.shape[1], self.totals.shape[-1], dw, db, d, *walk(images, height, width), tiles,
            slope, eps, AFFINE=k > 0, BIAS=bool(self.biases), OWN=self.own, USED=used, KEEP=keep,
            **constants(tile, inputs, outputs, precision, x, block.p),
        )  # fmt: skip
        self.parts.append((dw, db, tile))
        return d

    def input_gradient(self, k: int, d: Tensor) -> tuple[Tensor, Tensor]:
        """dx of block k, and by program the sums that the block before wants of it: [E, programs, 2, Cin]."""
        x, block, before, precision = self.source(k), self.blocks[k], self.blocks[k - 1], self.options[2]
        episodes, images, height, width, inputs = x.shape
        tile = choose_for("input", x, block.p, precision)
        total = images * ((height + 1) // 2) * ((width + 1) // 2)
        programs, tiles = share_out(total, tile.windows, episodes, PROGRAMS)
        dx = torch.empty_like(x)
        sums = block.mean.new_empty(episodes, programs, 2, inputs)
        run(
            triton_backward.input_gradient, (programs, episodes), d, block.code, self.weights[k], x, before.mean,
            before.variance, dx, sums, *walk(images, height, width, odd=True), tiles, self.options[1], SUMS=k > 0,
            **constants(tile, inputs, block.p.shape[-1], precision, x, block.p),
        )  # fmt: skip
        return dx, sums

    def add_up(self) -> list[Tensor]:
        """Sums over episodes for gammas and betas [blocks, 2, widest]; dw and db of all blocks from their parts."""
        dw, db, tiles = zip(*reversed(self.parts), strict=True)
        sums = self.totals.new_empty(len(tiles), 2, self.totals.shape[-1])
        d_weights = tuple(torch.empty_like(weight) for weight in self.weights)
        d_biases = tuple(torch.empty_like(bias) for bias in self.biases)
        run(
            triton_weights.add_up, (10, len(self.x), len(tiles)), self.totals, sums, sums.shape[-1], dw, d_weights,
            tuple(part.shape[1] for part in dw), db, d_biases or db, COUNT=len(tiles),
            CI=tuple(weight.shape[3] for weight in self.weights), CO=tuple(weight.shape[4] for weight in self.weights),
            CIP=tuple(tile.inputs for tile in tiles), COP=tuple(tile.outputs for tile in tiles),
            WINDOW=tuple(tile.form == "window" for tile in tiles), BIAS=bool(self.biases),
            warps=min(8, max(1, max(tile.inputs * tile.outputs for tile in tiles) // 128)),
        )  # fmt: skip
        return [sums, *d_weights, *d_biases]
