"""f32 to file blocks of 32 weights, eight blocks at a time, and to f16 and bf16.

q8_0, and q4_0 where no importance is given, round as llama.cpp does, bit for bit; the others look for the
scales that lose least.  Byte maps: `repack.py`.
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


def _put_blocks(format_name):
    """Return put(out, scratch): the codes of eight blocks, and the f16 that lie at NUMBERS."""
    put = put_codes(format_name)
    nbytes = FORMATS[format_name].nbytes
    n_scales = len(FORMATS[format_name].float_places)

    @inline
    def put_all(out, scratch):
        for block in range(8):
            to = out + block * nbytes
            for i in range(n_scales):
                store_i16(to + 2 * i, load_i16(scratch + NUMBERS + 16 * i + 2 * block))
            put(to, scratch + CODES + 32 * block)

    return put_all


# --- rounding as llama.cpp does -------------------------------------------------------------------
@inline
def encode_q8_0(out, x, weights, scratch):
    """d = max|x| / 127; halves round away from zero."""
    side_by_side(scratch + X, x, 32)
    d = divide(absolute(peak(scratch + X, 32)), splat_f32(np.float32(127.0)))
    store_f16x8(scratch + NUMBERS, d)
    scale = inverse(d)
    for i in range(0, 32, 4):
        word = splat_i32(0)
        for k in range(4):
            v = load_f32x8(scratch + X + 32 * (i + k)) * scale
            whole = truncate(v)
            rest = v - to_f32(whole)
            q = whole + truncate(rest + rest)
            word = word + (q + splat_i32(128)) * splat_i32(1 << 8 * k)
        scatter_i32x8(scratch + CODES + i, 32, word)
    for block in range(8):
        to = out + block * 34
        store_i16(to, load_i16(scratch + NUMBERS + 2 * block))
        for k in range(8):
            codes = load_u32(scratch + CODES + 32 * block + 4 * k)
            store_i32(to + 2 + 4 * k, codes ^ 0x80808080)


def _plain_q4_0():
    put_blocks = _put_blocks("q4_0")

    @inline
    def encode(out, x, scratch):
        """d = x / -8 of the largest; x / d + 8.5 is cut off."""
        d = divide(peak(scratch + X, 32), splat_f32(np.float32(-8.0)))
        store_f16x8(scratch + NUMBERS, d)
        scale = inverse(d)
        half = splat_f32(np.float32(8.5))
        most = splat_f32(np.float32(15.0))
        for i in range(0, 32, 4):
            word = splat_i32(0)
            for k in range(4):
                v = load_f32x8(scratch + X + 32 * (i + k)) * scale + half
                word = word + truncate(minimum(v, most)) * splat_i32(1 << 8 * k)
            scatter_i32x8(scratch + CODES + i, 32, word)
        put_blocks(out, scratch)

    return encode


# --- searching ------------------------------------------------------------------------------------
def _scaled(format_name, grid, trials):
    """Formats d * q."""
    fit = fit_scale(grid, 32, trials, True)
    put = put_lanes(grid, 32)
    put_blocks = _put_blocks(format_name)

    @inline
    def encode(out, x, weights, scratch):
        load_weights(scratch, weights, 32)
        d = fit(scratch + X, scratch + W)
        store_f16x8(scratch + NUMBERS, d)
        put(scratch + CODES, scratch + X, inverse(d), zero_f32x8())
        put_blocks(out, scratch)

    return encode


def _with_minimum(format_name, grid, trials):
    """Formats d * q + m."""
    fit = fit_line(grid, 32, trials, True)
    put = put_lanes(grid, 32)
    put_blocks = _put_blocks(format_name)

    @inline
    def encode(out, x, weights, scratch):
        load_weights(scratch, weights, 32)
        d, m = fit(scratch + X, scratch + W)
        store_f16x8(scratch + NUMBERS, d)
        store_f16x8(scratch + NUMBERS + 16, m)
        put(scratch + CODES, scratch + X, inverse(d), m)
        put_blocks(out, scratch)

    return encode


def _mxfp4():
    """Formats with a power of two for a scale: three of them are tried."""
    put = put_lanes(E2M1, 32)
    put_planes = put_codes("mxfp4")
    add_up = sums_and_loss(E2M1, 32)

    @inline
    def encode(out, x, weights, scratch):
        load_importance(scratch, weights, 32)
        # The largest is at most 2^(e - 125), the largest code 12 * 2^(e - 128).
        e = exponent(peak(scratch + X, 32)) - splat_f32(np.float32(3.0))
        best_e = zero_f32x8()
        least = splat_f32(np.float32(3e38))
        for _round in range(3):
            e = maximum(e, zero_f32x8())
            store_rounded_i8x8(scratch + NUMBERS, e)
            d = load_e8m0x8(scratch + NUMBERS)
            _, _, _, _, lost = add_up(scratch + X, scratch + W, d, zero_f32x8())
            best_e = where_greater(least, lost, e, best_e)
            least = minimum(least, lost)
            e = e + splat_f32(np.float32(1.0))
        store_rounded_i8x8(scratch + NUMBERS, best_e)
        scale = inverse(load_e8m0x8(scratch + NUMBERS))
        put(scratch + CODES, scratch + X, scale, zero_f32x8())
        for block in range(8):
            store_i8(out + 17 * block, load_u8(scratch + NUMBERS + block))
            put_planes(out + 17 * block, scratch + CODES + 32 * block)

    return encode


def _searching(search, plain=None):
    @inline
    def encode(out, x, weights, scratch):
        side_by_side(scratch + X, x, 32)
        search(out, x, weights, scratch)

    @inline
    def encode_or_round(out, x, weights, scratch):
        side_by_side(scratch + X, x, 32)
        if weights == 0:
            plain(out, x, scratch)
        else:
            search(out, x, weights, scratch)

    return encode if plain is None else encode_or_round


# --- floats ---------------------------------------------------------------------------------------
@inline
def encode_f16(out, x, weights, scratch):
    for i in range(0, TILE, 8):
        v = load_f32x8(x + 4 * i)
        store_f16x8(out + 2 * i, v)


@inline
def encode_bf16(out, x, weights, scratch):
    for i in range(0, TILE, 8):
        v = load_f32x8(x + 4 * i)
        store_bf16x8(out + 2 * i, v)


# What f16 scales reach; bf16: what is larger rounds to infinity; mxfp4: squares would overflow.
_LARGEST = {
    "f16": 65519.0, "bf16": 3.396e38, "q8_0": 127 * 65504.0, "q4_0": 8 * 65504.0,
    "q5_0": 16 * 65504.0, "iq4_nl": 127 * 65504.0, "q4_1": 65504.0, "q5_1": 65504.0, "mxfp4": 1e15,
}  # fmt: skip


def encode(format_name):
    """Return `encode[format]`; arguments: `tile.over_tiles`."""
    match format_name:
        case "f16":
            one = encode_f16
        case "bf16":
            one = encode_bf16
        case "q8_0":
            one = encode_q8_0
        case "mxfp4":
            one = _searching(_mxfp4())
        case "q4_0":
            search = _scaled("q4_0", integers(-8, 7), SIGNED)
            one = _searching(search, _plain_q4_0())
        case "q5_0":
            one = _searching(_scaled("q5_0", integers(-16, 15), SIGNED))
        case "iq4_nl":
            one = _searching(_scaled("iq4_nl", IQ4, CODE_BOOK))
        case "q4_1":
            one = _searching(_with_minimum("q4_1", integers(0, 15), LINE))
        case "q5_1":
            one = _searching(_with_minimum("q5_1", integers(0, 31), LINE))
    format_ = FORMATS[format_name]
    return over_tiles(one, format_.n_weights, format_.nbytes, _LARGEST[format_name])
