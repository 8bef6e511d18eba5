"""Triton, forward: the norm of the block before, conv, bias, activation and pool in one kernel; the last norm.

A program takes `tiles` tiles of BM pooling windows of one episode and leaves their pooled values, an int8 code for each
(a bit for the place of the first maximum, plus 16 if it is positive), and mean and summed squared deviation of all its
values. The kernel that reads the values merges these statistics before it does, in each of its programs.
"""

import triton
import triton.language as tl

from mini_ht.kernels import triton_parts as parts


@triton.jit
def finish_tile(
    best, place, exists, offset, o, bias_ptr, p_ptr, code_ptr, before, mean, m2, slope,
    CO: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Bias and activation of the maxima, which are stored and join the statistics of the `before` tiles before them.

    best, place, mean, m2 [BM, COP] of channels o; statistics by row of a tile, as nothing then passes between threads.
    """
    if BIAS:
        best += tl.load(bias_ptr + o, mask=o < CO, other=0.0).to(tl.float32)[None, :]
    code = tl.where(best > 0, place + 16, place)
    # Statistics are of the values as stored, as these are what the next block normalises.
    p = tl.where(best > 0, best, best * slope).to(p_ptr.dtype.element_ty)
    known = exists[:, None] & (o < CO)[None, :]
    tl.store(p_ptr + offset[:, None] + o[None, :], p, mask=known)
    tl.store(code_ptr + offset[:, None] + o[None, :], code.to(tl.int8), mask=known)
    if OWN:
        # Chan, Golub, LeVeque: one more value, without a difference of large sums.
        share = tl.where(exists, 1.0 / (before + 1), 0.0)[:, None]
        gap = p.to(tl.float32) - mean
        m2 += gap * (gap * (share * before))
        mean += gap * share
    return mean, m2


@triton.jit
def store_statistics(part_ptr, windows, mean, m2, o, CO: tl.constexpr):
    """part[episode, program] = mean and summed squared deviation of `windows` values: [2, CO], from those by row."""
    ROWS: tl.constexpr = mean.shape[0]
    count = tl.maximum(tl.cdiv(windows - tl.arange(0, ROWS), ROWS), 0)[:, None]
    everywhere = tl.sum(mean * count, axis=0) / windows
    gap = mean - everywhere[None, :]
    deviation = tl.sum(m2 + gap * gap * count, axis=0)
    base = part_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * CO + o
    tl.store(base, everywhere, mask=o < CO)
    tl.store(base + CO, deviation, mask=o < CO)


@triton.jit
def norm_by_tap(
    w_ptr, norm, CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, DT: tl.constexpr
):
    """What a norm that only scales the weights leaves out, for each of nine taps that is inside: [16, COP].

    (x - mean) * scale + beta, times w, is x * (scale * w) + beta * w - mean * (scale * w): with the product as rounded.
    """
    mean, scale, beta = norm
    added = tl.zeros((16, COP), tl.float32)
    for tap in tl.static_range(9):
        w = parts.tap_weight(w_ptr, tap, CI, CO, CIP, COP, False)
        rest = w * beta[:, None] - (w * scale[:, None]).to(DT).to(tl.float32) * mean[:, None]
        added += tl.where((tl.arange(0, 16) == tap)[:, None], tl.sum(rest, axis=0)[None, :], 0.0)
    return added


@triton.jit
def norm_by_pixel(by_tap, COP: tl.constexpr):
    """The same for each pixel that is inside, in each of a window's four places that see it: [16, 4 * COP]."""
    by_tap = tl.reshape(tl.broadcast_to(by_tap[:, None, :], (16, 4, COP)), (16, 4 * COP))
    pixel, place = tl.arange(0, 16)[:, None], tl.arange(0, 4 * COP)[None, :] // COP
    y, x = pixel % 4 - place // 2, pixel // 4 - place % 2
    return tl.gather(by_tap, tl.where((y >= 0) & (y < 3) & (x >= 0) & (x < 3), y * 3 + x, 15), 0)


@triton.jit
def add_norm(inside, added, acc, PRECISION: tl.constexpr, DT: tl.constexpr):
    """acc [BM, Q] and added [16, Q] of what is inside [16, BM]; half precision adds it as two numbers."""
    inside, high = tl.trans(inside), added.to(DT)  # [BM, 16]
    acc = parts.multiply(inside, high, acc, PRECISION)
    if DT != tl.float32:
        acc = parts.multiply(inside, (added - high.to(tl.float32)).to(DT), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=parts.COUNTS)
def forward(
    x_ptr, before, programs, windows, w_ptr, bias_ptr, p_ptr, code_ptr, part_ptr,
    N, H, W, image_of, row_of, tiles, slope, eps,
    CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, BM: tl.constexpr, PIXELS: tl.constexpr,
    WINDOW: tl.constexpr, AFFINE: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """One block without its norm, and the norm of the block before (AFFINE) in its weights. Grid (programs, E).

    Few input channels: a row of the matrix product is a window's 4 x 4 pixels, its columns the four places (WINDOW).
    Many: one product a tap, each pixel read once for the four places (PIXELS 16) or for each anew (1).
    """
    e, h, w = tl.program_id(1).to(tl.int64), H // 2, W // 2
    total = N * h * w
    xe, we = x_ptr + e * N * H * W * CI, w_ptr + e * 9 * CI * CO
    K: tl.constexpr = PIXELS * CIP if WINDOW else CIP
    k, o, scale = tl.arange(0, K)[:, None], tl.arange(0, COP), tl.full((K, 1), 1.0, tl.float32)
    if AFFINE:
        norm = parts.norm_of(before, programs, windows, N * H * W, eps, tl.arange(0, CIP), CI, OWN)
        added = norm_by_tap(we, norm, CI, CO, CIP, COP, DT)
        if WINDOW:
            added = norm_by_pixel(added, COP)
        scale = tl.reshape(tl.broadcast_to(norm[1][None, :], (K // CIP, CIP)), (K, 1))
    weights = parts.kept_weights(we, scale, CI, CO, CIP, COP, PIXELS, WINDOW, False, DT)
    mean, m2 = parts.zeros(2, BM, COP)
    start = tl.program_id(0) * tiles
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(total, BM))):
        image, i, j, exists = parts.tile_windows(tile, total, image_of, row_of, BM, WIDE)
        corner, seen = parts.view(image, i, j, exists, H, W)
        corner, seen = corner[None, :], seen[None, :]
        if WINDOW:
            acc = tl.zeros((BM, 4 * COP), tl.float32)
            if AFFINE:
                acc = add_norm(parts.inside(seen, tl.arange(0, 16)[:, None], DT), added, acc, PRECISION, DT)
            for first in tl.static_range(0, 16, PIXELS):
                a = parts.patch(xe, corner, seen, first, k, W, CI, CIP, DT)  # [K, BM]
                acc = parts.multiply(tl.trans(a), weights[first // PIXELS], acc, PRECISION)
            four = tl.reshape(acc, (BM, 4, COP))
            best, bits = tl.max(four, axis=1), (1 << tl.arange(0, 4))[None, :, None]
            place = tl.min(tl.where(four == best[:, None, :], bits, 8), axis=1)  # [BM, COP], the first maximum
        elif PIXELS == 16:
            four = ()
            for number in tl.static_range(4):
                acc = tl.zeros((BM, COP), tl.float32)
                if AFFINE:
                    acc = add_norm(parts.tap_inside(seen, number, DT), added, acc, PRECISION, DT)
                four += (acc,)
            for pixel in tl.static_range(16):
                a = parts.patch(xe, corner, seen, pixel, k, W, CI, CIP, DT)  # [K, BM]
                four = parts.spread(tl.trans(a), weights, four, pixel, PRECISION)
            best, place = four[0], tl.full((BM, COP), 1, tl.int32)
            for number in tl.static_range(1, 4):
                place = tl.where(four[number] > best, 1 << number, place)  # an equal one comes too late
                best = tl.maximum(four[number], best)
        else:
            best, place = tl.full((BM, COP), float("-inf"), tl.float32), tl.full((BM, COP), 1, tl.int32)
            for number in range(4):
                acc = tl.zeros((BM, COP), tl.float32)
                if AFFINE:
                    acc = add_norm(parts.tap_inside(seen, number, DT), added, acc, PRECISION, DT)
                for tap in range(9):
                    pixel = (number % 2 + tap % 3) * 4 + number // 2 + tap // 3
                    a = parts.patch(xe, corner, seen, pixel, k, W, CI, CIP, DT)  # [K, BM]
                    b = (parts.tap_weight(we, tap, CI, CO, CIP, COP, False) * scale).to(DT)
                    acc = parts.multiply(tl.trans(a), b, acc, PRECISION)
                place = tl.where(acc > best, 1 << number, place)
                best = tl.maximum(acc, best)
        offset = ((image * h + i) * w + j) * CO
        mean, m2 = finish_tile(
            best, place, exists, offset, o, bias_ptr + e * CO, p_ptr + e * total * CO,
            code_ptr + e * total * CO, tile - start, mean, m2, slope, CO, BIAS, OWN,
        )  # fmt: skip
    if OWN:
        store_statistics(part_ptr, tl.minimum(total - start * BM, tiles * BM), mean, m2, o, CO)


@triton.jit(do_not_specialize=parts.COUNTS)
def apply_norm(
    p_ptr, norm, programs, windows, y_ptr, total, eps,
    C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = (p - mean) * scale + beta of the last block. Grid (tiles of BM of an episode's `total` windows, E)."""
    e = tl.program_id(1).to(tl.int64)
    c, m = tl.arange(0, CP), tl.arange(0, BM)
    mean, scale, beta = parts.norm_of(norm, programs, windows, total, eps, c, C, OWN)
    if WIDE:
        m = m.to(tl.int64)
    m += tl.program_id(0) * BM
    at = e * total * C + m[:, None] * C + c[None, :]
    known = (m < total)[:, None] & (c < C)[None, :]
    y = (tl.load(p_ptr + at, mask=known, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :] + beta[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=known)
