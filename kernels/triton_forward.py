"""Triton, forward: conv, bias, activation and pool in one kernel; merging its statistics; the last norm.

A program takes `tiles` tiles of BM pooling windows of one episode and leaves their pooled values, an int8 code for each
(place of the first maximum, plus 4 if it is positive), and mean and summed squared deviation of all its values.
"""

import triton
import triton.language as tl

from mini_ht.kernels.triton_parts import multiply, patch, pooled_offset, tap_weight, tile_windows, window_weight


@triton.jit
def finish_tile(
    best, place, exists, offset, bias_ptr, p_ptr, code_ptr, mean, m2, before, slope,
    CO: tl.constexpr, COP: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Bias and activation of the maxima, which are stored; their statistics join those of the `before` values so far.

    best, place [BM, COP]; mean, m2 [COP].
    """
    o = tl.arange(0, COP)
    if BIAS:
        best += tl.load(bias_ptr + o, mask=o < CO, other=0.0).to(tl.float32)[None, :]
    code = tl.where(best > 0, place + 4, place)
    # Statistics are of the values as stored, as these are what the next block normalises.
    p = tl.where(best > 0, best, best * slope).to(p_ptr.dtype.element_ty)
    known = exists[:, None] & (o < CO)[None, :]
    tl.store(p_ptr + offset[:, None] + o[None, :], p, mask=known)
    tl.store(code_ptr + offset[:, None] + o[None, :], code.to(tl.int8), mask=known)
    if OWN:
        v = p.to(tl.float32)
        count = tl.sum(exists.to(tl.float32), axis=0)
        tile_mean = tl.sum(tl.where(known, v, 0.0), axis=0) / tl.maximum(count, 1.0)
        deviation = tl.where(known, v - tile_mean[None, :], 0.0)
        # Chan, Golub, LeVeque: two sets of values merged without a difference of large sums.
        share = count / tl.maximum(before + count, 1.0)
        gap = tile_mean - mean
        m2 += tl.sum(deviation * deviation, axis=0) + gap * gap * before * share
        mean += gap * share
    return mean, m2


@triton.jit
def store_statistics(part_ptr, mean, m2, CO: tl.constexpr, COP: tl.constexpr):
    """part[episode, program] = (mean, m2): [2, CO]."""
    o = tl.arange(0, COP)
    base = part_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * CO + o
    tl.store(base, mean, mask=o < CO)
    tl.store(base + CO, m2, mask=o < CO)


@triton.jit
def forward_window(
    x_ptr, scale_ptr, shift_ptr, w_ptr, bias_ptr, p_ptr, code_ptr, part_ptr, N, H, W, tiles, slope,
    CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, BM: tl.constexpr, PIXELS: tl.constexpr,
    AFFINE: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    """Few input channels: a row of the matrix product is a window's 4 x 4 pixels, its columns the four places."""
    e = tl.program_id(1).to(tl.int64)
    h, w = H // 2, W // 2
    total = N * h * w
    mean, m2 = tl.zeros((COP,), tl.float32), tl.zeros((COP,), tl.float32)
    start = tl.program_id(0) * tiles
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(total, BM))):
        image, i, j, exists = tile_windows(tile, total, h, w, BM, WIDE)
        acc = tl.zeros((BM, 4 * COP), tl.float32)
        for first in tl.static_range(0, 16, PIXELS):
            a = patch(
                x_ptr + e * N * H * W * CI, scale_ptr + e * CI, shift_ptr + e * CI, image, i, j, exists, first, H, W,
                CI, CIP, PIXELS, AFFINE, DT,
            )  # fmt: skip
            b = window_weight(w_ptr + e * 9 * CI * CO, first, CI, CO, CIP, COP, PIXELS, False, DT)
            acc = multiply(a, b, acc, PRECISION)
        four = tl.reshape(acc, (BM, 4, COP))
        best = tl.max(four, axis=1)  # [BM, COP]
        places = tl.arange(0, 4)[None, :, None]
        place = tl.min(tl.where(four == best[:, None, :], places, 3), axis=1)  # [BM, COP], the first maximum
        mean, m2 = finish_tile(
            best, place, exists, pooled_offset(image, i, j, h, w, CO), bias_ptr + e * CO, p_ptr + e * total * CO,
            code_ptr + e * total * CO, mean, m2, (tile - start) * BM * 1.0, slope, CO, COP, BIAS, OWN,
        )  # fmt: skip
    if OWN:
        store_statistics(part_ptr, mean, m2, CO, COP)


