"""Triton: what the forward and backward kernels share. Shapes are of one program; see kernels/README.md for the maths.

Constants: CI, CO channels as in memory, CIP, COP the same padded to a power of two, BM windows of a tile,
PIXELS how many of the 4 x 4 pixels that a window sees make one matrix product, DT the dtype that is multiplied.
The 16 pixels are numbered column by column: neighbouring threads then read neighbouring windows.
"""

import os

import triton
import triton.language as tl

from mini_ht.kernels import tiles

MOST_PARTS = tl.constexpr(tiles.MOST_PARTS)
# Arguments for whose value no kernel is compiled anew, as it otherwise is for 1 and for multiples of 16.
COUNTS = "N", "H", "W", "tiles", "programs", "windows", "total", "stride"
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. The interpreter stores bfloat16 as integers, so it gets float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def divide(n, factor, shift):
    """n // d for 0 <= n < 2^31 by one product; see `tiles.reciprocal`."""
    return ((n.to(tl.uint32).to(tl.uint64) * factor.to(tl.uint32).to(tl.uint64)) >> shift).to(tl.int32)


@triton.jit
def tile_windows(tile, total, image_of, row_of, BM: tl.constexpr, WIDE: tl.constexpr, EACH: tl.constexpr = 1):
    """The BM windows of a tile, each EACH times; image_of, row_of: how many make an image or a row, as a `reciprocal`.

    Four of [BM * EACH]: image, row, column, whether there is such a window.
    """
    m = tile * BM + tl.arange(0, BM * EACH) // EACH
    image = divide(m, image_of[1], image_of[2])
    rest = m - image * image_of[0]
    row = divide(rest, row_of[1], row_of[2])
    column = rest - row * row_of[0]
    if WIDE:  # an episode has more values than 32 bits can count
        image = image.to(tl.int64)
    return image, row, column, m < total


@triton.jit
def view(image, i, j, exists, H, W):
    """What windows see of an image: where pixel (2i - 1, 2j - 1) lies, and 16 bits, whether each of 4 x 4 is inside."""
    rows = 6 + (i > 0).to(tl.int32) + (2 * i + 2 < H).to(tl.int32) * 8
    columns = 0x0110 + (j > 0).to(tl.int32) + (2 * j + 2 < W).to(tl.int32) * 0x1000
    return (image * H + 2 * i - 1) * W + 2 * j - 1, tl.where(exists, rows * columns, 0)


@triton.jit
def add_rows(part_ptr, rows, step, at, known, BS: tl.constexpr = 32):
    """Sum over rows r of part[r * step + at], in a fixed order: [K], as `at` and `known`."""
    total = tl.zeros(at.shape, tl.float32)
    for first in range(0, rows, BS):
        r = first + tl.arange(0, BS)
        inside = (r < rows)[:, None] & known[None, :]
        total += tl.sum(tl.load(part_ptr + r[:, None] * step + at[None, :], mask=inside, other=0.0), axis=0)
    return total


@triton.jit
def merge_statistics(part_ptr, programs, windows, total, c, known, C: tl.constexpr):
    """Mean and variance of channels c [K] from what the programs of a block left, `windows` values each."""
    s = tl.arange(0, MOST_PARTS)
    count = tl.where(s < programs, tl.minimum(windows, total - s * windows), 0).to(tl.float32)[:, None]  # [S, 1]
    at, inside = s[:, None] * (2 * C) + c[None, :], (s < programs)[:, None] & known[None, :]
    means = tl.load(part_ptr + at, mask=inside, other=0.0)
    deviations = tl.load(part_ptr + at + C, mask=inside, other=0.0)
    mean = tl.sum(means * count, axis=0) / total
    gap = means - mean[None, :]
    return mean, tl.sum(deviations + gap * gap * count, axis=0) / total


@triton.jit
def norm_of(norm, programs, windows, total, eps, c, C: tl.constexpr, MERGE: tl.constexpr):
    """A block's norm, (v - mean) * scale + beta, of channels c [K]; norm: its parts, gamma, beta, mean, variance.

    MERGE: its statistics are merged from parts here, in every program alike, and the first of an episode keeps
    them. Without it they are read.
    """
    part_ptr, gamma_ptr, beta_ptr, mean_ptr, variance_ptr = norm
    e = tl.program_id(1).to(tl.int64)
    known = c < C
    if MERGE:
        mean, variance = merge_statistics(part_ptr + e * programs * 2 * C, programs, windows, total, c, known, C)
        if tl.program_id(0) == 0:
            tl.store(mean_ptr + e * C + c, mean, mask=known)
            tl.store(variance_ptr + e * C + c, variance, mask=known)
    else:
        mean = tl.load(mean_ptr + e * C + c, mask=known, other=0.0)
        variance = tl.load(variance_ptr + e * C + c, mask=known, other=1.0)
    scale = tl.load(gamma_ptr + c, mask=known, other=0.0) / tl.sqrt(variance + eps)
    return mean, scale, tl.load(beta_ptr + c, mask=known, other=0.0)


