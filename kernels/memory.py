"""Loads, stores and prefetch: scalars and vectors at an address, of any alignment.

A load widens to what kernels compute with (64-bit integers, F32x8), a store narrows again.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from . import emit, vectors
from .emit import (
    call,
    f32,
    i8,
    i16,
    i32,
    i64,
    load,
    pointer,
    splat,
    splat_value,
    store_value,
    vector,
)
from .vectors import Bytes16, Bytes32, F32x8, I32x8, Words16, operation

# --- scalars --------------------------------------------------------------------------------------
load_i64 = operation(types.int64, lambda b, a: load(b, a, i64))
load_i32 = operation(types.int64, lambda b, a: b.sext(load(b, a, i32), i64))
load_u32 = operation(types.int64, lambda b, a: b.zext(load(b, a, i32), i64))
load_i16 = operation(types.int64, lambda b, a: b.sext(load(b, a, i16), i64))
load_i8 = operation(types.int64, lambda b, a: b.sext(load(b, a, i8), i64))
load_u8 = operation(types.int64, lambda b, a: b.zext(load(b, a, i8), i64))
load_f32 = operation(types.float32, lambda b, a: load(b, a, f32))
store_i64 = operation(types.void, store_value)
store_i32 = operation(types.void, lambda b, a, v: store_value(b, a, b.trunc(v, i32)))
store_i16 = operation(types.void, lambda b, a, v: store_value(b, a, b.trunc(v, i16)))
store_i8 = operation(types.void, lambda b, a, v: store_value(b, a, b.trunc(v, i8)))
store_f32 = operation(types.void, store_value)


# --- vectors --------------------------------------------------------------------------------------
def _unsigned(builder, address):
    """8 bytes as i32 lanes."""
    return builder.zext(load(builder, address, vector(i8, 8)), vector(i32, 8))


def _to_f32(builder, ints):
    return builder.sitofp(ints, vector(f32, 8))


def _bf16(builder, address):
    words = builder.zext(load(builder, address, vector(i16, 8)), vector(i32, 8))
    return builder.bitcast(builder.shl(words, splat(i32, 8, 16)), vector(f32, 8))


def _e8m0(builder, address):
    """8 exponents to 2^(e-128); e of 0 and 1 are subnormal."""
    e = _unsigned(builder, address)
    one = splat(i32, 8, 1)
    normal = builder.shl(builder.sub(e, one), splat(i32, 8, 23))
    small = builder.shl(splat(i32, 8, 0x00200000), builder.and_(e, one))
    bits = builder.select(builder.icmp_signed("<", e, splat(i32, 8, 2)), small, normal)
    return builder.bitcast(bits, vector(f32, 8))


load_f32x8 = operation(F32x8, lambda b, a: load(b, a, vector(f32, 8)))
load_f16x8 = operation(
    F32x8, lambda b, a: vectors.lowering.f16_to_f32(b, load(b, a, vector(i16, 8)))
)
load_bf16x8 = operation(F32x8, _bf16)
load_e8m0x8 = operation(F32x8, _e8m0)
load_i8x8 = operation(
    F32x8, lambda b, a: _to_f32(b, b.sext(load(b, a, vector(i8, 8)), vector(i32, 8)))
)
load_u8x8 = operation(F32x8, lambda b, a: _to_f32(b, _unsigned(b, a)))
low_nibbles_f32 = operation(
    F32x8, lambda b, a: _to_f32(b, b.and_(_unsigned(b, a), splat(i32, 8, 15)))
)
high_nibbles_f32 = operation(
    F32x8, lambda b, a: _to_f32(b, b.lshr(_unsigned(b, a), splat(i32, 8, 4)))
)
load_i32x8 = operation(I32x8, lambda b, a: load(b, a, vector(i32, 8)))
load_bytes32 = operation(Bytes32, lambda b, a: load(b, a, vector(i8, 32)))
load_bytes16 = operation(Bytes16, lambda b, a: load(b, a, vector(i8, 16)))
load_words16 = operation(Words16, lambda b, a: load(b, a, vector(i16, 16)))

store_f32x8 = operation(types.void, store_value)
store_f16x8 = operation(
    types.void, lambda b, a, v: store_value(b, a, vectors.lowering.f32_to_f16(b, v))
)
store_bytes32 = operation(types.void, store_value)
store_words16 = operation(types.void, store_value)

# --- one element for all lanes --------------------------------------------------------------------
broadcast_f32 = operation(F32x8, lambda b, a: splat_value(b, load(b, a, f32), 8))
broadcast_i32 = operation(I32x8, lambda b, a: splat_value(b, load(b, a, i32), 8))
broadcast4 = operation(Bytes32, emit.broadcast4)  # of the activations, to all rows
broadcast_pair = operation(  # two neighbouring words, to every lane of 32 bits
    Words16, lambda b, a: b.bitcast(splat_value(b, load(b, a, i32), 8), vector(i16, 16))
)


def _prefetch(builder, address):
    at = pointer(builder, address, i8)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), at, i32(0), i32(3), i32(1))


prefetch = operation(types.void, _prefetch)
"""Ask for the cache line of an address, which need not be mapped, to be read."""
