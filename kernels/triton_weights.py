"""Triton, backward: gradients of norm and weights by program, and one kernel in the end that adds them up.

Parts of programs are [E, programs, pixels or taps, ...]; nothing is added atomically.
"""

import triton
import triton.language as tl

from mini_ht.kernels import triton_parts as parts


@triton.jit
def norm_gradient(
    norm, g_norm, programs, count, eps, stride,
    C: tl.constexpr, CP: tl.constexpr, OWN: tl.constexpr, USED: tl.constexpr,
):  # fmt: skip
    """The factors a, b, c [CP] of a block's da = a * g + b * p + c, from its sums of g and g * n by program.

    The first program of an episode keeps its gradients of gamma and beta (totals [2, E, stride]), and if statistics
    were given (not OWN) theirs [E, 2, C]. USED: those that were returned have gradients, too.
    """
    _, gamma_ptr, _, mean_ptr, variance_ptr = norm
    sums_ptr, g_mean_ptr, g_variance_ptr, totals_ptr, d_statistics_ptr = g_norm
    e = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CP)
    at, known = e * C + c, c < C
    sum_g = parts.add_rows(sums_ptr + e * programs * 2 * C, programs, 2 * C, c, known)
    sum_gn = parts.add_rows(sums_ptr + e * programs * 2 * C + C, programs, 2 * C, c, known)
    r = 1.0 / tl.sqrt(tl.load(variance_ptr + at, mask=known, other=1.0) + eps)
    a = tl.load(gamma_ptr + c, mask=known, other=0.0) * r
    g_mean = tl.load(g_mean_ptr + at, mask=known & USED, other=0.0)
    g_variance = tl.load(g_variance_ptr + at, mask=known & USED, other=0.0)
    b, c0 = tl.zeros((CP,), tl.float32), tl.zeros((CP,), tl.float32)
    if OWN:
        b = (2 * g_variance - a * r * sum_gn) / count
        c0 = (g_mean - a * sum_g) / count - b * tl.load(mean_ptr + at, mask=known, other=0.0)
    if tl.program_id(0) + tl.program_id(2) == 0:
        tl.store(totals_ptr + e * stride + c, sum_gn, mask=known)
        tl.store(totals_ptr + (tl.num_programs(1) + e) * stride + c, sum_g, mask=known)
        if not OWN:
            tl.store(d_statistics_ptr + e * 2 * C + c, g_mean - a * sum_g, mask=known)
            tl.store(d_statistics_ptr + (e * 2 + 1) * C + c, g_variance - a * r * sum_gn / 2, mask=known)
    return a[None, :], b[None, :], c0[None, :]


@triton.jit
def four_places(d, place, BM: tl.constexpr, COP: tl.constexpr, DT: tl.constexpr):
    """d [BM, COP] at the place of four that won, 0 at the others: [BM, 4 * COP], a channel's places side by side."""
    left = tl.join(tl.where(place == 1, d, 0.0), tl.where(place == 4, d, 0.0))
    right = tl.join(tl.where(place == 2, d, 0.0), tl.where(place == 8, d, 0.0))
    dy = tl.reshape(tl.join(left, right), (BM, 4 * COP))  # [BM, COP, 2, 2]
    if DT == tl.float32:
        dy += 0.0  # triton 3.9 cannot lay out what is multiplied straight behind a reshape
    return dy.to(DT)


@triton.jit
def collect(rows, dy, dw, pixel: tl.constexpr, PRECISION: tl.constexpr):
    """Add what one of 4 x 2 pixels, rows [CIP, BM], is worth for each of three taps with which a place sees it."""
    more = ()
    for tap in tl.static_range(3):
        total = dw[tap]
        for place in tl.static_range(4):
            if pixel == (tap + place % 2) * 2 + place // 2:
                total = parts.multiply(rows, dy[place], total, PRECISION)
        more += (total,)
    return more


