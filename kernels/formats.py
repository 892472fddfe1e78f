"""How each packed weight format becomes registers: one `load` function per format, and nothing else.

All formats lie in r8 form (`repack.py` writes it): 8 rows side by side, blocks of 32 columns in order.

Integer formats: `load(base, block)` gives the block as unsigned bytes q and what they stand for,

    q               8 of Bytes32: number k holds columns 4k..4k+3 of rows 0..7 (row r in bytes 4r..4r+3)
    d, m            F32x8 per row: a weight is d*q + m
    d0, d1          one for 16 columns each: a weight is d*(q - centre)
    d0, d1, m0, m1  the same with minimums

Word formats: `scale(base, block)` gives d per row, `load2(base, block, k)` columns 2k, 2k+1 and
2k+16, 2k+17 of the 8 rows as signed bytes (Bytes16, row r in bytes 2r, 2r+1).
Float formats: `load4(base, block, k)` gives columns 4k..4k+3 of the 8 rows as F32x8.
Everything after that is shared (`matmul.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .simd import *
from .simd import inline

# --- nibbles --------------------------------------------------------------------------------------


@inline
def nibbles(q):
    """128 bytes: low nibbles are vectors 0..3, high nibbles 4..7."""
    a = load_bytes32(q)
    b = load_bytes32(q + 32)
    c = load_bytes32(q + 64)
    d = load_bytes32(q + 96)
    return (
        bytes_and(a, 15),
        bytes_and(b, 15),
        bytes_and(c, 15),
        bytes_and(d, 15),
        bytes_shr(a, 4),
        bytes_shr(b, 4),
        bytes_shr(c, 4),
        bytes_shr(d, 4),
    )


@inline
def with_fifth_bit(q, h):
    """Or bit k of each byte of `h` into vector k as 16."""
    return (
        bytes_or(q[0], bytes_shl(bytes_and(h, 1), 4)),
        bytes_or(q[1], bytes_shl(bytes_and(h, 2), 3)),
        bytes_or(q[2], bytes_shl(bytes_and(h, 4), 2)),
        bytes_or(q[3], bytes_shl(bytes_and(h, 8), 1)),
        bytes_or(q[4], bytes_and(h, 16)),
        bytes_or(q[5], bytes_and(bytes_shr(h, 1), 16)),
        bytes_or(q[6], bytes_and(bytes_shr(h, 2), 16)),
        bytes_or(q[7], bytes_and(bytes_shr(h, 3), 16)),
    )


@inline
def two_bits(q):
    """64 bytes: byte vector j holds vectors j, j+2, j+4, j+6 at bits 0, 2, 4, 6."""
    a = load_bytes32(q)
    b = load_bytes32(q + 32)
    return (
        bytes_and(a, 3),
        bytes_and(b, 3),
        bytes_and(bytes_shr(a, 2), 3),
        bytes_and(bytes_shr(b, 2), 3),
        bytes_and(bytes_shr(a, 4), 3),
        bytes_and(bytes_shr(b, 4), 3),
        bytes_shr(a, 6),
        bytes_shr(b, 6),
    )


# --- integer formats ------------------------------------------------------------------------------
# q4_0: d f16 (8,) | nibbles 128                                                       144 bytes


@inline
def load_q4_0(base, block):
    at = base + block * 144
    d = load_f16x8(at)
    return nibbles(at + 16), d, d * splat_f32(np.float32(-8.0))


# q4_1: d f16 (8,) | m f16 (8,) | nibbles 128                                          160 bytes
@inline
def load_q4_1(base, block):
    at = base + block * 160
    return nibbles(at + 32), load_f16x8(at), load_f16x8(at + 16)


# q5_0: d f16 (8,) | fifth bits 32 | nibbles 128                                       176 bytes
@inline
def load_q5_0(base, block):
    at = base + block * 176
    d = load_f16x8(at)
    q = with_fifth_bit(nibbles(at + 48), load_bytes32(at + 16))
    return q, d, d * splat_f32(np.float32(-16.0))


# q5_1: d f16 (8,) | m f16 (8,) | fifth bits 32 | nibbles 128                          192 bytes
@inline
def load_q5_1(base, block):
    at = base + block * 192
    q = with_fifth_bit(nibbles(at + 64), load_bytes32(at + 32))
    return q, load_f16x8(at), load_f16x8(at + 16)


# mxfp4: exponents u8 (8,) | codes + 12 as 4-bit indices 128                           136 bytes
@inline
def load_mxfp4(base, block):
    at = base + block * 136
    d = load_e8m0x8(at)
    n = nibbles(at + 8)
    q = (
        mxfp4_table(n[0]),
        mxfp4_table(n[1]),
        mxfp4_table(n[2]),
        mxfp4_table(n[3]),
        mxfp4_table(n[4]),
        mxfp4_table(n[5]),
        mxfp4_table(n[6]),
        mxfp4_table(n[7]),
    )
    return q, d, d * splat_f32(np.float32(-12.0))


# q4_k: per 256: d f16 (8,) | dmin f16 (8,) | per 32: sc u8 (8,), m u8 (8,) | nibbles 8x128   1184
@inline
def load_q4_k(base, block):
    at = base + (block >> 3) * 1184
    j = block & 7
    d = load_f16x8(at) * load_u8x8(at + 32 + 16 * j)
    m = load_f16x8(at + 16) * load_u8x8(at + 40 + 16 * j)
    return nibbles(at + 160 + 128 * j), d, zero_f32x8() - m


# q5_k: as q4_k, then fifth bits 8x32                                                 1440 bytes
@inline
def load_q5_k(base, block):
    at = base + (block >> 3) * 1440
    j = block & 7
    d = load_f16x8(at) * load_u8x8(at + 32 + 16 * j)
    m = load_f16x8(at + 16) * load_u8x8(at + 40 + 16 * j)
    q = with_fifth_bit(nibbles(at + 160 + 128 * j), load_bytes32(at + 1184 + 32 * j))
    return q, d, zero_f32x8() - m


# q2_k: per 256: d f16 (8,) | dmin f16 (8,) | per 16: sc | m << 4 u8 (8,) | two bits 8x64      672
@inline
def load_q2_k(base, block):
    at = base + (block >> 3) * 672
    j = block & 7
    d = load_f16x8(at)
    dmin = zero_f32x8() - load_f16x8(at + 16)
    s = at + 32 + 16 * j
    d0 = d * low_nibbles_f32(s)
    d1 = d * low_nibbles_f32(s + 8)
    m0 = dmin * high_nibbles_f32(s)
    m1 = dmin * high_nibbles_f32(s + 8)
    return two_bits(at + 160 + 64 * j), d0, d1, m0, m1


# q3_k: per 256: d f16 (8,) | per 16: sc - 32 i8 (8,) | two bits 8x64 | third bits 8x32        912
@inline
def load_q3_k(base, block):
    at = base + (block >> 3) * 912
    j = block & 7
    d = load_f16x8(at)
    d0 = d * load_i8x8(at + 16 + 16 * j)
    d1 = d * load_i8x8(at + 24 + 16 * j)
    q = two_bits(at + 144 + 64 * j)
    h = load_bytes32(at + 656 + 32 * j)
    q = (
        bytes_or(q[0], bytes_shl(bytes_and(h, 1), 2)),
        bytes_or(q[1], bytes_shl(bytes_and(h, 2), 1)),
        bytes_or(q[2], bytes_and(h, 4)),
        bytes_or(q[3], bytes_and(bytes_shr(h, 1), 4)),
        bytes_or(q[4], bytes_and(bytes_shr(h, 2), 4)),
        bytes_or(q[5], bytes_and(bytes_shr(h, 3), 4)),
        bytes_or(q[6], bytes_and(bytes_shr(h, 4), 4)),
        bytes_or(q[7], bytes_and(bytes_shr(h, 5), 4)),
    )
    return q, d0, d1


# q6_k: per 256: d f16 (8,) | per 16: sc i8 (8,) | nibbles 8x128 | upper two bits 8x64        1680
@inline
def load_q6_k(base, block):
    at = base + (block >> 3) * 1680
    j = block & 7
    d = load_f16x8(at)
    d0 = d * load_i8x8(at + 16 + 16 * j)
    d1 = d * load_i8x8(at + 24 + 16 * j)
    n = nibbles(at + 144 + 128 * j)
    h = two_bits(at + 1168 + 64 * j)
    q = (
        bytes_or(n[0], bytes_shl(h[0], 4)),
        bytes_or(n[1], bytes_shl(h[1], 4)),
        bytes_or(n[2], bytes_shl(h[2], 4)),
        bytes_or(n[3], bytes_shl(h[3], 4)),
        bytes_or(n[4], bytes_shl(h[4], 4)),
        bytes_or(n[5], bytes_shl(h[5], 4)),
        bytes_or(n[6], bytes_shl(h[6], 4)),
        bytes_or(n[7], bytes_shl(h[7], 4)),
    )
    return q, d0, d1


# --- word formats: signed bytes, two columns of 8 rows in 16 bytes (row r in bytes 2r, 2r+1) --------
# q8_0: d f16 (8,) | columns 2k, 2k+1 for k = 0..15                                    272 bytes
@inline
def scale_q8_0(base, block):
    return load_f16x8(base + block * 272)


@inline
def load2_q8_0(base, block, k):
    at = base + block * 272 + 16 + k * 16
    return load_bytes16(at), load_bytes16(at + 128)


@inline
def iq4_pairs(at):
    """Indices: low nibbles are the pair k, high nibbles the pair k + 8."""
    v = load_bytes16(at)
    return iq4_table(bytes16_and(v, 15)), iq4_table(bytes16_shr(v, 4))


# iq4_nl: d f16 (8,) | indices 8 x 16                                                  144 bytes
@inline
def scale_iq4_nl(base, block):
    return load_f16x8(base + block * 144)


@inline
def load2_iq4_nl(base, block, k):
    return iq4_pairs(base + block * 144 + 16 + k * 16)


# iq4_xs: per 256: d f16 (8,) | per 32: scale - 32 i8 (8,) | indices 8 x 8 x 16       1104 bytes
@inline
def scale_iq4_xs(base, block):
    at = base + (block >> 3) * 1104
    return load_f16x8(at) * load_i8x8(at + 16 + 8 * (block & 7))


@inline
def load2_iq4_xs(base, block, k):
    return iq4_pairs(base + (block >> 3) * 1104 + 80 + (block & 7) * 128 + k * 16)


# --- float formats --------------------------------------------------------------------------------
@inline
def load4_f32(base, block, k):
    at = base + block * 1024 + k * 128
    return load_f32x8(at), load_f32x8(at + 32), load_f32x8(at + 64), load_f32x8(at + 96)


@inline
def load4_f16(base, block, k):
    at = base + block * 512 + k * 64
    return load_f16x8(at), load_f16x8(at + 16), load_f16x8(at + 32), load_f16x8(at + 48)


@inline
def load4_bf16(base, block, k):
    at = base + block * 512 + k * 64
    return load_bf16x8(at), load_bf16x8(at + 16), load_bf16x8(at + 32), load_bf16x8(at + 48)


# --- the table ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class IntegerFormat:
    """`bits` bounds q; a weight is d*(q - centre), or there are so many minimums m per 32 columns."""

    load: Any
    bits: int
    centre: int = 0
    minimums: int = 0


@dataclass(frozen=True)
class WordFormat:
    scale: Any
    load2: Any


@dataclass(frozen=True)
class FloatFormat:
    load4: Any


LOADS: dict[str, IntegerFormat | WordFormat | FloatFormat] = {
    "q4_0": IntegerFormat(load_q4_0, 4, minimums=1),
    "q4_1": IntegerFormat(load_q4_1, 4, minimums=1),
    "q5_0": IntegerFormat(load_q5_0, 5, minimums=1),
    "q5_1": IntegerFormat(load_q5_1, 5, minimums=1),
    "mxfp4": IntegerFormat(load_mxfp4, 5, minimums=1),
    "q2_k": IntegerFormat(load_q2_k, 4, minimums=2),
    "q3_k": IntegerFormat(load_q3_k, 4, centre=4),
    "q4_k": IntegerFormat(load_q4_k, 4, minimums=1),
    "q5_k": IntegerFormat(load_q5_k, 5, minimums=1),
    "q6_k": IntegerFormat(load_q6_k, 6, centre=32),
    "q8_0": WordFormat(scale_q8_0, load2_q8_0),
    "iq4_nl": WordFormat(scale_iq4_nl, load2_iq4_nl),
    "iq4_xs": WordFormat(scale_iq4_xs, load2_iq4_xs),
    "f32": FloatFormat(load4_f32),
    "f16": FloatFormat(load4_f16),
    "bf16": FloatFormat(load4_bf16),
}
