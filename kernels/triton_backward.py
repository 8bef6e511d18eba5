"""Triton, backward at pooled size: gradients of inputs and weights from the pooled gradient and the int8 codes.

The full-resolution gradient of the conv output exists in registers only: every window has one value, at its winner.
All partial sums are stored by program and added in one order, so that two runs agree bit by bit.
"""

import triton
import triton.language as tl

from mini_ht.kernels import triton_parts as parts


@triton.jit
def store_sums(sums_ptr, variance_ptr, sums, c, eps, C: tl.constexpr):
    """sums[episode, program] = (sum of g, sum of g * n): [2, C], from sums by row of g and g * (p - mean) [rows, c]."""
    e = tl.program_id(1).to(tl.int64)
    r = 1.0 / tl.sqrt(tl.load(variance_ptr + e * C + c, mask=c < C, other=1.0) + eps)
    base = sums_ptr + (e * tl.num_programs(0) + tl.program_id(0)) * 2 * C + c
    tl.store(base, tl.sum(sums[0], axis=0), mask=c < C)
    tl.store(base + C, tl.sum(sums[1], axis=0) * r, mask=c < C)


@triton.jit(do_not_specialize=parts.COUNTS)
def output_sums(
    g_ptr, p_ptr, mean_ptr, variance_ptr, sums_ptr, total, tiles, eps,
    C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums of g and g * n over the last block's output. Grid (programs, E)."""
    e = tl.program_id(1).to(tl.int64)
    c, m = tl.arange(0, CP), tl.arange(0, BM)
    if WIDE:
        m = m.to(tl.int64)
    mean = tl.load(mean_ptr + e * C + c, mask=c < C, other=0.0)[None, :]
    sum_g, sum_gd = tl.zeros((BM, CP), tl.float32), tl.zeros((BM, CP), tl.float32)
    start = tl.program_id(0) * tiles
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(total, BM))):
        row = m + tile * BM
        known = (row < total)[:, None] & (c < C)[None, :]
        at = e * total * C + row[:, None] * C + c[None, :]
        g = tl.load(g_ptr + at, mask=known, other=0.0).to(tl.float32)
        sum_g += g
        sum_gd += g * (tl.load(p_ptr + at, mask=known, other=0.0).to(tl.float32) - mean)
    store_sums(sums_ptr, variance_ptr, (sum_g, sum_gd), c, eps, C)


@triton.jit
def finish(dx, image, y, x, exists, c, p_ptr, dx_ptr, mean, sums, H, W, CI: tl.constexpr, SUMS: tl.constexpr):
    """Store dx of pixels (image, y, x); it is the g of the block before, whose sums go on, by row of a tile.

    dx and both sums [rows, CIP] of channels c; image, y, x, exists [rows]; mean [1, CIP].
    """
    known = (exists & (y < H) & (x < W))[:, None] & (c < CI)[None, :]
    offset = ((image * H + y) * W + x)[:, None] * CI + c[None, :]
    rounded = dx.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + offset, rounded, mask=known)
    if SUMS:  # where nothing is known, dx is 0
        g = rounded.to(tl.float32)
        gd = g * (tl.load(p_ptr + offset, mask=known, other=0.0).to(tl.float32) - mean)
        sums = sums[0] + g, sums[1] + gd
    return sums


@triton.jit
def windows_around(image, i, j, exists, h, w):
    """Like `view`, of pooled windows: where (i - 1, j - 1) lies; 16 bits, whether each of 4 x 4 conv outputs has one.

    Their rows 2i - 1 .. 2i + 2 lie in windows i - 1, i, i, i + 1, there in row 1, 0, 1, 0; so do their columns.
    """
    rows = (i > 0).to(tl.int32) + (i < h).to(tl.int32) * 6 + (i + 1 < h).to(tl.int32) * 8
    columns = (j > 0).to(tl.int32) + (j < w).to(tl.int32) * 0x0110 + (j + 1 < w).to(tl.int32) * 0x1000
    return (image * h + i - 1) * w + j - 1, tl.where(exists, rows * columns, 0)