@triton.jit
def inside(seen, pixels, DT: tl.constexpr):
    """1 where pixels [16, 1] of those that windows see [1, BM] are inside of the image, else 0: [16, BM]."""
    return tl.where((seen >> pixels & 1) != 0, 1.0, 0.0).to(DT)


@triton.jit
def tap_inside(seen, place, DT: tl.constexpr):
    """The same for the pixel that each of nine taps sees from a place: [16, BM], its last rows without meaning."""
    tap = tl.arange(0, 16)[:, None]
    return inside(seen, (place % 2 + tap % 3) * 4 + place // 2 + tap // 3, DT)


@triton.jit
def patch(x_ptr, corner, seen, first, k, W, CI: tl.constexpr, CIP: tl.constexpr, DT: tl.constexpr):
    """Channels k % CIP of pixels first + k // CIP of those that windows see, zero outside of the image: [K, BM]."""
    pixel, c = first + k // CIP, k % CIP
    inside = ((seen >> pixel) & 1) != 0
    if CI != CIP:
        inside = inside & (c < CI)
    return tl.load(x_ptr + corner * CI + ((pixel % 4 * W + pixel // 4) * CI + c), mask=inside, other=0.0).to(DT)


@triton.jit
def window_weight(
    w_ptr, FIRST: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr,
    PIXELS: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """The convs of a window's four places as one matrix, zero where a place does not see a pixel.

    [PIXELS * CIP, 4 * COP]; flipped, as the input's gradient wants it, [PIXELS * COP, 4 * CIP].
    """
    IN: tl.constexpr = COP if FLIPPED else CIP
    OUT: tl.constexpr = CIP if FLIPPED else COP
    k = tl.arange(0, PIXELS * IN)[:, None]
    q = tl.arange(0, 4 * OUT)[None, :]
    pixel, place = FIRST + k // IN, q // OUT
    y, x = pixel % 4 - place // 2, pixel // 4 - place % 2
    tap, c, o = y * 3 + x, k % IN, q % OUT
    if FLIPPED:
        tap, c, o = 8 - tap, o, c
    known = (c < CI) & (o < CO) & (y >= 0) & (y < 3) & (x >= 0) & (x < 3)
    return tl.load(w_ptr + (tap * CI + c) * CO + o, mask=known, other=0.0).to(tl.float32)


@triton.jit
def tap_weight(
    w_ptr, tap, CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, FLIPPED: tl.constexpr
):
    """One of the nine taps: [CIP, COP]; flipped, tap 8 - tap transposed: [COP, CIP]."""
    c, o = tl.arange(0, CIP)[:, None], tl.arange(0, COP)[None, :]
    if FLIPPED:
        tap, c, o = 8 - tap, tl.trans(c), tl.trans(o)
    return tl.load(w_ptr + (tap * CI + c) * CO + o, mask=(c < CI) & (o < CO), other=0.0).to(tl.float32)


@triton.jit
def kept_weights(
    w_ptr, scale, CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, PIXELS: tl.constexpr,
    WINDOW: tl.constexpr, FLIPPED: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """What a program loads once, times scale: a window's weights in 16 / PIXELS parts, nine taps or nothing."""
    weights = ()
    if WINDOW:
        for first in tl.static_range(0, 16, PIXELS):
            weights += ((window_weight(w_ptr, first, CI, CO, CIP, COP, PIXELS, FLIPPED) * scale).to(DT),)
    elif PIXELS == 16:
        for tap in tl.static_range(9):
            weights += ((tap_weight(w_ptr, tap, CI, CO, CIP, COP, FLIPPED) * scale).to(DT),)
    return weights


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """COUNT times float32 zeros [ROWS, COLUMNS]."""
    made = ()
    for _ in tl.static_range(COUNT):
        made += (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return made


@triton.jit
def spread(a, weights, four, pixel: tl.constexpr, PRECISION: tl.constexpr):
    """Add what one of the 16 pixels, a [BM, K], is worth in each of the four places that see it, by nine taps."""
    more = ()
    for place in tl.static_range(4):
        total = four[place]
        for tap in tl.static_range(9):
            if pixel == (tap % 3 + place % 2) * 4 + tap // 3 + place // 2:
                total = multiply(a, weights[tap], total, PRECISION)
        more += (total,)
    return more
