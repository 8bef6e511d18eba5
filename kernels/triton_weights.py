"""Triton, backward: the weight's gradient in parts, then one kernel that adds them up and prepares the block before.

Parts of programs are [E, programs, pixels or taps, ...]; nothing is added atomically.
"""

import triton
import triton.language as tl

from mini_ht.kernels.triton_parts import multiply, patch, pooled_offset, tile_windows, winner_gradient


@triton.jit
def weight_window(
    x_ptr, scale_ptr, shift_ptr, g_ptr, p_ptr, code_ptr, abc_ptr, dw_ptr, db_ptr, N, H, W, tiles, slope,
    CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, BM: tl.constexpr, PIXELS: tl.constexpr,
    AFFINE: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    """Few channels: the transposed patch times the conv outputs' gradients of a window's four places.

    Grid (programs, E, 16 / PIXELS): parts [E, programs, 16, CIP, 4, COP].
    """
    s, e, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    h, w = H // 2, W // 2
    total = N * h * w
    out = e * total * CO
    o = tl.arange(0, COP)
    a = tl.load(abc_ptr + e * 3 * CO + o, mask=o < CO, other=0.0)[None, :]
    b = tl.load(abc_ptr + (e * 3 + 1) * CO + o, mask=o < CO, other=0.0)[None, :]
    c = tl.load(abc_ptr + (e * 3 + 2) * CO + o, mask=o < CO, other=0.0)[None, :]
    places = tl.arange(0, 4)[None, :, None]
    dw, db = tl.zeros((PIXELS * CIP, 4 * COP), tl.float32), tl.zeros((COP,), tl.float32)
    start = s * tiles
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(total, BM))):
        image, i, j, exists = tile_windows(tile, total, h, w, BM, WIDE)
        offset = pooled_offset(image, i, j, h, w, CO)[:, None] + o[None, :]
        known = exists[:, None] & (o < CO)[None, :]
        d, place = winner_gradient(g_ptr + out, p_ptr + out, code_ptr + out, offset, known, a, b, c, slope, OWN)
        dy = tl.where(place[:, None, :] == places, d[:, None, :], 0.0)  # [BM, 4, COP]
        rows = patch(
            x_ptr + e * N * H * W * CI, scale_ptr + e * CI, shift_ptr + e * CI, image, i, j, exists, chunk * PIXELS,
            H, W, CI, CIP, PIXELS, AFFINE, DT,
        )  # fmt: skip
        dw = multiply(tl.trans(rows), tl.reshape(dy, (BM, 4 * COP)).to(DT), dw, PRECISION)
        if BIAS:
            db += tl.sum(d, axis=0)
    part = e * tl.num_programs(0) + s
    k = chunk * PIXELS * CIP + tl.arange(0, PIXELS * CIP)
    tl.store(dw_ptr + part * 64 * CIP * COP + k[:, None] * (4 * COP) + tl.arange(0, 4 * COP)[None, :], dw)
    if BIAS:
        if chunk == 0:
            tl.store(db_ptr + part * CO + o, db, mask=o < CO)