@triton.jit
def winners(
    d_ptr, code_ptr, corner, seen, first, w, CO: tl.constexpr, COP: tl.constexpr, PIXELS: tl.constexpr, DT: tl.constexpr
):
    """The gradient in conv outputs first .. first + PIXELS - 1 of the 4 x 4: [BM, PIXELS * COP], 0 but for winners."""
    k = tl.arange(0, PIXELS * COP)
    pixel, o = first + k // COP, k % COP
    y, x = pixel % 4 + 1, pixel // 4 + 1
    known = ((seen[:, None] >> pixel[None, :]) & 1) != 0
    if CO != COP:
        known = known & (o < CO)[None, :]
    offset = corner[:, None] * CO + ((y // 2 * w + x // 2) * CO + o)[None, :]
    d = tl.load(d_ptr + offset, mask=known, other=0.0)
    code = tl.load(code_ptr + offset, mask=known, other=0).to(tl.int32)
    return tl.where((code & (1 << (y % 2 * 2 + x % 2))[None, :]) != 0, d, 0.0).to(DT)


@triton.jit(do_not_specialize=parts.COUNTS)
def input_gradient(
    d_ptr, code_ptr, w_ptr, x_ptr, mean_ptr, variance_ptr, dx_ptr, sums_ptr, N, H, W, image_of, row_of, tiles, eps,
    CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, BM: tl.constexpr, PIXELS: tl.constexpr,
    WINDOW: tl.constexpr, SUMS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """dx of 2 x 2 input pixels from the 4 x 4 conv outputs around them. Grid (programs, E).

    Few output channels: one matrix product for the four (WINDOW). Many: one a tap, each conv output read once for the
    four (PIXELS 16) or for each anew (1). SUMS: for the block before.
    """
    e = tl.program_id(1).to(tl.int64)
    h, w = H // 2, W // 2
    de, ce, inn = d_ptr + e * N * h * w * CO, code_ptr + e * N * h * w * CO, e * N * H * W * CI
    xe, dxe, we = x_ptr + inn, dx_ptr + inn, w_ptr + e * 9 * CI * CO
    total = N * ((H + 1) // 2) * ((W + 1) // 2)
    c = tl.arange(0, CIP)
    weights = parts.kept_weights(we, 1.0, CI, CO, CIP, COP, PIXELS, WINDOW, True, DT)
    mean = tl.zeros((1, CIP), tl.float32)
    if SUMS:
        mean = tl.load(mean_ptr + e * CI + c, mask=c < CI, other=0.0)[None, :]
    sums = parts.zeros(2, 4 * BM if WINDOW else BM, CIP)
    start = tl.program_id(0) * tiles
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(total, BM))):
        image, i, j, exists = parts.tile_windows(tile, total, image_of, row_of, BM, WIDE)
        corner, seen = windows_around(image, i, j, exists, h, w)
        if WINDOW:
            acc = tl.zeros((BM, 4 * CIP), tl.float32)
            for first in tl.static_range(0, 16, PIXELS):
                dy = winners(de, ce, corner, seen, first, w, CO, COP, PIXELS, DT)
                acc = parts.multiply(dy, weights[first // PIXELS], acc, PRECISION)
            place = tl.arange(0, BM * 4) % 4
            image, i, j, exists = parts.tile_windows(tile, total, image_of, row_of, BM, WIDE, 4)
            y, x = 2 * i + place // 2, 2 * j + place % 2
            four = tl.reshape(acc, (BM * 4, CIP))  # one row a pixel, window by window
            sums = finish(four, image, y, x, exists, c, xe, dxe, mean, sums, H, W, CI, SUMS)
        elif PIXELS == 16:
            each = parts.zeros(4, BM, CIP)
            for pixel in tl.static_range(16):
                dy = winners(de, ce, corner, seen, pixel, w, CO, COP, 1, DT)
                each = parts.spread(dy, weights, each, pixel, PRECISION)
            for number in tl.static_range(4):
                y, x = 2 * i + number // 2, 2 * j + number % 2
                sums = finish(each[number], image, y, x, exists, c, xe, dxe, mean, sums, H, W, CI, SUMS)
        else:
            for number in range(4):
                acc = tl.zeros((BM, CIP), tl.float32)
                for tap in range(9):
                    pixel = (number % 2 + tap % 3) * 4 + number // 2 + tap // 3
                    dy = winners(de, ce, corner, seen, pixel, w, CO, COP, 1, DT)
                    acc = parts.multiply(dy, parts.tap_weight(we, tap, CI, CO, CIP, COP, True).to(DT), acc, PRECISION)
                y, x = 2 * i + number // 2, 2 * j + number % 2
                sums = finish(acc, image, y, x, exists, c, xe, dxe, mean, sums, H, W, CI, SUMS)
    if SUMS:
        store_sums(sums_ptr, variance_ptr, sums, c, eps, CI)
