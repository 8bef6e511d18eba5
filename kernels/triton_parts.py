"""Triton: what the forward and backward kernels share. Shapes are of one program; see kernels/README.md for the maths.

Constants: CI, CO channels as in memory, CIP, COP the same padded to a power of two, BM windows of a tile,
PIXELS how many of the 4 x 4 pixels that a window sees make one matrix product, DT the dtype that is multiplied.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. The interpreter stores bfloat16 as integers, so it gets float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_windows(tile, total, rows, columns, BM: tl.constexpr, WIDE: tl.constexpr, EACH: tl.constexpr = 1):
    """The BM windows of a tile, where an image has rows x columns of them, each EACH times.

    Four of [BM * EACH]: image, row, column, whether there is such a window.
    """
    m = tl.arange(0, BM * EACH) // EACH
    if WIDE:  # an episode has more values than 32 bits can count
        m = m.to(tl.int64)
    m += tile * BM
    image = m // columns // rows
    return image, m // columns % rows, m % columns, m < total


@triton.jit
def normed(v, inside, scale_ptr, shift_ptr, c, known, AFFINE: tl.constexpr, DT: tl.constexpr):
    """The norm of the block before, on load: v * scale + shift, but still zero outside of the image."""
    if AFFINE:
        scale = tl.load(scale_ptr + c, mask=known, other=0.0)
        shift = tl.load(shift_ptr + c, mask=known, other=0.0)
        v = tl.where(inside, v.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
    return v.to(DT)


@triton.jit
def patch(
    x_ptr, scale_ptr, shift_ptr, image, i, j, exists, first, H, W,
    CI: tl.constexpr, CIP: tl.constexpr, PIXELS: tl.constexpr, AFFINE: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Pixels first .. first + PIXELS - 1 of the 4 x 4 that each window sees, row by row: [BM, PIXELS * CIP]."""
    k = tl.arange(0, PIXELS * CIP)
    pixel, c = first + k // CIP, k % CIP
    row = (2 * i - 1)[:, None] + (pixel // 4)[None, :]
    column = (2 * j - 1)[:, None] + (pixel % 4)[None, :]
    inside = exists[:, None] & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    if CI != CIP:
        inside = inside & (c < CI)[None, :]
    v = tl.load(x_ptr + ((image[:, None] * H + row) * W + column) * CI + c[None, :], mask=inside, other=0.0)
    return normed(v, inside, scale_ptr, shift_ptr, c, c < CI, AFFINE, DT)


@triton.jit
def window_weight(
    w_ptr, FIRST: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr,
    PIXELS: tl.constexpr, FLIPPED: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """The convs of a window's four places as one matrix, zero where a place does not see a pixel.

    [PIXELS * CIP, 4 * COP]; flipped, as the input's gradient wants it, [PIXELS * COP, 4 * CIP].
    """
    IN: tl.constexpr = COP if FLIPPED else CIP
    OUT: tl.constexpr = CIP if FLIPPED else COP
    k = tl.arange(0, PIXELS * IN)[:, None]
    q = tl.arange(0, 4 * OUT)[None, :]
    pixel, place = FIRST + k // IN, q // OUT
    y, x = pixel // 4 - place // 2, pixel % 4 - place % 2
    if FLIPPED:
        offset = (((2 - y) * 3 + 2 - x) * CI + q % OUT) * CO + k % IN
        real = (q % OUT < CI) & (k % IN < CO)
    else:
        offset = ((y * 3 + x) * CI + k % IN) * CO + q % OUT
        real = (k % IN < CI) & (q % OUT < CO)
    return tl.load(w_ptr + offset, mask=real & (y >= 0) & (y < 3) & (x >= 0) & (x < 3), other=0.0).to(DT)


@triton.jit
def tap_weight(
    w_ptr, tap, CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, FLIPPED: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    """One of the nine taps: [CIP, COP]; flipped, tap 8 - tap transposed: [COP, CIP]."""
    if FLIPPED:
        c, o = tl.arange(0, CIP)[None, :], tl.arange(0, COP)[:, None]
        tap = 8 - tap
    else:
        c, o = tl.arange(0, CIP)[:, None], tl.arange(0, COP)[None, :]
    return tl.load(w_ptr + (tap * CI + c) * CO + o, mask=(c < CI) & (o < CO), other=0.0).to(DT)


@triton.jit
def pooled_offset(image, i, j, h, w, C: tl.constexpr):
    """Where the C values of pooled window (image, i, j) start: [BM]."""
    return ((image * h + i) * w + j) * C


@triton.jit
def winner_gradient(g_ptr, p_ptr, code_ptr, offset, known, a, b, c, slope, OWN: tl.constexpr):
    """The gradient in the largest conv output of each window, through norm and activation, and the place that won.

    offset, known and the results [BM, COP]; a, b, c broadcast to it. Through the norm it is a * g + b * p + c.
    """
    d = tl.load(g_ptr + offset, mask=known, other=0.0).to(tl.float32) * a
    if OWN:  # given statistics do not depend on p
        d += tl.load(p_ptr + offset, mask=known, other=0.0).to(tl.float32) * b + c
    code = tl.load(code_ptr + offset, mask=known, other=0).to(tl.int32)
    d = tl.where(code >= 4, d, d * slope)
    return tl.where(known, d, 0.0), code % 4
