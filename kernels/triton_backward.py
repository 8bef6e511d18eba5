"""Triton, backward at pooled size: gradients of inputs and weights from the pooled gradient and the int8 codes.

The full-resolution gradient of the conv output exists in registers only: every window has one value, at its winner.
All partial sums are stored by program and added in one order, so that two runs agree bit by bit.
"""

import triton
import triton.language as tl

from mini_ht.kernels.triton_parts import (
    multiply,
    pooled_offset,
    tap_weight,
    tile_windows,
    window_weight,
    winner_gradient,
)


@triton.jit
def store_sums(sums_ptr, sum_g, sum_gn, C: tl.constexpr, CP: tl.constexpr):
    """sums[episode, program] = (sum of g, sum of g * n): [2, C]."""
    c = tl.arange(0, CP)
    base = sums_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * C + c
    tl.store(base, sum_g, mask=c < C)
    tl.store(base + C, sum_gn, mask=c < C)


@triton.jit
def output_sums(
    g_ptr, p_ptr, mean_ptr, variance_ptr, sums_ptr, total, tiles, eps,
    C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums of g and g * n over the last block's output. Grid (programs, E)."""
    e = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CP)
    mean = tl.load(mean_ptr + e * C + c, mask=c < C, other=0.0)
    r = 1.0 / tl.sqrt(tl.load(variance_ptr + e * C + c, mask=c < C, other=1.0) + eps)
    sum_g, sum_gn = tl.zeros((CP,), tl.float32), tl.zeros((CP,), tl.float32)
    start = tl.program_id(0) * tiles
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(total, BM))):
        m = tl.arange(0, BM)
        if WIDE:
            m = m.to(tl.int64)
        m += tile * BM
        known = (m < total)[:, None] & (c < C)[None, :]
        offset = m[:, None] * C + c[None, :]
        g = tl.load(g_ptr + e * total * C + offset, mask=known, other=0.0).to(tl.float32)
        p = tl.load(p_ptr + e * total * C + offset, mask=known, other=0.0).to(tl.float32)
        sum_g += tl.sum(g, axis=0)
        sum_gn += tl.sum(g * (p - mean[None, :]), axis=0) * r
    store_sums(sums_ptr, sum_g, sum_gn, C, CP)


