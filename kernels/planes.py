"""Where the codes of a weight lie in a block of a file: planes of bits, the same for both directions.

Between here and the arithmetic a code is an unsigned byte.  Everything moves as words of four
neighbouring codes.  Byte maps: `repack.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from .blocks import FORMATS
from .simd import *
from .simd import inline


class Plane(NamedTuple):
    """Bits `shift` and up of the codes, as many as `mask` has in a byte.

    `n_codes` codes that are `stride` apart share a byte, the first lowest; 4 * `n_words` such bytes lie at
    `at`, and the plane repeats behind them for the next codes.
    """

    at: int
    n_words: int
    stride: int
    n_codes: int
    shift: int
    mask: int
    repeats: int = 1

    @property
    def width(self) -> int:
        return (self.mask & 0xFF).bit_count()


def _nibbles(at: int) -> Plane:
    return Plane(at, 4, 16, 2, 0, 0x0F0F0F0F)


_PLANES = {
    "q4_0": (_nibbles(2),),
    "q4_1": (_nibbles(4),),
    "q5_0": (_nibbles(6),),
    "q5_1": (_nibbles(8),),
    "iq4_nl": (_nibbles(2),),
    "mxfp4": (_nibbles(1),),
    "q2_k": (Plane(16, 8, 32, 4, 0, 0x03030303, 2),),
    "q3_k": (Plane(32, 8, 32, 4, 0, 0x03030303, 2), Plane(0, 8, 32, 8, 2, 0x01010101)),
    "q4_k": (Plane(16, 8, 32, 2, 0, 0x0F0F0F0F, 4),),
    "q5_k": (Plane(48, 8, 32, 2, 0, 0x0F0F0F0F, 4), Plane(16, 8, 32, 8, 4, 0x01010101)),
    "q6_k": (Plane(0, 16, 64, 2, 0, 0x0F0F0F0F, 2), Plane(128, 8, 32, 4, 4, 0x03030303, 2)),
    "iq4_xs": (Plane(8, 4, 16, 2, 0, 0x0F0F0F0F, 8),),
}
_FIFTH_BITS = {"q5_0": 2, "q5_1": 4}  # where bit e of a u32 belongs to code e


# --- codes to planes ------------------------------------------------------------------------------
def put_codes(format_name):
    """Return put(block, codes): write the planes of a block from one byte a code."""
    first = _put_plane(_PLANES[format_name][0])
    last = _put_plane(_PLANES[format_name][-1])
    has_two = len(_PLANES[format_name]) == 2
    fifth_bits = _FIFTH_BITS.get(format_name, -1)

    @inline
    def put(block, codes):
        first(block, codes)
        if has_two:
            last(block, codes)
        if fifth_bits >= 0:
            put_fifth_bits(block + fifth_bits, codes)

    return put


def _put_plane(plane):
    at, n_words, stride, n_codes, shift, mask, repeats = plane
    width = plane.width

    @inline
    def put(block, codes):
        for r in range(repeats):
            for k in range(n_words):
                word = 0
                for j in range(n_codes):
                    code = codes + (r * n_codes + j) * stride + 4 * k
                    word |= (load_u32(code) >> shift & mask) << width * j
                store_i32(block + at + (r * n_words + k) * 4, word)

    return put


@inline
def put_fifth_bits(to, codes):
    word = 0
    for k in range(8):
        bits = load_u32(codes + 4 * k) >> 4 & 0x01010101
        word |= ((bits | bits >> 7 | bits >> 14 | bits >> 21) & 15) << 4 * k
    store_i32(to, word)


# --- planes to codes ------------------------------------------------------------------------------
def take_codes(format_name):
    """Return take(codes, block): read one byte a code from the planes of a block."""
    first = _take_plane(_PLANES[format_name][0])
    last = _take_plane(_PLANES[format_name][-1])
    has_two = len(_PLANES[format_name]) == 2
    fifth_bits = _FIFTH_BITS.get(format_name, -1)
    n_codes = FORMATS[format_name].n_weights

    @inline
    def take(codes, block):
        for i in range(0, n_codes, 8):
            store_i64(codes + i, 0)
        first(codes, block)
        if has_two:
            last(codes, block)
        if fifth_bits >= 0:
            word = load_u32(block + fifth_bits)
            for i in range(32):
                store_i8(codes + i, load_u8(codes + i) | (word >> i & 1) << 4)

    return take


def _take_plane(plane):
    at, n_words, stride, n_codes, shift, mask, repeats = plane
    width = plane.width

    @inline
    def take(codes, block):
        for r in range(repeats):
            for k in range(n_words):
                word = load_u32(block + at + (r * n_words + k) * 4)
                for j in range(n_codes):
                    code = codes + (r * n_codes + j) * stride + 4 * k
                    store_i32(code, load_u32(code) | (word >> width * j & mask) << shift)

    return take
