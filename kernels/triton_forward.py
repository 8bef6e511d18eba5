"""Triton, forward: the norm of the block before, conv, bias, activation and pool in one kernel; the last norm.

A program takes `tiles` tiles of BM pooling windows of one episode and leaves their pooled values, an int8 code for each
(place of the first maximum, plus 4 if it is positive), and mean and summed squared deviation of all its values. The
kernel that reads the values merges these statistics before it does, in each of its programs.
"""

import triton
import triton.language as tl

from mini_ht.kernels import triton_parts as parts


@triton.jit
def finish_tile(
    best, place, exists, offset, o, bias_ptr, p_ptr, code_ptr, count, mean, m2, slope,
    CO: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Bias and activation of the maxima, which are stored and join the statistics of their tiles.

    best, place [BM, COP] of channels o. Statistics are kept by row of a tile, mean and m2 [BM, COP] and count [BM],
    where there are registers for it, as nothing then passes between threads; else of all rows, [1, COP] and [1].
    """
    if BIAS:
        best += tl.load(bias_ptr + o, mask=o < CO, other=0.0).to(tl.float32)[None, :]
    code = tl.where(best > 0, place + 4, place)
    # Statistics are of the values as stored, as these are what the next block normalises.
    p = tl.where(best > 0, best, best * slope).to(p_ptr.dtype.element_ty)
    known = exists[:, None] & (o < CO)[None, :]
    tl.store(p_ptr + offset[:, None] + o[None, :], p, mask=known)
    tl.store(code_ptr + offset[:, None] + o[None, :], code.to(tl.int8), mask=known)
    if OWN:
        value, deviation, new = p.to(tl.float32), tl.zeros(mean.shape, tl.float32), exists.to(tl.float32)
        if mean.shape[0] == 1:
            new = tl.sum(new, axis=0, keep_dims=True)
            v, value = value, tl.sum(tl.where(known, value, 0.0), axis=0, keep_dims=True) / tl.maximum(new, 1.0)
            deviation += tl.sum(tl.where(known, (v - value) * (v - value), 0.0), axis=0, keep_dims=True)
        # Chan, Golub, LeVeque: sets of values merged without a difference of large sums.
        share = (new / tl.maximum(count + new, 1.0))[:, None]
        gap = value - mean
        m2 += deviation + gap * gap * count[:, None] * share
        mean += gap * share
        count += new
    return count, mean, m2


@triton.jit
def store_statistics(part_ptr, count, mean, m2, o, CO: tl.constexpr):
    """part[episode, program] = mean and summed squared deviation of all its values: [2, CO]."""
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    everywhere = tl.sum(mean * count[:, None], axis=0) / total
    gap = mean - everywhere[None, :]
    deviation = tl.sum(m2 + gap * gap * count[:, None], axis=0)
    base = part_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * CO + o
    tl.store(base, everywhere, mask=o < CO)
    tl.store(base + CO, deviation, mask=o < CO)


@triton.jit
def forward(
    x_ptr, before, programs, windows, w_ptr, bias_ptr, p_ptr, code_ptr, part_ptr,
    N, H, W, image_of, row_of, tiles, slope, eps,
    CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, BM: tl.constexpr, PIXELS: tl.constexpr,
    WINDOW: tl.constexpr, AFFINE: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """One block without its norm, and the norm of the block before (AFFINE) as it reads. Grid (programs, E).

    Few input channels: a row of the matrix product is a window's 4 x 4 pixels, its columns the four places (WINDOW).
    Many: one product a tap, each pixel read once for the four places (PIXELS 16) or for each anew (1).
    """
    e = tl.program_id(1).to(tl.int64)
    h, w = H // 2, W // 2
    total = N * h * w
    xe, we = x_ptr + e * N * H * W * CI, w_ptr + e * 9 * CI * CO
    K: tl.constexpr = PIXELS * CIP if WINDOW else CIP
    ROWS: tl.constexpr = BM if WINDOW or PIXELS == 16 else 1
    k, o = tl.arange(0, K), tl.arange(0, COP)
    weights = parts.kept_weights(we, CI, CO, CIP, COP, PIXELS, WINDOW, False, DT)
    scale, shift = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
    if AFFINE:
        scale, shift = parts.norm_of(before, programs, windows, N * H * W, eps, k, k % CIP, CI, OWN)
    scale, shift, k = scale[:, None], shift[:, None], k[:, None]  # [K, 1]
    count = tl.zeros((ROWS,), tl.float32)
    mean, m2 = parts.zeros(2, ROWS, COP)
    start = tl.program_id(0) * tiles
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(total, BM))):
        image, i, j, exists = parts.tile_windows(tile, total, image_of, row_of, BM, WIDE)
        corner, seen = parts.view(image, i, j, exists, H, W)
        corner, seen = corner[None, :], seen[None, :]
        if WINDOW:
            acc = tl.zeros((BM, 4 * COP), tl.float32)
            for first in tl.static_range(0, 16, PIXELS):
                a = parts.patch(xe, scale, shift, corner, seen, first, k, W, CI, CIP, AFFINE, DT)  # [K, BM]
                acc = parts.multiply(tl.trans(a), weights[first // PIXELS], acc, PRECISION)
            four = tl.reshape(acc, (BM, 4, COP))
            best, places = tl.max(four, axis=1), tl.arange(0, 4)[None, :, None]
            place = tl.min(tl.where(four == best[:, None, :], places, 3), axis=1)  # [BM, COP], the first maximum
        elif PIXELS == 16:
            each = parts.zeros(4, BM, COP)
            for pixel in tl.static_range(16):
                a = parts.patch(xe, scale, shift, corner, seen, pixel, k, W, CI, CIP, AFFINE, DT)  # [K, BM]
                each = parts.spread(tl.trans(a), weights, each, pixel, PRECISION)
            best, place = each[0], tl.zeros((BM, COP), tl.int32)
            for number in tl.static_range(1, 4):
                place = tl.where(each[number] > best, number, place)  # an equal one comes too late
                best = tl.maximum(each[number], best)
        else:
            best, place = tl.full((BM, COP), float("-inf"), tl.float32), tl.zeros((BM, COP), tl.int32)
            for number in range(4):
                acc = tl.zeros((BM, COP), tl.float32)
                for tap in range(9):
                    pixel = (number % 2 + tap % 3) * 4 + number // 2 + tap // 3
                    a = parts.patch(xe, scale, shift, corner, seen, pixel, k, W, CI, CIP, AFFINE, DT)  # [K, BM]
                    b = parts.tap_weight(we, tap, CI, CO, CIP, COP, False, DT)
                    acc = parts.multiply(tl.trans(a), b, acc, PRECISION)
                place = tl.where(acc > best, number, place)
                best = tl.maximum(acc, best)
        offset = ((image * h + i) * w + j) * CO
        count, mean, m2 = finish_tile(
            best, place, exists, offset, o, bias_ptr + e * CO, p_ptr + e * total * CO,
            code_ptr + e * total * CO, count, mean, m2, slope, CO, BIAS, OWN,
        )  # fmt: skip
    if OWN:
        store_statistics(part_ptr, count, mean, m2, o, CO)


@triton.jit
def apply_norm(
    p_ptr, norm, programs, windows, y_ptr, total, eps,
    C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = p * scale + shift of the last block. Grid (tiles of BM of an episode's `total` windows, E)."""
    e = tl.program_id(1).to(tl.int64)
    c, m = tl.arange(0, CP), tl.arange(0, BM)
    scale, shift = parts.norm_of(norm, programs, windows, total, eps, c, c, C, OWN)
    if WIDE:
        m = m.to(tl.int64)
    m += tl.program_id(0) * BM
    at = e * total * C + m[:, None] * C + c[None, :]
    known = (m < total)[:, None] & (c < C)[None, :]
    p = tl.load(p_ptr + at, mask=known, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (p * scale[None, :] + shift[None, :]).to(y_ptr.dtype.element_ty), mask=known)