@triton.jit
def forward_taps(
    x_ptr, scale_ptr, shift_ptr, w_ptr, bias_ptr, p_ptr, code_ptr, part_ptr, N, H, W, tiles, slope,
    CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, BM: tl.constexpr, PIXELS: tl.constexpr,
    AFFINE: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    """Many input channels: for each place of a window the nine taps, one product each, and the maximum so far."""
    e = tl.program_id(1).to(tl.int64)
    h, w = H // 2, W // 2
    total = N * h * w
    mean, m2 = tl.zeros((COP,), tl.float32), tl.zeros((COP,), tl.float32)
    start = tl.program_id(0) * tiles
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(total, BM))):
        image, i, j, exists = tile_windows(tile, total, h, w, BM, WIDE)
        best, place = tl.full((BM, COP), float("-inf"), tl.float32), tl.zeros((BM, COP), tl.int32)
        for k in range(4):
            acc = tl.zeros((BM, COP), tl.float32)
            for tap in range(9):
                pixel = (k // 2 + tap // 3) * 4 + k % 2 + tap % 3
                a = patch(
                    x_ptr + e * N * H * W * CI, scale_ptr + e * CI, shift_ptr + e * CI, image, i, j, exists, pixel,
                    H, W, CI, CIP, PIXELS, AFFINE, DT,
                )  # fmt: skip
                b = tap_weight(w_ptr + e * 9 * CI * CO, tap, CI, CO, CIP, COP, False, DT)
                acc = multiply(a, b, acc, PRECISION)
            place = tl.where(acc > best, k, place)  # an equal one comes too late
            best = tl.maximum(acc, best)
        mean, m2 = finish_tile(
            best, place, exists, pooled_offset(image, i, j, h, w, CO), bias_ptr + e * CO, p_ptr + e * total * CO,
            code_ptr + e * total * CO, mean, m2, (tile - start) * BM * 1.0, slope, CO, COP, BIAS, OWN,
        )  # fmt: skip
    if OWN:
        store_statistics(part_ptr, mean, m2, CO, COP)


@triton.jit
def merge_statistics(
    part_ptr, gamma_ptr, beta_ptr, mean_ptr, variance_ptr, scale_ptr, shift_ptr, total, programs, windows, eps,
    CO: tl.constexpr, COP: tl.constexpr, BS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """The programs' statistics, `windows` values each, merged in a fixed order; then the norm as scale and shift.

    Grid (E,). Given statistics (not OWN) are read from mean and variance, own ones are written there.
    """
    e = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, COP)
    at, known = e * CO + o, o < CO
    if OWN:
        mean, m2 = tl.zeros((COP,), tl.float32), tl.zeros((COP,), tl.float32)
        for first in range(0, programs, BS):
            s = first + tl.arange(0, BS)
            count = tl.maximum(tl.minimum(windows, total - s * windows), 0).to(tl.float32)[:, None]  # [BS, 1]
            base = part_ptr + (e * programs + s[:, None]) * 2 * CO + o[None, :]
            inside = (s < programs)[:, None] & known[None, :]
            count = tl.where(inside, count, 0.0)  # [BS, COP]
            means = tl.load(base, mask=inside, other=0.0)
            many = tl.maximum(tl.sum(count, axis=0), 1.0)
            some = tl.sum(means * count, axis=0) / many
            gap = means - some[None, :]
            spread = tl.sum(tl.load(base + CO, mask=inside, other=0.0) + gap * gap * count, axis=0)
            before = tl.minimum(first * 1.0 * windows, total * 1.0)
            share = many / (before + many)
            m2 += spread + (some - mean) * (some - mean) * before * share
            mean += (some - mean) * share
        variance = m2 / total
        tl.store(mean_ptr + at, mean, mask=known)
        tl.store(variance_ptr + at, variance, mask=known)
    else:
        mean = tl.load(mean_ptr + at, mask=known, other=0.0)
        variance = tl.load(variance_ptr + at, mask=known, other=0.0)
    scale = tl.load(gamma_ptr + o, mask=known, other=0.0) / tl.sqrt(variance + eps)
    tl.store(scale_ptr + at, scale, mask=known)
    tl.store(shift_ptr + at, tl.load(beta_ptr + o, mask=known, other=0.0) - mean * scale, mask=known)


@triton.jit
def apply_norm(p_ptr, scale_ptr, shift_ptr, y_ptr, count, C: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """y = p * scale + shift of the last block. Grid (tiles of an episode's `count` values, E)."""
    e = tl.program_id(1).to(tl.int64)
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if WIDE:
        q = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c, known = q % C, q < count
    p = tl.load(p_ptr + e * count + q, mask=known, other=0.0).to(tl.float32)
    y = p * tl.load(scale_ptr + e * C + c) + tl.load(shift_ptr + e * C + c)
    tl.store(y_ptr + e * count + q, y.to(y_ptr.dtype.element_ty), mask=known)
