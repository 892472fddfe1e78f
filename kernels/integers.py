"""Operations on bytes and words, and the sums of their products.

`pairs_add` may be called this often before `pairs_sum`, so that AVX2's i16 sums hold (2*qmax*127 a call):
q <= 15: 8 times (30480), q <= 31: 4 times (31496), q <= 63: twice (32004), q <= 127: once (32258).
Less a centre, q <= 63 may be added 4 times: see `x86.AVX2.centred16`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from . import vectors
from .emit import concatenate, i8, i16, i32, i64, shuffle, splat, splat_value, vector
from .floats import lane_tree
from .vectors import Bytes16, Bytes32, I32x8, Pairs, Words16, operation


# --- bytes ----------------------------------------------------------------------------------------
def _byte_splat(builder, value, like):
    return splat_value(builder, builder.trunc(value, i8), like.type.count)


def _and(builder, v, c):
    return builder.and_(v, _byte_splat(builder, c, v))


def _shr(builder, v, c):
    return builder.lshr(v, _byte_splat(builder, c, v))


bytes_and = operation(Bytes32, _and)
bytes_shr = operation(Bytes32, _shr)
bytes_shl = operation(Bytes32, lambda b, v, c: b.shl(v, _byte_splat(b, c, v)))
bytes_or = operation(Bytes32, lambda b, v, w: b.or_(v, w))
bytes16_and = operation(Bytes16, _and)
bytes16_shr = operation(Bytes16, _shr)


def _constant_table(values):
    """Look each 4-bit index of a byte vector up in 16 fixed bytes, 16 lanes at a time."""

    def emit(builder, index):
        table = ir.Constant(vector(i8, 16), [value & 255 for value in values])
        parts = [
            vectors.lowering.table16(
                builder, table, shuffle(builder, index, list(range(k, k + 16)))
            )
            for k in range(0, index.type.count, 16)
        ]
        return parts[0] if len(parts) == 1 else concatenate(builder, *parts)

    return emit


IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the value
iq4_table = operation(Bytes16, _constant_table(IQ4_VALUES))
mxfp4_table = operation(Bytes32, _constant_table([12 + value for value in E2M1_VALUES]))

# --- products of bytes ----------------------------------------------------------------------------
pairs_zero = operation(Pairs, lambda b: ir.Constant(vectors.lowering.pairs_type, None))
pairs_add = operation(Pairs, lambda b, acc, w, y: vectors.lowering.pairs_add(b, acc, w, y))
pairs_sum = operation(I32x8, lambda b, acc: vectors.lowering.pairs_sum(b, acc))


def dot16(bits):
    """Return dot(a, b, c, d, y): 8 rows times 16 columns; four byte vectors of codes below 2**bits by the
    16 bytes of activations at address `y`.
    """

    def emit(builder, a, b, c, d, y):
        activations = vectors.lowering.columns4(builder, y)
        return vectors.lowering.dot16(builder, (a, b, c, d), activations, bits)

    return operation(I32x8, emit)


spread16 = operation(types.void, lambda b, to, a: vectors.lowering.spread16(b, to, a))
"""Write the 16 bytes of activations at an address into 128, as `byte_tile_operations` reads them."""


def centre16(centre):
    """Return write(to, y, total): 32 bytes that take `centre` off the codes multiplied with those at `y`."""

    def emit(builder, to, y, total):
        vectors.lowering.centre16(builder, to, y, total, centre)

    return operation(types.void, emit)


# --- products of words ----------------------------------------------------------------------------
widen_i8 = operation(Words16, lambda b, v: b.sext(v, vector(i16, 16)))
words_add = operation(I32x8, lambda b, acc, w, y: vectors.lowering.words_add(b, acc, w, y))

# --- sums -----------------------------------------------------------------------------------------
zero_i32x8 = operation(I32x8, lambda b: splat(i32, 8, 0))
splat_i32 = operation(I32x8, lambda b, v: splat_value(b, b.trunc(v, i32), 8))
sum_lanes_i32 = operation(
    types.int64, lambda b, v: b.sext(lane_tree(lambda b, x, y: b.add(x, y))(b, v), i64)
)
