"""From a file's blocks to r8: 8 rows side by side, so that vector lanes are rows.

One function per format writes what one row gives to a packed block: `pack(out, row, block)` with `out`
at the packed block, `row` 0..7 and `block` at the block in the file.  `formats.py` has the byte map of
what is written.  Codes move as words of 4 columns (u32), which is how the packed planes are interleaved.

File layouts (nibbles: low halves are the first 16 or 32 values, high halves the next):

    q4_0    d | 16 nibble bytes                     q4_1    d | m | 16
    q5_0    d | fifth bits u32 | 16                 q5_1    d | m | fifth bits u32 | 16
    q8_0    d | 32 i8                               mxfp4   exponent u8 | 16
    iq4_nl  d | 16                                  iq4_xs  d | high scale bits u16 | low 4 | 8 x 16
    q2_k    16 sc, m nibbles | 64 | d | dmin        q3_k    third bits 32 | 64 | scales 12 | d
    q4_k    d | dmin | scales 12 | 4 x 32           q5_k    d | dmin | scales 12 | fifth bits 32 | 4 x 32
    q6_k    low nibbles 128 | high two bits 64 | 16 i8 scales | d

Source: the GGUF specification and ggml-quants.c.
"""

from __future__ import annotations

from .blocks import EXPONENTS, FORMATS
from .simd import *
from .simd import inline

_BLOCK_NBYTES = 256  # no block of a file is longer


# --- planes ---------------------------------------------------------------------------------------
@inline
def move16(to, source):
    store_i16(to, load_i16(source))


@inline
def nibble_words(out, row, source):
    """16 nibble bytes as they are."""
    for k in range(4):
        store_i32(out + 32 * k + 4 * row, load_u32(source + 4 * k))


@inline
def pair_words(out, row, source, n):
    """2 n bytes, two columns at a time."""
    for k in range(n):
        move16(out + 16 * k + 2 * row, source + 2 * k)


@inline
def field(source, k, shift, mask):
    """Columns 4k..4k+3 of a run of bytes that holds several codes."""
    return load_u32(source + 4 * k) >> shift & mask


@inline
def nibble_plane(out, row, source, shift):
    for k in range(4):
        low = field(source, k, shift, 0x0F0F0F0F)
        store_i32(out + 32 * k + 4 * row, low | field(source, k + 4, shift, 0x0F0F0F0F) << 4)


@inline
def two_bit_plane(out, row, source, shift):
    for k in range(2):
        word = field(source, k, shift, 0x03030303)
        for i in range(1, 4):
            word |= field(source, k + 2 * i, shift, 0x03030303) << 2 * i
        store_i32(out + 32 * k + 4 * row, word)


@inline
def bit_plane(out, row, source, shift):
    word = 0
    for k in range(8):
        word |= field(source, k, shift, 0x01010101) << k
    store_i32(out + 4 * row, word)


@inline
def fifth_bits(out, row, source):
    """Bit e of a u32 belongs to column e: gather every fourth bit into a byte."""
    bits = load_u32(source)
    for i in range(4):
        b = bits >> i & 0x11111111
        b = (b | b >> 3) & 0x03030303
        b = (b | b >> 6) & 0x000F000F
        store_i8(out + 4 * row + i, (b | b >> 12) & 0xFF)


# --- formats of 32 --------------------------------------------------------------------------------
@inline
def pack_q4_0(out, row, block):
    move16(out + 2 * row, block)
    nibble_words(out + 16, row, block + 2)


@inline
def pack_q4_1(out, row, block):
    move16(out + 2 * row, block)
    move16(out + 16 + 2 * row, block + 2)
    nibble_words(out + 32, row, block + 4)


@inline
def pack_q5_0(out, row, block):
    move16(out + 2 * row, block)
    fifth_bits(out + 16, row, block + 2)
    nibble_words(out + 48, row, block + 6)


@inline
def pack_q5_1(out, row, block):
    move16(out + 2 * row, block)
    move16(out + 16 + 2 * row, block + 2)
    fifth_bits(out + 32, row, block + 4)
    nibble_words(out + 64, row, block + 8)


@inline
def pack_q8_0(out, row, block):
    move16(out + 2 * row, block)
    pair_words(out + 16, row, block + 2, 16)


@inline
def pack_iq4_nl(out, row, block):
    move16(out + 2 * row, block)
    pair_words(out + 16, row, block + 2, 8)


@inline
def pack_mxfp4(out, row, block):
    store_i8(out + row, load_u8(block))
    nibble_words(out + 8, row, block + 1)


# --- formats of 256 -------------------------------------------------------------------------------
@inline
def k4_head(out, row, block):
    """d, dmin, and from 12 bytes 8 six-bit scales and 8 six-bit minima (q4_k, q5_k)."""
    move16(out + 2 * row, block)
    move16(out + 16 + 2 * row, block + 2)
    s = block + 4
    for j in range(4):
        store_i8(out + 32 + 16 * j + row, load_u8(s + j) & 63)
        store_i8(out + 40 + 16 * j + row, load_u8(s + 4 + j) & 63)
        both = load_u8(s + 8 + j)
        store_i8(out + 96 + 16 * j + row, both & 15 | load_u8(s + j) >> 6 << 4)
        store_i8(out + 104 + 16 * j + row, both >> 4 | load_u8(s + 4 + j) >> 6 << 4)


