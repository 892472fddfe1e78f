"""Arithmetic on F32x8: multiply-add, exponentials, rounding, masks and reductions over the lanes.

No fast-math anywhere: sums keep their order, which the bit-identity of all paths rests on.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from . import vectors
from .emit import call, f32, i8, i16, i32, shuffle, splat, splat_value, store_value, vector
from .frontend import inline
from .vectors import F32x8, I32x8, operation

_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds |x| < 2^22 to an integer, to nearest even
_ROUND_BITS = 0x4B400000


def _constant(value):
    return splat(f32, 8, value)


# --- lane by lane ---------------------------------------------------------------------------------
def _maximum(builder, x, y):
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _minimum(builder, x, y):
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


def _absolute(builder, x):
    bits = builder.and_(builder.bitcast(x, vector(i32, 8)), splat(i32, 8, 0x7FFFFFFF))
    return builder.bitcast(bits, vector(f32, 8))


zero_f32x8 = operation(F32x8, lambda b: _constant(0.0))
splat_f32 = operation(F32x8, lambda b, v: splat_value(b, v, 8))
to_f32 = operation(F32x8, lambda b, v: b.sitofp(v, vector(f32, 8)))
fma = operation(F32x8, lambda b, x, y, z: vectors.lowering.fma(b, x, y, z))
divide = operation(F32x8, lambda b, x, y: b.fdiv(x, y))
maximum = operation(F32x8, _maximum)
minimum = operation(F32x8, _minimum)
absolute = operation(F32x8, _absolute)
sqrt_f32 = operation(types.float32, lambda b, v: call(b, "llvm.sqrt.f32", f32, v))


def _round_to(element):
    def emit(builder, address, value):
        """Round |v| < 2^22 to nearest even, store 8 signed integers and return them."""
        shifted = builder.fadd(value, _constant(_ROUND))
        ints = builder.sub(builder.bitcast(shifted, vector(i32, 8)), splat(i32, 8, _ROUND_BITS))
        store_value(builder, address, builder.trunc(ints, vector(element, 8)))
        return ints

    return emit


store_rounded_i8x8 = operation(I32x8, _round_to(i8))
store_rounded_i16x8 = operation(I32x8, _round_to(i16))


# --- exponentials ---------------------------------------------------------------------------------
def _exp(builder, x):
    """exp(x): 2^n times a polynomial on [-ln2/2, ln2/2]; below -87.3 exactly 0. Error under 2 ulp.

    Source: the usual Cody-Waite reduction and Cephes' expf coefficients.
    """
    fma = vectors.lowering.fma
    # A NaN input leaves through the polynomial; -inf is caught by the last select.
    clamped = builder.select(builder.fcmp_unordered("<", x, _constant(88.0)), x, _constant(88.0))
    n = builder.fsub(
        builder.fadd(builder.fmul(clamped, _constant(1.4426950408889634)), _constant(_ROUND)),
        _constant(_ROUND),
    )
    r = fma(builder, n, _constant(-0.693359375), clamped)
    r = fma(builder, n, _constant(2.12194440e-4), r)
    p = _constant(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        p = fma(builder, p, r, _constant(c))
    p = fma(builder, builder.fmul(p, r), r, builder.fadd(r, _constant(1.0)))
    exponent = builder.shl(
        builder.sub(
            builder.bitcast(builder.fadd(n, _constant(_ROUND)), vector(i32, 8)),
            splat(i32, 8, _ROUND_BITS - 127),
        ),
        splat(i32, 8, 23),
    )
    result = builder.fmul(p, builder.bitcast(exponent, vector(f32, 8)))
    tiny = builder.fcmp_ordered("<", x, _constant(-87.3))
    return builder.select(tiny, _constant(0.0), result)


def _exp2(builder, x):
    """2^x for x <= 0; below -125 exactly 0, and 2^0 exactly 1. Error under 2 ulp.

    Source: Cephes' exp2f coefficients.
    """
    shifted = builder.fadd(x, _constant(_ROUND))
    r = builder.fsub(x, builder.fsub(shifted, _constant(_ROUND)))
    p = _constant(1.535336188319500e-4)
    for c in (
        1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1,
        6.931472028550421e-1, 1.0,
    ):  # fmt: skip
        p = vectors.lowering.fma(builder, p, r, _constant(c))
    exponent = builder.shl(builder.bitcast(shifted, vector(i32, 8)), splat(i32, 8, 23))
    result = builder.add(builder.bitcast(p, vector(i32, 8)), exponent)
    seen = builder.fcmp_ordered(">", x, _constant(-125.0))
    return builder.select(seen, builder.bitcast(result, vector(f32, 8)), _constant(0.0))


exp = operation(F32x8, _exp)
exp2 = operation(F32x8, _exp2)


@inline
def capped(v, cap):
    """cap * tanh(v / cap)."""
    two = splat_f32(types.float32(2.0) / cap)
    one = splat_f32(types.float32(1.0))
    e = exp(minimum(v * two, splat_f32(types.float32(60.0))))
    return divide(e - one, e + one) * splat_f32(cap)


# --- masks ----------------------------------------------------------------------------------------
def _mask(comparison):
    def emit(builder, value, count):
        """Lanes whose number does not compare so with `count` (which may be above 8) become -inf."""
        lanes = ir.Constant(vector(i32, 8), list(range(8)))
        limit = splat_value(builder, builder.trunc(count, i32), 8)
        keep = builder.icmp_signed(comparison, lanes, limit)
        return builder.select(keep, value, _constant(float("-inf")))

    return emit


mask_after = operation(F32x8, _mask("<"))
mask_before = operation(F32x8, _mask(">="))


# --- across the lanes -----------------------------------------------------------------------------
def lane_tree(combine):
    """Emit 8 lanes combined into one: halves with halves, three times."""

    def emit(builder, value):
        for half in (4, 2, 1):
            low = shuffle(builder, value, list(range(half)))
            high = shuffle(builder, value, list(range(half, 2 * half)))
            value = combine(builder, low, high)
        return builder.extract_element(value, i32(0))

    return emit


first_lane = operation(types.float32, lambda b, v: b.extract_element(v, i32(0)))
sum_lanes = operation(types.float32, lane_tree(lambda b, x, y: b.fadd(x, y)))
max_lanes = operation(types.float32, lane_tree(_maximum))
