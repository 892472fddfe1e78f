"""f32 to file blocks of 256 weights, whose sub-blocks have small integers for scales.

Sub-blocks lie in lanes.  First each finds the scale (and minimum) it would like; then rounds alternate
between the integers of all sub-blocks given d (and dmin), and d given the integers (least squares).
Losses are exact: with d as f16 holds it.  Byte maps: `repack.py`.
"""

from __future__ import annotations

import numpy as np

from .blocks import FORMATS
from .fit import *
from .lanes import *
from .planes import put_codes
from .simd import *
from .simd import inline
from .tile import *

_ROUNDS = 3
_LARGEST = 9e5  # f16 scales reach further, in some formats much; no model's weights do
# In scratch behind the codes, f32 (16,) each: what sub-blocks would like, what they get, the best yet.
S, M, SC, MC, BEST_SC, BEST_MC, HALF = (NUMBERS + 64 * i for i in range(7))


@inline
def rounded(d):
    """A scalar as f16 holds it."""
    return first_lane(as_f16(within_f16(splat_f32(d))))


@inline
def keep_best(scratch):
    for i in range(0, 64, 32):
        store_f32x8(scratch + BEST_SC + i, load_f32x8(scratch + SC + i))
        store_f32x8(scratch + BEST_MC + i, load_f32x8(scratch + MC + i))


@inline
def largest_of(at, n):
    """The one of largest magnitude among f32 (n,)."""
    top = np.float32(0)
    for i in range(n):
        v = load_f32(at + 4 * i)
        if max(v, -v) > max(top, -top):
            top = v
    return top