@triton.jit
def weight_taps(
    x_ptr, scale_ptr, shift_ptr, g_ptr, p_ptr, code_ptr, abc_ptr, dw_ptr, db_ptr, N, H, W, tiles, slope,
    CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, BM: tl.constexpr, PIXELS: tl.constexpr,
    AFFINE: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    """Many channels: one row of taps a program; each place of a window has three pixels that it sees through them.

    Grid (programs, E, 3): parts [E, programs, 9, CIP, COP].
    """
    s, e, ky = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    h, w = H // 2, W // 2
    total = N * h * w
    out = e * total * CO
    o = tl.arange(0, COP)
    a = tl.load(abc_ptr + e * 3 * CO + o, mask=o < CO, other=0.0)[None, :]
    b = tl.load(abc_ptr + (e * 3 + 1) * CO + o, mask=o < CO, other=0.0)[None, :]
    c = tl.load(abc_ptr + (e * 3 + 2) * CO + o, mask=o < CO, other=0.0)[None, :]
    dw0, dw1 = tl.zeros((CIP, COP), tl.float32), tl.zeros((CIP, COP), tl.float32)
    dw2, db = tl.zeros((CIP, COP), tl.float32), tl.zeros((COP,), tl.float32)
    start = s * tiles
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(total, BM))):
        image, i, j, exists = tile_windows(tile, total, h, w, BM, WIDE)
        offset = pooled_offset(image, i, j, h, w, CO)[:, None] + o[None, :]
        known = exists[:, None] & (o < CO)[None, :]
        d, place = winner_gradient(g_ptr + out, p_ptr + out, code_ptr + out, offset, known, a, b, c, slope, OWN)
        for k in range(4):
            dy = tl.where(place == k, d, 0.0).to(DT)
            pixel = (ky + k // 2) * 4 + k % 2
            xb, scale, shift = x_ptr + e * N * H * W * CI, scale_ptr + e * CI, shift_ptr + e * CI
            rows = patch(xb, scale, shift, image, i, j, exists, pixel, H, W, CI, CIP, PIXELS, AFFINE, DT)
            dw0 = multiply(tl.trans(rows), dy, dw0, PRECISION)
            rows = patch(xb, scale, shift, image, i, j, exists, pixel + 1, H, W, CI, CIP, PIXELS, AFFINE, DT)
            dw1 = multiply(tl.trans(rows), dy, dw1, PRECISION)
            rows = patch(xb, scale, shift, image, i, j, exists, pixel + 2, H, W, CI, CIP, PIXELS, AFFINE, DT)
            dw2 = multiply(tl.trans(rows), dy, dw2, PRECISION)
        if BIAS:
            db += tl.sum(d, axis=0)
    part = e * tl.num_programs(0) + s
    base = dw_ptr + (part * 9 + ky * 3) * CIP * COP + tl.arange(0, CIP)[:, None] * COP + o[None, :]
    tl.store(base, dw0)
    tl.store(base + CIP * COP, dw1)
    tl.store(base + 2 * CIP * COP, dw2)
    if BIAS:
        if ky == 0:
            tl.store(db_ptr + part * CO + o, db, mask=o < CO)


@triton.jit
def add_parts(
    part_ptr, dw_ptr, tap, programs, CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """One tap of an episode's dw [9, CI, CO] from its programs' parts; a window's places use it on different pixels."""
    e = tl.program_id(1).to(tl.int64)
    q = tl.arange(0, CIP * COP)
    c, o = q // COP, q % COP
    total = tl.zeros((CIP * COP,), tl.float32)
    for s in range(programs):
        if WINDOW:
            base = part_ptr + (e * programs + s) * 64 * CIP * COP + o
            for place in tl.static_range(4):
                pixel = (tap // 3 + place // 2) * 4 + tap % 3 + place % 2
                total += tl.load(base + ((pixel * CIP + c) * 4 + place) * COP)
        else:
            total += tl.load(part_ptr + ((e * programs + s) * 9 + tap) * CIP * COP + q)
    dw = total.to(dw_ptr.dtype.element_ty)
    tl.store(dw_ptr + ((e * 9 + tap) * CI + c) * CO + o, dw, mask=(c < CI) & (o < CO))


@triton.jit
def add_rows(part_ptr, programs, at, step, known, BP: tl.constexpr):
    """Sum over programs of part[s * step + at], in order: [BP]."""
    total = tl.zeros((BP,), tl.float32)
    for s in range(programs):
        total += tl.load(part_ptr + s * step + at, mask=known, other=0.0)
    return total


@triton.jit
def finish_block(
    part_ptr, dw_ptr, programs, bias_part_ptr, db_ptr, sums_ptr, sums_programs, gamma_ptr, mean_ptr, variance_ptr,
    g_mean_ptr, g_variance_ptr, abc_ptr, totals_ptr, d_statistics_ptr, count, eps, stride,
    CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    WINDOW: tl.constexpr, WEIGHTS: tl.constexpr, BIAS: tl.constexpr, SUMS: tl.constexpr, OWN: tl.constexpr,
    USED: tl.constexpr,
):  # fmt: skip
    """Two jobs that wait for the same kernels. Grid (10 or, without WEIGHTS, 1; E).

    WEIGHTS: dw [E, 9, CI, CO] and db [E, CO] of a block. SUMS: for the block before it with C channels, from its sums
    of g and g * n: gradients of gamma and beta by episode (totals [2, E, stride]), the factors a, b, c of
    da = a * g + b * p + c (abc [E, 3, C]), and if its statistics were given (not OWN) their gradients [E, 2, C].
    USED: its returned statistics have gradients, too.
    """
    e = tl.program_id(1).to(tl.int64)
    job = tl.program_id(0)
    if WEIGHTS:
        if job < 9:
            add_parts(part_ptr, dw_ptr, job, programs, CI, CO, CIP, COP, WINDOW)
        elif BIAS:
            o = tl.arange(0, COP)
            db = add_rows(bias_part_ptr + e * programs * CO, programs, o, CO, o < CO, COP)
            tl.store(db_ptr + e * CO + o, db, mask=o < CO)
    if SUMS:
        if job == tl.num_programs(0) - 1:
            c = tl.arange(0, CP)
            at, known = e * C + c, c < C
            base = sums_ptr + e * sums_programs * 2 * C
            sum_g = add_rows(base, sums_programs, c, 2 * C, known, CP)
            sum_gn = add_rows(base, sums_programs, c + C, 2 * C, known, CP)
            r = 1.0 / tl.sqrt(tl.load(variance_ptr + at, mask=known, other=1.0) + eps)
            scale = tl.load(gamma_ptr + c, mask=known, other=0.0) * r
            tl.store(totals_ptr + e * stride + c, sum_gn, mask=known)
            tl.store(totals_ptr + (tl.num_programs(1) + e) * stride + c, sum_g, mask=known)
            g_mean, g_variance = tl.zeros((CP,), tl.float32), tl.zeros((CP,), tl.float32)
            if USED:
                g_mean = tl.load(g_mean_ptr + at, mask=known, other=0.0)
                g_variance = tl.load(g_variance_ptr + at, mask=known, other=0.0)
            b, c0 = tl.zeros((CP,), tl.float32), tl.zeros((CP,), tl.float32)
            if OWN:
                mean = tl.load(mean_ptr + at, mask=known, other=0.0)
                b = (2 * g_variance - scale * r * sum_gn) / count
                c0 = (g_mean - scale * sum_g) / count - b * mean
            else:
                tl.store(d_statistics_ptr + e * 2 * C + c, g_mean - scale * sum_g, mask=known)
                tl.store(d_statistics_ptr + (e * 2 + 1) * C + c, g_variance - scale * r * sum_gn / 2, mask=known)
            out = abc_ptr + e * 3 * C + c
            tl.store(out, scale, mask=known)
            tl.store(out + C, b, mask=known)
            tl.store(out + 2 * C, c0, mask=known)
