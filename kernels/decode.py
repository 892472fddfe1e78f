"""File blocks to f32, exactly as the format says: what an encoded tensor is judged by.

x = d * (number - offset) + m, d and m per sub-block; numbers are codes, or what a code book says.
Byte maps: `repack.py`.
"""

from __future__ import annotations

import numpy as np

from .blocks import FORMATS
from .lanes import load_f16, store_bytes16
from .planes import take_codes
from .simd import *
from .simd import inline

_NUMBERS, _D, _M = 0, 256, 320  # places in scratch: i8 (256,), d f32 (16,), m f32 (16,)
SCRATCH_NBYTES = 512
_OFFSETS = {"q4_0": 8, "q5_0": 16, "q3_k": 4, "q6_k": 32, "mxfp4": 12}


@inline
def line(scratch, i, d, m):
    store_f32(scratch + _D + 4 * i, d)
    store_f32(scratch + _M + 4 * i, m)


# --- d and m of the sub-blocks --------------------------------------------------------------------
@inline
def lines_d(scratch, block):
    line(scratch, 0, load_f16(block), np.float32(0))


@inline
def lines_d_m(scratch, block):
    line(scratch, 0, load_f16(block), load_f16(block + 2))


@inline
def lines_mxfp4(scratch, block):
    line(scratch, 0, first_lane(load_e8m0x8(block)), np.float32(0))


@inline
def lines_q2_k(scratch, block):
    d = load_f16(block + 80)
    dmin = load_f16(block + 82)
    for i in range(16):
        both = load_u8(block + i)
        line(scratch, i, d * np.float32(both & 15), -(dmin * np.float32(both >> 4)))


@inline
def lines_q3_k(scratch, block):
    d = load_f16(block + 108)
    s = block + 96
    for i in range(16):
        low = load_u8(s + i % 8) >> 4 * (i // 8) & 15
        high = load_u8(s + 8 + i % 4) >> 2 * (i // 4) & 3
        line(scratch, i, d * np.float32((low | high << 4) - 32), np.float32(0))


@inline
def lines_k4(scratch, block):
    d = load_f16(block)
    dmin = load_f16(block + 2)
    s = block + 4
    for j in range(4):
        sc = load_u8(s + j)
        m = load_u8(s + 4 + j)
        both = load_u8(s + 8 + j)
        line(scratch, j, d * np.float32(sc & 63), -(dmin * np.float32(m & 63)))
        sc = both & 15 | sc >> 6 << 4
        m = both >> 4 | m >> 6 << 4
        line(scratch, j + 4, d * np.float32(sc), -(dmin * np.float32(m)))


@inline
def lines_q6_k(scratch, block):
    d = load_f16(block + 208)
    for i in range(16):
        line(scratch, i, d * np.float32(load_i8(block + 192 + i)), np.float32(0))


@inline
def lines_iq4_xs(scratch, block):
    d = load_f16(block)
    high = load_i16(block + 2)
    for i in range(8):
        low = load_u8(block + 4 + i // 2) >> 4 * (i % 2) & 15
        line(scratch, i, d * np.float32((low | (high >> 2 * i & 3) << 4) - 32), np.float32(0))


_LINES = {
    "q4_1": lines_d_m, "q5_1": lines_d_m, "mxfp4": lines_mxfp4, "q2_k": lines_q2_k,
    "q3_k": lines_q3_k, "q4_k": lines_k4, "q5_k": lines_k4, "q6_k": lines_q6_k,
    "iq4_xs": lines_iq4_xs,
}  # fmt: skip


# --- codes to numbers -----------------------------------------------------------------------------
@inline
def numbers_q8_0(scratch, block):
    store_bytes32(scratch, load_bytes32(block + 2))


def _numbers(format_name):
    """Return write(scratch, block): the numbers i8 of a block."""
    take = take_codes(format_name)
    n = FORMATS[format_name].n_weights
    is_iq4 = format_name.startswith("iq4")
    is_mxfp4 = format_name == "mxfp4"

    @inline
    def write(scratch, block):
        take(scratch, block)
        if is_iq4:
            for i in range(0, n, 16):
                store_bytes16(scratch + i, iq4_table(load_bytes16(scratch + i)))
        if is_mxfp4:
            store_bytes32(scratch, mxfp4_table(load_bytes32(scratch)))

    return write


def decode(format_name):
    """Return `decode[format]`: out f32 (n_blocks, weights of a block), in parts of `per_part` blocks."""
    format_ = FORMATS[format_name]
    n, nbytes = format_.n_weights, format_.nbytes
    n_sub = 16 if format_name in ("q2_k", "q3_k", "q6_k") else 32
    lines = _LINES.get(format_name, lines_d)
    numbers = numbers_q8_0 if format_name == "q8_0" else _numbers(format_name)
    offset = np.float32(_OFFSETS.get(format_name, 0))

    def operation(step, part, first, count, scratch, out, blocks, n_blocks, per_part):
        begin = part * per_part
        for i in range(begin, min(begin + per_part, n_blocks)):
            block = blocks + i * nbytes
            to = out + i * n * 4
            numbers(scratch, block)
            lines(scratch, block)
            for sub in range(n // n_sub):
                d = broadcast_f32(scratch + _D + 4 * sub)
                m = broadcast_f32(scratch + _M + 4 * sub)
                for k in range(sub * n_sub, (sub + 1) * n_sub, 8):
                    q = load_i8x8(scratch + k) - splat_f32(offset)
                    store_f32x8(to + 4 * k, d * q + m)

    return operation
