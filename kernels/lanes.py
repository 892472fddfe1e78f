"""What encoding needs beside `simd.py`: eight blocks side by side, one in each lane.

A search over scales then has no sums across lanes.  Nothing here or in what uses it is a fused
multiply-add, so that a file comes out the same on every CPU.
"""

from __future__ import annotations

from itertools import pairwise

from llvmlite import ir
from numba import types

from . import vectors
from .emit import f32, i16, i32, i64, load, splat, store_value, vector
from .integers import E2M1_VALUES, IQ4_VALUES
from .vectors import F32x8, I32x8, operation


def _load_f16(builder, address):
    zeros = ir.Constant(vector(i16, 8), None)
    bits = builder.insert_element(zeros, load(builder, address, i16), i32(0))
    return builder.extract_element(vectors.lowering.f16_to_f32(builder, bits), i32(0))


load_f16 = operation(types.float32, _load_f16)


as_f16 = operation(
    F32x8, lambda b, v: vectors.lowering.f16_to_f32(b, vectors.lowering.f32_to_f16(b, v))
)
"""Rounded to f16 and back; at most 65504."""


def _each_lane(builder, address, stride):
    return [builder.add(address, builder.mul(stride, i64(lane))) for lane in range(8)]


def _gather(builder, address, stride):
    value = ir.Constant(vector(f32, 8), ir.Undefined)
    for lane, at in enumerate(_each_lane(builder, address, stride)):
        value = builder.insert_element(value, load(builder, at, f32), i32(lane))
    return value


def _scatter(builder, address, stride, value):
    for lane, at in enumerate(_each_lane(builder, address, stride)):
        store_value(builder, at, builder.extract_element(value, i32(lane)))


gather_f32x8 = operation(F32x8, _gather)
"""f32 at address, address + stride, ..."""
scatter_i32x8 = operation(types.void, _scatter)

where_greater = operation(F32x8, lambda b, p, q, x, y: b.select(b.fcmp_ordered(">", p, q), x, y))
"""x where p > q, elsewhere y."""
store_bytes16 = operation(types.void, store_value)
truncate = operation(I32x8, lambda b, v: b.fptosi(v, vector(i32, 8)))
"""Towards zero."""
exponent = operation(
    F32x8,
    lambda b, v: b.sitofp(
        b.and_(b.lshr(b.bitcast(v, vector(i32, 8)), splat(i32, 8, 23)), splat(i32, 8, 255)),
        vector(f32, 8),
    ),
)
"""The biased exponent: floor(log2 |v|) + 127 of a normal number."""
store_bf16x8 = operation(types.void, lambda b, a, v: store_value(b, a, _to_bf16(b, v)))


def _to_bf16(builder, value):
    """Round to nearest even."""
    bits = builder.bitcast(value, vector(i32, 8))
    odd = builder.and_(builder.lshr(bits, splat(i32, 8, 16)), splat(i32, 8, 1))
    rounded = builder.add(bits, builder.add(odd, splat(i32, 8, 0x7FFF)))
    return builder.trunc(builder.lshr(rounded, splat(i32, 8, 16)), vector(i16, 8))


# --- code books -----------------------------------------------------------------------------------
def _steps(builder, values, v):
    """(v lies beyond the middle of the two, lower, upper) for neighbours of a sorted code book."""
    for lower, upper in pairwise(values):
        middle = splat(f32, 8, (lower + upper) / 2)
        yield builder.fcmp_ordered(">", v, middle), lower, upper


def _nearest(values):
    def emit(builder, v):
        out = splat(f32, 8, float(values[0]))
        for beyond, lower, upper in _steps(builder, values, v):
            step = builder.select(beyond, splat(f32, 8, float(upper - lower)), splat(f32, 8, 0.0))
            out = builder.fadd(out, step)
        return out

    return emit


def _rank(values):
    def emit(builder, v):
        out = splat(i32, 8, 0)
        for beyond, _, _ in _steps(builder, values, v):
            out = builder.sub(out, builder.sext(beyond, vector(i32, 8)))
        return out

    return emit


def _e2m1_code(builder, v):
    """The magnitude's place, and the sign in bit 3."""
    bits = builder.bitcast(v, vector(i32, 8))
    magnitude = builder.bitcast(builder.and_(bits, splat(i32, 8, 0x7FFFFFFF)), vector(f32, 8))
    sign = builder.and_(builder.lshr(bits, splat(i32, 8, 28)), splat(i32, 8, 8))
    return builder.or_(_rank(E2M1_VALUES[:8])(builder, magnitude), sign)


nearest_iq4 = operation(F32x8, _nearest(IQ4_VALUES))
iq4_code = operation(I32x8, _rank(IQ4_VALUES))
nearest_e2m1 = operation(F32x8, _nearest(sorted(set(E2M1_VALUES))))
e2m1_code = operation(I32x8, _e2m1_code)