# --- d * sc * q -----------------------------------------------------------------------------------
def _signed(format_name, grid, n, trials, sc_low, sc_high, write_head):
    n_subs = TILE // n
    fit = fit_scale(grid, n, trials, False)
    put = put_lanes(grid, n)
    put_planes = put_codes(format_name)
    add_up = sums_and_loss(grid, n)
    nearest_sc = integers(sc_low, sc_high).nearest

    @inline
    def choose(x, w, wanted, d):
        """The integer near wanted / d that loses least, and its loss."""
        middle = nearest_sc(wanted * inverse(d))
        best = middle
        least = splat_f32(np.float32(3e38))
        for i in range(-1, 2):
            sc = nearest_sc(middle + splat_f32(np.float32(i)))
            _, _, _, _, lost = add_up(x, w, d * sc, zero_f32x8())
            best = where_greater(least, lost, sc, best)
            least = minimum(least, lost)
        return best, least

    @inline
    def encode(out, x, weights, scratch):
        side_by_side(scratch + X, x, n)
        load_weights(scratch, weights, n)
        for g in range(n_subs // 8):
            at = 32 * n * g
            store_f32x8(scratch + S + 32 * g, fit(scratch + X + at, scratch + W + at))
        d = largest_of(scratch + S, n_subs) / np.float32(sc_low)
        best_d = np.float32(0)
        least = np.float32(3e38)
        for _round in range(_ROUNDS):
            d = rounded(d)
            lost = qx = qq = np.float32(0)
            for g in range(n_subs // 8):
                xg = scratch + X + 32 * n * g
                wg = scratch + W + 32 * n * g
                sc, lost8 = choose(xg, wg, load_f32x8(scratch + S + 32 * g), splat_f32(d))
                store_f32x8(scratch + SC + 32 * g, sc)
                _, qq8, qx8, _, _ = add_up(xg, wg, splat_f32(d) * sc, zero_f32x8())
                lost += sum_lanes(lost8)
                qx += sum_lanes(qx8 * sc)
                qq += sum_lanes(qq8 * sc * sc)
            if lost < least:
                least = lost
                best_d = d
                keep_best(scratch)
            d = qx / qq if qq > np.float32(1e-30) else d
        for g in range(n_subs // 8):
            sc = load_f32x8(scratch + BEST_SC + 32 * g)
            to_q = inverse(splat_f32(best_d) * sc)
            codes = scratch + CODES + 8 * n * g
            put(codes, scratch + X + 32 * n * g, to_q, zero_f32x8())
        store_f16x8(scratch + HALF, splat_f32(best_d))
        put_planes(out, scratch + CODES)
        write_head(out, scratch)

    return encode


@inline
def scale_at(scratch, place, i):
    return np.int64(load_f32(scratch + place + 4 * i))


@inline
def head_q3_k(out, scratch):
    for i in range(12):
        store_i8(out + 96 + i, 0)
    for i in range(16):
        sc = scale_at(scratch, BEST_SC, i) + 32
        low = out + 96 + i % 8
        high = out + 104 + i % 4
        store_i8(low, load_u8(low) | (sc & 15) << 4 * (i // 8))
        store_i8(high, load_u8(high) | sc >> 4 << 2 * (i // 4))
    store_i16(out + 108, load_i16(scratch + HALF))


@inline
def head_q6_k(out, scratch):
    for i in range(16):
        store_i8(out + 192 + i, scale_at(scratch, BEST_SC, i))
    store_i16(out + 208, load_i16(scratch + HALF))


@inline
def head_iq4_xs(out, scratch):
    store_i16(out, load_i16(scratch + HALF))
    high = 0
    for i in range(8):
        sc = scale_at(scratch, BEST_SC, i) + 32
        high |= sc >> 4 << 2 * i
        low = out + 4 + i // 2
        store_i8(low, sc & 15 if i % 2 == 0 else load_u8(low) | (sc & 15) << 4)
    store_i16(out + 2, high)


# --- d * sc * q - dmin * m ------------------------------------------------------------------------
def _with_minimum(format_name, grid, n, trials, sc_high, write_head):
    n_subs = TILE // n
    fit = fit_line(grid, n, trials, False)
    put = put_lanes(grid, n)
    put_planes = put_codes(format_name)
    add_up = sums_and_loss(grid, n)
    nearest_sc = integers(0, sc_high).nearest

    @inline
    def choose(x, w, wanted, wanted_m, d, dmin, ww, wx):
        """Integers near wanted / d and wanted_m / dmin, and their loss."""
        to_m = inverse(dmin)
        middle = nearest_sc(wanted * inverse(d))
        first_m = nearest_sc(wanted_m * to_m)
        best = middle
        best_m = first_m
        least = splat_f32(np.float32(3e38))
        for i in range(-1, 2):
            sc = nearest_sc(middle + splat_f32(np.float32(i)))
            scale = d * sc
            q1, _, _, _, _ = add_up(x, w, scale, zero_f32x8() - dmin * first_m)
            m = nearest_sc((scale * q1 - wx) * inverse(ww) * to_m)
            _, _, _, _, lost = add_up(x, w, scale, zero_f32x8() - dmin * m)
            best = where_greater(least, lost, sc, best)
            best_m = where_greater(least, lost, m, best_m)
            least = minimum(least, lost)
        return best, best_m, least

    @inline
    def encode(out, x, weights, scratch):
        side_by_side(scratch + X, x, n)
        load_weights(scratch, weights, n)
        for g in range(n_subs // 8):
            at = 32 * n * g
            s, m = fit(scratch + X + at, scratch + W + at)
            store_f32x8(scratch + S + 32 * g, s)
            store_f32x8(scratch + M + 32 * g, zero_f32x8() - m)
        d = largest_of(scratch + S, n_subs) / np.float32(sc_high)
        dmin = largest_of(scratch + M, n_subs) / np.float32(sc_high)
        best_d = best_dmin = np.float32(0)
        least = np.float32(3e38)
        for _round in range(_ROUNDS):
            d = rounded(d)
            dmin = rounded(dmin)
            lost = np.float32(0)
            aa = ab = bb = ax = bx = np.float32(0)  # of x ~ d * a - dmin * b
            for g in range(n_subs // 8):
                xg = scratch + X + 32 * n * g
                wg = scratch + W + 32 * n * g
                ww = zero_f32x8()
                wx = zero_f32x8()
                for k in range(n):
                    v = load_f32x8(wg + 32 * k)
                    ww = ww + v
                    wx = wx + v * load_f32x8(xg + 32 * k)
                sc, m, lost8 = choose(
                    xg, wg, load_f32x8(scratch + S + 32 * g), load_f32x8(scratch + M + 32 * g),
                    splat_f32(d), splat_f32(dmin), ww, wx,
                )  # fmt: skip
                minus = zero_f32x8() - splat_f32(dmin) * m
                q1, qq, qx, _, _ = add_up(xg, wg, splat_f32(d) * sc, minus)
                qx = qx + minus * q1  # of x itself
                store_f32x8(scratch + SC + 32 * g, sc)
                store_f32x8(scratch + MC + 32 * g, m)
                lost += sum_lanes(lost8)
                aa += sum_lanes(qq * sc * sc)
                ab += sum_lanes(q1 * sc * m)
                bb += sum_lanes(ww * m * m)
                ax += sum_lanes(qx * sc)
                bx += sum_lanes(wx * m)
            if lost < least:
                least = lost
                best_d = d
                best_dmin = dmin
                keep_best(scratch)
            determinant = aa * bb - ab * ab
            if determinant > np.float32(1e-6) * aa * bb:
                d = (ax * bb - bx * ab) / determinant
                dmin = (ax * ab - bx * aa) / determinant
            elif aa > np.float32(1e-30):
                d = ax / aa
            dmin = max(dmin, np.float32(0))
            d = max(d, np.float32(0))
        for g in range(n_subs // 8):
            to_q = inverse(splat_f32(best_d) * load_f32x8(scratch + BEST_SC + 32 * g))
            m = splat_f32(-best_dmin) * load_f32x8(scratch + BEST_MC + 32 * g)
            put(scratch + CODES + 8 * n * g, scratch + X + 32 * n * g, to_q, m)
        store_f16x8(scratch + HALF, splat_f32(best_d))
        store_f16x8(scratch + HALF + 16, splat_f32(best_dmin))
        put_planes(out, scratch + CODES)
        write_head(out, scratch)

    return encode


@inline
def head_q2_k(out, scratch):
    for i in range(16):
        both = scale_at(scratch, BEST_SC, i) | scale_at(scratch, BEST_MC, i) << 4
        store_i8(out + i, both)
    store_i16(out + 80, load_i16(scratch + HALF))
    store_i16(out + 82, load_i16(scratch + HALF + 16))


@inline
def head_k4(out, scratch):
    """d, dmin, and 8 six-bit scales and 8 six-bit minima in 12 bytes (q4_k, q5_k)."""
    store_i16(out, load_i16(scratch + HALF))
    store_i16(out + 2, load_i16(scratch + HALF + 16))
    for j in range(4):
        sc = scale_at(scratch, BEST_SC, j + 4)
        m = scale_at(scratch, BEST_MC, j + 4)
        store_i8(out + 4 + j, scale_at(scratch, BEST_SC, j) | sc >> 4 << 6)
        store_i8(out + 8 + j, scale_at(scratch, BEST_MC, j) | m >> 4 << 6)
        store_i8(out + 12 + j, sc & 15 | (m & 15) << 4)


def encode(format_name):
    """Return `encode[format]`; arguments: `tile.over_tiles`."""
    match format_name:
        case "q2_k":
            grid, trials = integers(0, 3), COARSE_LINE
            one = _with_minimum("q2_k", grid, 16, trials, 15, head_q2_k)
        case "q4_k":
            grid, trials = integers(0, 15), LINE
            one = _with_minimum("q4_k", grid, 32, trials, 63, head_k4)
        case "q5_k":
            grid, trials = integers(0, 31), LINE
            one = _with_minimum("q5_k", grid, 32, trials, 63, head_k4)
        case "q3_k":
            one = _signed("q3_k", integers(-4, 3), 16, SIGNED, -32, 31, head_q3_k)
        case "q6_k":
            one = _signed("q6_k", integers(-32, 31), 16, SIGNED, -128, 127, head_q6_k)
        case "iq4_xs":
            one = _signed("iq4_xs", IQ4, 32, CODE_BOOK, -32, 31, head_iq4_xs)
    return over_tiles(one, 256, FORMATS[format_name].nbytes, _LARGEST)