@inline
def pack_q4_k(out, row, block):
    k4_head(out, row, block)
    for j in range(8):
        nibble_plane(out + 160 + 128 * j, row, block + 16 + 32 * (j // 2), 4 * (j % 2))


@inline
def pack_q5_k(out, row, block):
    k4_head(out, row, block)
    for j in range(8):
        nibble_plane(out + 160 + 128 * j, row, block + 48 + 32 * (j // 2), 4 * (j % 2))
        bit_plane(out + 1184 + 32 * j, row, block + 16, j)


@inline
def pack_q2_k(out, row, block):
    move16(out + 2 * row, block + 80)
    move16(out + 16 + 2 * row, block + 82)
    for i in range(16):
        store_i8(out + 32 + 8 * i + row, load_u8(block + i))
    for j in range(8):
        two_bit_plane(out + 160 + 64 * j, row, block + 16 + 32 * (j // 4), 2 * (j % 4))


@inline
def pack_q3_k(out, row, block):
    move16(out + 2 * row, block + 108)
    s = block + 96
    for i in range(16):
        low = load_u8(s + i % 8) >> 4 * (i // 8) & 15
        high = load_u8(s + 8 + i % 4) >> 2 * (i // 4) & 3
        store_i8(out + 16 + 8 * i + row, (low | high << 4) - 32)
    for j in range(8):
        two_bit_plane(out + 144 + 64 * j, row, block + 32 + 32 * (j // 4), 2 * (j % 4))
        bit_plane(out + 656 + 32 * j, row, block, j)


@inline
def pack_q6_k(out, row, block):
    move16(out + 2 * row, block + 208)
    for i in range(16):
        store_i8(out + 16 + 8 * i + row, load_u8(block + 192 + i))
    for j in range(8):
        low = block + 64 * (j // 4) + 32 * (j % 2)
        nibble_plane(out + 144 + 128 * j, row, low, 4 * (j // 2 % 2))
        two_bit_plane(out + 1168 + 64 * j, row, block + 128 + 32 * (j // 4), 2 * (j % 4))


@inline
def pack_iq4_xs(out, row, block):
    move16(out + 2 * row, block)
    high = load_i16(block + 2)
    for j in range(8):
        low = load_u8(block + 4 + j // 2) >> 4 * (j % 2) & 15
        store_i8(out + 16 + 8 * j + row, (low | (high >> 2 * j & 3) << 4) - 32)
        pair_words(out + 80 + 128 * j, row, block + 8 + 16 * j, 8)


# --- floats ---------------------------------------------------------------------------------------
@inline
def pack_f32(out, row, block):
    store_i32(out + 4 * row, load_u32(block))


@inline
def pack_f16(out, row, block):
    move16(out + 2 * row, block)


pack_bf16 = pack_f16


def repack(format_name):
    """Return `repack[format]`: write packed groups of 8 rows, the last one padded with zeros.

    A part is `per_part` groups. Rows u8 (n_rows, row bytes) lie at `raw`; or, with a `file`, at that
    offset of it, and `read` is the address of the system's pread.  `failures` i64 (2,) counts what
    cannot be read, and floats that are not finite.  Shapes: out u8 (ceil(n_rows / 8), group_nbytes).
    """
    pack = globals()[f"pack_{format_name}"]
    format_ = FORMATS[format_name]
    block_nbytes = format_.nbytes
    packed_nbytes = format_.packed if format_.n_weights > 1 else 8 * format_.nbytes
    float_nbytes, exponent = EXPONENTS[format_.float_type]
    place, other_place = format_.float_places[0], format_.float_places[-1]
    load = {1: load_u8, 2: load_i16, 4: load_u32}[float_nbytes]

    def operation(
        step, part, first, count, scratch,
        out, group_nbytes, raw, n_rows, n_blocks, per_part, file, read, failures,
    ):  # fmt: skip
        row_nbytes = n_blocks * block_nbytes
        for i in range(0, _BLOCK_NBYTES, 8):
            store_i64(scratch + i, 0)
        first_row = part * per_part * 8
        n_here = min(per_part * 8, n_rows - first_row)
        source = raw + first_row * row_nbytes
        if read != 0:
            nbytes = n_here * row_nbytes
            done = 0
            while done < nbytes:
                to = scratch + _BLOCK_NBYTES + done
                n = call_pread(read, file, to, nbytes - done, source + done)
                if n <= 0:
                    atomic_add(failures, 1)
                    return
                done += n
            source = scratch + _BLOCK_NBYTES
        n_bad = 0
        for group in range((n_here + 7) // 8):
            to = out + (part * per_part + group) * group_nbytes
            n = min(8, n_here - group * 8)
            for block in range(n_blocks):
                for row in range(n):
                    at = source + (group * 8 + row) * row_nbytes + block * block_nbytes
                    pack(to + block * packed_nbytes, row, at)
                    n_bad += load(at + place) & exponent == exponent
                    n_bad += load(at + other_place) & exponent == exponent
                for row in range(n, 8):
                    pack(to + block * packed_nbytes, row, scratch)
            for i in range(n_blocks * packed_nbytes, group_nbytes):
                store_i8(to + i, 0)
        if n_bad > 0:
            atomic_add(failures + 8, n_bad)

    return operation