@triton.jit(do_not_specialize=parts.COUNTS)
def weight_gradient(
    x_ptr, before, g_ptr, p_ptr, code_ptr, norm, g_norm, programs, stride, dw_ptr, db_ptr, d_ptr,
    N, H, W, image_of, row_of, tiles, slope, eps,
    CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr, BM: tl.constexpr, PIXELS: tl.constexpr,
    WINDOW: tl.constexpr, AFFINE: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, USED: tl.constexpr,
    KEEP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Shares of dw and db by program, and (KEEP) the gradient in the largest conv output of each window.

    Up to 32 channels (WINDOW): the transposed patch times the gradients of a window's four places. Grid (programs, E,
    16 / PIXELS), parts [E, programs, 16, CIP, COP, 4]. More: one product for each place and each tap of a row, a pixel
    read once (PIXELS 16) or for each place anew (1). Grid (programs, E, 3), parts [E, programs, 9, CIP, COP].
    """
    s, e = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = 0 if WINDOW and PIXELS == 16 else tl.program_id(2) * (PIXELS if WINDOW else 1)
    h, w = H // 2, W // 2
    total = N * h * w
    xe, out, part = x_ptr + e * N * H * W * CI, e * total * CO, e * tl.num_programs(0) + s
    K: tl.constexpr = PIXELS * CIP if WINDOW else CIP
    k, o = tl.arange(0, K)[:, None], tl.arange(0, COP)
    a, b, c = norm_gradient(norm, g_norm, programs, total, eps, stride, CO, COP, OWN, USED)
    dw, db = parts.zeros(1 if WINDOW else 3, K, 4 * COP if WINDOW else COP), tl.zeros((COP,), tl.float32)
    dy_inside = tl.zeros((16, 4 * COP if WINDOW else COP), tl.float32)  # what the norm of x adds to, in the end
    start = s * tiles
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(total, BM))):
        image, i, j, exists = parts.tile_windows(tile, total, image_of, row_of, BM, WIDE)
        corner, seen = parts.view(image, i, j, exists, H, W)
        corner, seen = corner[None, :], seen[None, :]
        offset = out + (((image * h + i) * w + j) * CO)[:, None] + o[None, :]
        known = exists[:, None] & (o < CO)[None, :]
        d = tl.load(g_ptr + offset, mask=known, other=0.0).to(tl.float32) * a
        if OWN:  # given statistics do not depend on p
            d += tl.load(p_ptr + offset, mask=known, other=0.0).to(tl.float32) * b + c
        code = tl.load(code_ptr + offset, mask=known, other=0).to(tl.int32)  # of no place where nothing is known
        d = tl.where((code & 16) != 0, d, d * slope)  # [BM, COP], behind norm and activation
        if WINDOW:
            rows, dy = parts.patch(xe, corner, seen, first, k, W, CI, CIP, DT), four_places(d, code & 15, BM, COP, DT)
            dw = (parts.multiply(rows, dy, dw[0], PRECISION),)
            if AFFINE:
                inside = parts.inside(seen, first + tl.arange(0, 16)[:, None] * PIXELS // 16, DT)
                dy_inside = parts.multiply(inside, dy, dy_inside, PRECISION)
        elif PIXELS == 16:
            dy = ()
            for number in tl.static_range(4):
                dy += (tl.where((code & 1 << number) != 0, d, 0.0).to(DT),)
            for pixel in tl.static_range(8):
                at = pixel // 2 * 4 + first + pixel % 2
                dw = collect(parts.patch(xe, corner, seen, at, k, W, CI, CIP, DT), dy, dw, pixel, PRECISION)
            if AFFINE:
                for number in tl.static_range(4):
                    inside = parts.tap_inside(seen, number, DT)
                    dy_inside = parts.multiply(inside, dy[number], dy_inside, PRECISION)
        else:
            for number in range(4):
                dy = tl.where((code & 1 << number) != 0, d, 0.0).to(DT)
                more = ()
                for tap in tl.static_range(3):
                    at = (number % 2 + tap) * 4 + first + number // 2
                    rows = parts.patch(xe, corner, seen, at, k, W, CI, CIP, DT)
                    more += (parts.multiply(rows, dy, dw[tap], PRECISION),)
                dw = more
                if AFFINE:
                    dy_inside = parts.multiply(parts.tap_inside(seen, number, DT), dy, dy_inside, PRECISION)
        if KEEP:
            if first == 0:
                tl.store(d_ptr + offset, d.to(DT), mask=known)
        if BIAS:
            db += tl.sum(tl.where(known, d, 0.0), axis=0)
    if AFFINE:
        mean, scale, beta = parts.norm_of(before, 0, 0, 0, eps, k % CIP, CI, False)
    if WINDOW:
        (total_dw,) = dw
        if AFFINE:
            dy_inside = tl.reshape(tl.broadcast_to(dy_inside[:, None, :], (16, K // 16, 4 * COP)), (K, 4 * COP))
            total_dw = total_dw * scale + dy_inside * (beta - mean * scale)
        at = k * (4 * COP) + tl.arange(0, 4 * COP)[None, :]
        tl.store(dw_ptr + (part * 16 + first) * CIP * 4 * COP + at, total_dw)
    else:
        for tap in tl.static_range(3):
            total_dw = dw[tap]
            if AFFINE:
                mine = tl.where(tl.arange(0, 16)[:, None] == first * 3 + tap, dy_inside, 0.0)
                total_dw = total_dw * scale + tl.sum(mine, axis=0, keep_dims=True) * (beta - mean * scale)
            tl.store(dw_ptr + (part * 9 + first * 3 + tap) * CIP * COP + k * COP + o[None, :], total_dw)
    if BIAS:
        if first == 0:
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
            base = part_ptr + (e * programs + s) * 64 * CIP * COP + 4 * o
            for place in tl.static_range(4):
                pixel = (tap % 3 + place % 2) * 4 + tap // 3 + place // 2
                total += tl.load(base + (pixel * CIP + c) * 4 * COP + place)
        else:
            total += tl.load(part_ptr + ((e * programs + s) * 9 + tap) * CIP * COP + q)
    dw = total.to(dw_ptr.dtype.element_ty)
    tl.store(dw_ptr + ((e * 9 + tap) * CI + c) * CO + o, dw, mask=(c < CI) & (o < CO))


@triton.jit(do_not_specialize=parts.COUNTS)
def add_up(
    totals_ptr, sums_ptr, stride, dw_parts, d_weights, counts, db_parts, d_biases,
    COUNT: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, CIP: tl.constexpr, COP: tl.constexpr,
    WINDOW: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """All that only has to be added, for COUNT blocks at once, each with its own constants. Grid (10, E, COUNT).

    dw [E, 9, CI, CO] and db [E, CO] from parts of `counts` programs; sums [COUNT, 2, stride] of gamma and beta.
    """
    job, e, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    for k in tl.static_range(COUNT):
        if block == k:
            if job < 9:
                add_parts(dw_parts[k], d_weights[k], job, counts[k], CI[k], CO[k], CIP[k], COP[k], WINDOW[k])
            else:
                o = tl.arange(0, COP[k])
                known = o < CO[k]
                if BIAS:
                    db = parts.add_rows(db_parts[k] + e * counts[k] * CO[k], counts[k], CO[k], o, known)
                    tl.store(d_biases[k] + e * CO[k] + o, db, mask=known)
                if e == 0:
                    for part in tl.static_range(2):
                        at = (k * 2 + part) * stride
                        from_episodes = totals_ptr + at * tl.num_programs(1).to(tl.int64)
                        total = parts.add_rows(from_episodes, tl.num_programs(1), stride, o, known)
                        tl.store(sums_ptr + at + o, total, mask=known)