@triton.jit
def finish_input_tile(
    dx, image, y, x, inside, p_ptr, dx_ptr, mean_ptr, r, sum_g, sum_gn, H, W,
    CI: tl.constexpr, CIP: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Store dx of pixels (image, y, x); it is the g of the block before, whose sums of g and g * n go on.

    dx [rows, CIP]; image, y, x, inside [rows]; r, sum_g, sum_gn [CIP].
    """
    c = tl.arange(0, CIP)
    known = inside[:, None] & (c < CI)[None, :]
    offset = ((image * H + y) * W + x)[:, None] * CI + c[None, :]
    rounded = dx.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + offset, rounded, mask=known)
    if SUMS:
        g = tl.where(known, rounded.to(tl.float32), 0.0)
        p = tl.load(p_ptr + offset, mask=known, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + c, mask=c < CI, other=0.0)
        sum_g += tl.sum(g, axis=0)
        sum_gn += tl.sum(g * (p - mean[None, :]), axis=0) * r
    return sum_g, sum_gn


@triton.jit
def input_window(
    g_ptr, p_ptr, code_ptr, abc_ptr, w_ptr, x_ptr, mean_ptr, variance_ptr, dx_ptr, sums_ptr, N, H, W, tiles, slope, eps,
    CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, BM: tl.constexpr, PIXELS: tl.constexpr,
    OWN: tl.constexpr, SUMS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Few output channels: dx of 2 x 2 input pixels from the 4 x 4 conv outputs around them, in one matrix product."""
    e = tl.program_id(1).to(tl.int64)
    h, w = H // 2, W // 2
    out, inn = e * N * h * w * CO, e * N * H * W * CI
    rows, columns = (H + 1) // 2, (W + 1) // 2
    total = N * rows * columns
    k, ci = tl.arange(0, PIXELS * COP), tl.arange(0, CIP)
    o = k % COP
    a = tl.load(abc_ptr + e * 3 * CO + o, mask=o < CO, other=0.0)[None, :]
    b = tl.load(abc_ptr + (e * 3 + 1) * CO + o, mask=o < CO, other=0.0)[None, :]
    c = tl.load(abc_ptr + (e * 3 + 2) * CO + o, mask=o < CO, other=0.0)[None, :]
    r = tl.zeros((CIP,), tl.float32)
    if SUMS:
        r = 1.0 / tl.sqrt(tl.load(variance_ptr + e * CI + ci, mask=ci < CI, other=1.0) + eps)
    sum_g, sum_gn = tl.zeros((CIP,), tl.float32), tl.zeros((CIP,), tl.float32)
    start = tl.program_id(0) * tiles
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(total, BM))):
        image, i, j, exists = tile_windows(tile, total, rows, columns, BM, WIDE)
        acc = tl.zeros((BM, 4 * CIP), tl.float32)
        for first in tl.static_range(0, 16, PIXELS):
            y, x = (first + k // COP) // 4, (first + k // COP) % 4
            # Pixel rows 2i - 1 .. 2i + 2 lie in windows i - 1, i, i, i + 1, there in row 1, 0, 1, 0.
            wi, wj = i[:, None] - 1 + ((y + 1) // 2)[None, :], j[:, None] - 1 + ((x + 1) // 2)[None, :]
            known = exists[:, None] & (wi >= 0) & (wi < h) & (wj >= 0) & (wj < w) & (o < CO)[None, :]
            offset = pooled_offset(image[:, None], wi, wj, h, w, CO) + o[None, :]
            d, place = winner_gradient(g_ptr + out, p_ptr + out, code_ptr + out, offset, known, a, b, c, slope, OWN)
            dy = tl.where(place == ((y + 1) % 2 * 2 + (x + 1) % 2)[None, :], d, 0.0).to(DT)
            weight = window_weight(w_ptr + e * 9 * CI * CO, first, CI, CO, CIP, COP, PIXELS, True, DT)
            acc = multiply(dy, weight, acc, PRECISION)
        four = tl.reshape(acc, (BM * 4, CIP))  # one row a pixel, window by window
        place = tl.arange(0, BM * 4) % 4
        image, i, j, exists = tile_windows(tile, total, rows, columns, BM, WIDE, 4)
        y, x = 2 * i + place // 2, 2 * j + place % 2
        sum_g, sum_gn = finish_input_tile(
            four, image, y, x, exists & (y < H) & (x < W), x_ptr + inn, dx_ptr + inn, mean_ptr + e * CI, r,
            sum_g, sum_gn, H, W, CI, CIP, SUMS,
        )  # fmt: skip
    if SUMS:
        store_sums(sums_ptr, sum_g, sum_gn, CI, CIP)


@triton.jit
def input_taps(
    g_ptr, p_ptr, code_ptr, abc_ptr, w_ptr, x_ptr, mean_ptr, variance_ptr, dx_ptr, sums_ptr, N, H, W, tiles, slope, eps,
    CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, BM: tl.constexpr, PIXELS: tl.constexpr,
    OWN: tl.constexpr, SUMS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Many output channels: dx of each place of 2 x 2 input pixels from nine conv outputs, one product a tap."""
    e = tl.program_id(1).to(tl.int64)
    h, w = H // 2, W // 2
    out, inn = e * N * h * w * CO, e * N * H * W * CI
    rows, columns = (H + 1) // 2, (W + 1) // 2
    total = N * rows * columns
    o, ci = tl.arange(0, COP), tl.arange(0, CIP)
    a = tl.load(abc_ptr + e * 3 * CO + o, mask=o < CO, other=0.0)[None, :]
    b = tl.load(abc_ptr + (e * 3 + 1) * CO + o, mask=o < CO, other=0.0)[None, :]
    c = tl.load(abc_ptr + (e * 3 + 2) * CO + o, mask=o < CO, other=0.0)[None, :]
    r = tl.zeros((CIP,), tl.float32)
    if SUMS:
        r = 1.0 / tl.sqrt(tl.load(variance_ptr + e * CI + ci, mask=ci < CI, other=1.0) + eps)
    sum_g, sum_gn = tl.zeros((CIP,), tl.float32), tl.zeros((CIP,), tl.float32)
    start = tl.program_id(0) * tiles
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(total, BM))):
        image, i, j, exists = tile_windows(tile, total, rows, columns, BM, WIDE)
        for k in range(4):
            acc = tl.zeros((BM, CIP), tl.float32)
            for tap in range(9):
                y, x = k // 2 + tap // 3, k % 2 + tap % 3  # of the 4 x 4 conv outputs around
                wi, wj = i - 1 + (y + 1) // 2, j - 1 + (x + 1) // 2
                known = (exists & (wi >= 0) & (wi < h) & (wj >= 0) & (wj < w))[:, None] & (o < CO)[None, :]
                offset = pooled_offset(image, wi, wj, h, w, CO)[:, None] + o[None, :]
                d, place = winner_gradient(
                    g_ptr + out, p_ptr + out, code_ptr + out, offset, known, a, b, c, slope, OWN
                )  # fmt: skip
                dy = tl.where(place == (y + 1) % 2 * 2 + (x + 1) % 2, d, 0.0).to(DT)
                weight = tap_weight(w_ptr + e * 9 * CI * CO, tap, CI, CO, CIP, COP, True, DT)
                acc = multiply(dy, weight, acc, PRECISION)
            y, x = 2 * i + k // 2, 2 * j + k % 2
            sum_g, sum_gn = finish_input_tile(
                acc, image, y, x, exists & (y < H) & (x < W), x_ptr + inn, dx_ptr + inn, mean_ptr + e * CI, r,
                sum_g, sum_gn, H, W, CI, CIP, SUMS,
            )  # fmt: skip
    if SUMS:
        store_sums(sums_ptr, sum_g, sum_gn, CI, CIP)
