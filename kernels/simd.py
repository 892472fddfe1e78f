"""The vocabulary of the kernels: vector types and operations, neutral to the CPU by name.

Kernels are plain Python functions over 64-bit integers (addresses are integers) and these vectors:

    F32x8    8 floats                 Bytes32  32 bytes (u8 or i8, the operation says which)
    I32x8    8 integers               Pairs    sums of u8 x i8 products, in the tier's own width
    Words16  16 signed words of 16 bits

`+ - *` work on F32x8 and I32x8.  What depends on the CPU is asked of `lowering`, one class per tier
(`generic.py`, `x86.py`); the compiler sets it before it compiles anything.

`pairs_add` may be called this often before `pairs_sum`, so that AVX2's i16 sums hold (2*qmax*127 a call):
q <= 15: 8 times (30480), q <= 31: 4 times (31496), q <= 63: twice (32004), q <= 127: once (32258).
No fast-math anywhere: sums keep their order, which the bit-identity of all paths rests on.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.core.typing import signature as make_signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

from . import generic
from .frontend import inline
from .generic import call, f32, i8, i16, i32, shuffle, splat, vector

i64 = ir.IntType(64)
lowering: type[generic.Generic] = generic.Generic
system_convention = "ccc"  # of what is called through an address


class Vec(types.Type):
    """A machine vector as a Numba type: lives in registers, passes between jitted functions."""

    def __init__(self, name: str, ir_type: ir.Type) -> None:
        self.ir_type = ir_type
        super().__init__(name)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, fe_type.ir_type)


class _Pairs(Vec):
    """Its machine type is the tier's, looked up when it is compiled."""

    def __init__(self) -> None:
        types.Type.__init__(self, "Pairs")

    @property
    def ir_type(self):  # type: ignore[override]
        return lowering.pairs_type


register_model(_Pairs)(_VecModel)

F32x8 = Vec("F32x8", vector(f32, 8))
I32x8 = Vec("I32x8", vector(i32, 8))
Bytes32 = Vec("Bytes32", vector(i8, 32))
Bytes16 = Vec("Bytes16", vector(i8, 16))
Words16 = Vec("Words16", vector(i16, 16))
Pairs = _Pairs()

_OPERATORS = {
    operator.add: ("fadd", "add"),
    operator.sub: ("fsub", "sub"),
    operator.mul: ("fmul", "mul"),
}
for _python, (_float, _int) in _OPERATORS.items():

    @infer_global(_python)
    class _VecOperator(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and args[0] == args[1] and args[0] in (F32x8, I32x8):
                return make_signature(args[0], *args)
            return None

    def _lower(name):
        def codegen(context, builder, sig, args):
            return getattr(builder, name)(*args)

        return codegen

    lower_builtin(_python, F32x8, F32x8)(_lower(_float))
    lower_builtin(_python, I32x8, I32x8)(_lower(_int))


def _operation(result, emit):
    """An intrinsic of fixed result type; `emit(builder, *values)` writes its IR."""

    def typing(typingctx, *args):
        def codegen(context, builder, sig, values):
            value = emit(builder, *_flatten(sig.args, values, context, builder))
            return context.get_dummy_value() if result is types.void else value

        return result(*args), codegen

    return typing


def _flatten(arg_types, values, context, builder):
    """Cast every plain integer argument to 64 bits, so that literals and small ints are welcome."""
    out = []
    for type_, value in zip(arg_types, values, strict=True):
        if isinstance(type_, types.Integer) and type_.bitwidth != 64:
            value = context.cast(builder, value, type_, types.int64)
        out.append(value)
    return out


def _pointer(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def _load(builder, address, ir_type):
    return builder.load(_pointer(builder, address, ir_type), align=1)


def _store(builder, address, value):
    builder.store(value, _pointer(builder, address, value.type), align=1)


def _op1(result, emit):
    run = _operation(result, emit)

    @intrinsic
    def operation(typingctx, a):
        return run(typingctx, a)

    return operation


def _op2(result, emit):
    run = _operation(result, emit)

    @intrinsic
    def operation(typingctx, a, b):
        return run(typingctx, a, b)

    return operation


def _op3(result, emit):
    run = _operation(result, emit)

    @intrinsic
    def operation(typingctx, a, b, c):
        return run(typingctx, a, b, c)

    return operation


def _op4(result, emit):
    run = _operation(result, emit)

    @intrinsic
    def operation(typingctx, a, b, c, d):
        return run(typingctx, a, b, c, d)

    return operation


def _op0(result, emit):
    run = _operation(result, emit)

    @intrinsic
    def operation(typingctx):
        return run(typingctx)

    return operation


# --- scalars in memory ----------------------------------------------------------------------------
load_i64 = _op1(types.int64, lambda b, a: _load(b, a, i64))
load_i32 = _op1(types.int64, lambda b, a: b.sext(_load(b, a, i32), i64))
load_u32 = _op1(types.int64, lambda b, a: b.zext(_load(b, a, i32), i64))
store_i32 = _op2(types.void, lambda b, a, v: _store(b, a, b.trunc(v, i32)))
load_u8 = _op1(types.int64, lambda b, a: b.zext(_load(b, a, i8), i64))
load_i8 = _op1(types.int64, lambda b, a: b.sext(_load(b, a, i8), i64))
load_i16 = _op1(types.int64, lambda b, a: b.sext(_load(b, a, i16), i64))
store_i16 = _op2(types.void, lambda b, a, v: _store(b, a, b.trunc(v, i16)))
load_f32 = _op1(types.float32, lambda b, a: _load(b, a, f32))
store_f32 = _op2(types.void, lambda b, a, v: _store(b, a, v))
store_i64 = _op2(types.void, lambda b, a, v: _store(b, a, v))
store_i8 = _op2(types.void, lambda b, a, v: _store(b, a, b.trunc(v, i8)))
prefetch = _op1(
    types.void,
    lambda b, a: call(
        b, "llvm.prefetch.p0", ir.VoidType(), _pointer(b, a, i8), i32(0), i32(3), i32(1)
    ),
)

# --- vectors in memory ----------------------------------------------------------------------------
load_f32x8 = _op1(F32x8, lambda b, a: _load(b, a, vector(f32, 8)))
store_f32x8 = _op2(types.void, lambda b, a, v: _store(b, a, v))
load_i32x8 = _op1(I32x8, lambda b, a: _load(b, a, vector(i32, 8)))
load_f16x8 = _op1(F32x8, lambda b, a: lowering.f16_to_f32(b, _load(b, a, vector(i16, 8))))
store_f16x8 = _op2(types.void, lambda b, a, v: _store(b, a, lowering.f32_to_f16(b, v)))
load_bf16x8 = _op1(
    F32x8,
    lambda b, a: b.bitcast(
        b.shl(b.zext(_load(b, a, vector(i16, 8)), vector(i32, 8)), splat(i32, 8, 16)),
        vector(f32, 8),
    ),
)
load_i8x8 = _op1(
    F32x8,
    lambda b, a: b.sitofp(b.sext(_load(b, a, vector(i8, 8)), vector(i32, 8)), vector(f32, 8)),
)
load_u8x8 = _op1(
    F32x8,
    lambda b, a: b.sitofp(b.zext(_load(b, a, vector(i8, 8)), vector(i32, 8)), vector(f32, 8)),
)
load_bytes32 = _op1(Bytes32, lambda b, a: _load(b, a, vector(i8, 32)))
store_bytes32 = _op2(types.void, lambda b, a, v: _store(b, a, v))
load_bytes16 = _op1(Bytes16, lambda b, a: _load(b, a, vector(i8, 16)))


def _splat_value(builder, value, lanes):
    one = builder.insert_element(
        ir.Constant(vector(value.type, lanes), ir.Undefined), value, i32(0)
    )
    return shuffle(builder, one, [0] * lanes)


splat_f32 = _op1(F32x8, lambda b, v: _splat_value(b, v, 8))
splat_i32 = _op1(I32x8, lambda b, v: _splat_value(b, b.trunc(v, i32), 8))
broadcast_f32 = _op1(F32x8, lambda b, a: _splat_value(b, _load(b, a, f32), 8))
zero_f32x8 = _op0(F32x8, lambda b: splat(f32, 8, 0.0))
broadcast4 = _op1(  # 4 neighbouring bytes of the activations, to all rows
    Bytes32, lambda b, a: b.bitcast(_splat_value(b, _load(b, a, i32), 8), vector(i8, 32))
)


# --- bytes ----------------------------------------------------------------------------------------
def _byte_splat(builder, value, like):
    return _splat_value(builder, builder.trunc(value, i8), like.type.count)


_bytes_and = lambda b, v, c: b.and_(v, _byte_splat(b, c, v))  # noqa: E731
_bytes_shr = lambda b, v, c: b.lshr(v, _byte_splat(b, c, v))  # noqa: E731
bytes_and = _op2(Bytes32, _bytes_and)
bytes_shr = _op2(Bytes32, _bytes_shr)
bytes_shl = _op2(Bytes32, lambda b, v, c: b.shl(v, _byte_splat(b, c, v)))
bytes_or = _op2(Bytes32, lambda b, v, w: b.or_(v, w))
bytes16_and = _op2(Bytes16, _bytes_and)
bytes16_shr = _op2(Bytes16, _bytes_shr)


def _constant_table(values):
    """Look each 4-bit index of a byte vector up in 16 fixed bytes, 16 lanes at a time."""

    def emit(builder, index):
        table = ir.Constant(vector(i8, 16), [value & 255 for value in values])
        if index.type.count == 16:
            return lowering.table16(builder, table, index)
        halves = [
            lowering.table16(builder, table, shuffle(builder, index, list(range(k, k + 16))))
            for k in (0, 16)
        ]
        lanes = ir.Constant(vector(i32, 32), list(range(32)))
        return builder.shuffle_vector(*halves, lanes)

    return emit


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the value
iq4_table = _op1(Bytes16, _constant_table(_IQ4))
mxfp4_table = _op1(Bytes32, _constant_table([12 + value for value in _E2M1]))

# --- products of bytes ----------------------------------------------------------------------------
pairs_zero = _op0(Pairs, lambda b: ir.Constant(lowering.pairs_type, None))
pairs_add = _op3(Pairs, lambda b, acc, w, y: lowering.pairs_add(b, acc, w, y))
pairs_sum = _op1(I32x8, lambda b, acc: lowering.pairs_sum(b, acc))

# --- products of words ----------------------------------------------------------------------------
widen_i8 = _op1(Words16, lambda b, v: b.sext(v, vector(i16, 16)))
load_words16 = _op1(Words16, lambda b, a: _load(b, a, vector(i16, 16)))
store_words16 = _op2(types.void, lambda b, a, v: _store(b, a, v))
broadcast_pair = _op1(  # two neighbouring words, to every lane of 32 bits
    Words16, lambda b, a: b.bitcast(_splat_value(b, _load(b, a, i32), 8), vector(i16, 16))
)
zero_i32x8 = _op0(I32x8, lambda b: splat(i32, 8, 0))
words_add = _op3(I32x8, lambda b, acc, w, y: lowering.words_add(b, acc, w, y))

# --- arithmetic -----------------------------------------------------------------------------------
to_f32 = _op1(F32x8, lambda b, v: b.sitofp(v, vector(f32, 8)))
fma = _op3(F32x8, lambda b, x, y, z: lowering.fma(b, x, y, z))
divide = _op2(F32x8, lambda b, x, y: b.fdiv(x, y))
low_nibbles_f32 = _op1(  # of 8 bytes in memory
    F32x8,
    lambda b, a: b.sitofp(
        b.and_(b.zext(_load(b, a, vector(i8, 8)), vector(i32, 8)), splat(i32, 8, 15)),
        vector(f32, 8),
    ),
)
high_nibbles_f32 = _op1(
    F32x8,
    lambda b, a: b.sitofp(
        b.lshr(b.zext(_load(b, a, vector(i8, 8)), vector(i32, 8)), splat(i32, 8, 4)),
        vector(f32, 8),
    ),
)


def _e8m0(builder, address):
    """8 exponents to 2^(e-128); e of 0 and 1 are subnormal."""
    e = builder.zext(_load(builder, address, vector(i8, 8)), vector(i32, 8))
    one = splat(i32, 8, 1)
    normal = builder.shl(builder.sub(e, one), splat(i32, 8, 23))
    small = builder.shl(splat(i32, 8, 0x00200000), builder.and_(e, one))
    bits = builder.select(builder.icmp_signed("<", e, splat(i32, 8, 2)), small, normal)
    return builder.bitcast(bits, vector(f32, 8))


load_e8m0x8 = _op1(F32x8, _e8m0)
maximum = _op2(F32x8, lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
minimum = _op2(F32x8, lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
absolute = _op1(
    F32x8,
    lambda b, v: b.bitcast(
        b.and_(b.bitcast(v, vector(i32, 8)), splat(i32, 8, 0x7FFFFFFF)), vector(f32, 8)
    ),
)

_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds |x| < 2^22 to an integer, to nearest even


def _round_to(lane):
    def emit(builder, address, value):
        """Round |v| < 2^22 to nearest even, store 8 signed integers and return them."""
        shifted = builder.fadd(value, splat(f32, 8, _ROUND))
        ints = builder.sub(builder.bitcast(shifted, vector(i32, 8)), splat(i32, 8, 0x4B400000))
        _store(builder, address, builder.trunc(ints, vector(lane, 8)))
        return ints

    return emit


store_rounded_i8x8 = _op2(I32x8, _round_to(i8))
store_rounded_i16x8 = _op2(I32x8, _round_to(i16))


def _lane_tree(combine):
    def emit(builder, value):
        for half in (4, 2, 1):
            lanes = value.type.count
            low = shuffle(builder, value, list(range(half)))
            high = shuffle(builder, value, list(range(half, lanes)))
            value = combine(builder, low, high)
        return builder.extract_element(value, i32(0))

    return emit


first_lane = _op1(types.float32, lambda b, v: b.extract_element(v, i32(0)))
sum_lanes = _op1(types.float32, _lane_tree(lambda b, x, y: b.fadd(x, y)))
max_lanes = _op1(
    types.float32, _lane_tree(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
)
sum_lanes_i32 = _op1(
    types.int64, lambda b, v: b.sext(_lane_tree(lambda b, x, y: b.add(x, y))(b, v), i64)
)


def _mask_after(builder, value, count):
    """Lanes at or after `count` (0..8 or more) become -inf."""
    lanes = ir.Constant(vector(i32, 8), list(range(8)))
    keep = builder.icmp_signed("<", lanes, _splat_value(builder, builder.trunc(count, i32), 8))
    return builder.select(keep, value, splat(f32, 8, float("-inf")))


def _mask_before(builder, value, count):
    """Lanes before `count` become -inf."""
    lanes = ir.Constant(vector(i32, 8), list(range(8)))
    keep = builder.icmp_signed(">=", lanes, _splat_value(builder, builder.trunc(count, i32), 8))
    return builder.select(keep, value, splat(f32, 8, float("-inf")))


mask_after = _op2(F32x8, _mask_after)
mask_before = _op2(F32x8, _mask_before)


def _exp(builder, x):
    """exp(x): 2^n times a polynomial on [-ln2/2, ln2/2]; below -87.3 exactly 0. Error under 2 ulp.

    Source: the usual Cody-Waite reduction and Cephes' expf coefficients.
    """
    v = vector(f32, 8)

    def constant(value):
        return splat(f32, 8, value)

    # A NaN input leaves through the polynomial; -inf is caught by the last select.
    clamped = builder.select(builder.fcmp_unordered("<", x, constant(88.0)), x, constant(88.0))
    n = builder.fsub(
        builder.fadd(builder.fmul(clamped, constant(1.4426950408889634)), constant(_ROUND)),
        constant(_ROUND),
    )
    r = lowering.fma(builder, n, constant(-0.693359375), clamped)
    r = lowering.fma(builder, n, constant(2.12194440e-4), r)
    p = constant(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        p = lowering.fma(builder, p, r, constant(c))
    p = lowering.fma(builder, builder.fmul(p, r), r, builder.fadd(r, constant(1.0)))
    exponent = builder.shl(
        builder.sub(
            builder.bitcast(builder.fadd(n, constant(_ROUND)), vector(i32, 8)),
            splat(i32, 8, 0x4B400000 - 127),
        ),
        splat(i32, 8, 23),
    )
    result = builder.fmul(p, builder.bitcast(exponent, v))
    tiny = builder.fcmp_ordered("<", x, constant(-87.3))
    return builder.select(tiny, constant(0.0), result)


exp = _op1(F32x8, _exp)


def _exp2(builder, x):
    """2^x for x <= 0; below -125 exactly 0, and 2^0 exactly 1. Error under 2 ulp.

    Source: Cephes' exp2f coefficients.
    """
    shifted = builder.fadd(x, splat(f32, 8, _ROUND))
    r = builder.fsub(x, builder.fsub(shifted, splat(f32, 8, _ROUND)))
    p = splat(f32, 8, 1.535336188319500e-4)
    for c in (
        1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1,
        6.931472028550421e-1, 1.0,
    ):  # fmt: skip
        p = lowering.fma(builder, p, r, splat(f32, 8, c))
    exponent = builder.shl(builder.bitcast(shifted, vector(i32, 8)), splat(i32, 8, 23))
    result = builder.add(builder.bitcast(p, vector(i32, 8)), exponent)
    seen = builder.fcmp_ordered(">", x, splat(f32, 8, -125.0))
    return builder.select(seen, builder.bitcast(result, vector(f32, 8)), splat(f32, 8, 0.0))


exp2 = _op1(F32x8, _exp2)
sqrt_f32 = _op1(types.float32, lambda b, v: call(b, "llvm.sqrt.f32", f32, v))


# --- threads --------------------------------------------------------------------------------------
load_acquire = _op1(types.int64, lambda b, a: b.load_atomic(_pointer(b, a, i64), "acquire", 8))
store_release = _op2(
    types.void, lambda b, a, v: b.store_atomic(v, _pointer(b, a, i64), "release", 8)
)
atomic_add = _op2(
    types.int64, lambda b, a, v: b.atomic_rmw("add", _pointer(b, a, i64), v, "seq_cst")
)
compare_exchange = _op3(
    types.int64,
    lambda b, a, old, new: b.zext(
        b.extract_value(b.cmpxchg(_pointer(b, a, i64), old, new, "seq_cst", "seq_cst"), 1), i64
    ),
)
pause = _op0(types.void, lambda b: lowering.pause(b))


def _call_system(builder, function, *args):
    fn = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    pointer = builder.inttoptr(function, fn.as_pointer())
    return builder.call(pointer, args, cconv=system_convention)


call_yield = _op1(types.void, _call_system)
# The system's sleep takes an unsigned 32-bit count.
call_sleep = _op2(types.void, lambda b, f, units: _call_system(b, f, b.trunc(units, i32)))


@intrinsic
def call_pread(typingctx, function, file, to, nbytes, offset):
    """Call the system's pread: bytes read, 0 at the end of the file, -1 on an error."""

    def codegen(context, builder, sig, args):
        fn = ir.FunctionType(i64, [i32, i64, i64, i64])
        pointer = builder.inttoptr(args[0], fn.as_pointer())
        return builder.call(pointer, [builder.trunc(args[1], i32), *args[2:]])

    return types.int64(*sig_args(function, file, to, nbytes, offset)), codegen


@intrinsic
def call_operation(typingctx, function, step, record, part, first, count, scratch):
    """Call a compiled operation through its address."""

    def codegen(context, builder, sig, args):
        fn = ir.FunctionType(ir.VoidType(), [i64] * 6)
        pointer = builder.inttoptr(args[0], fn.as_pointer())
        builder.call(pointer, args[1:], cconv=system_convention)
        return context.get_dummy_value()

    return types.void(*sig_args(function, step, record, part, first, count, scratch)), codegen


def sig_args(*args):
    return [types.int64 for _ in args]


@inline
def capped(v, cap):
    """cap * tanh(v / cap)."""
    two = splat_f32(types.float32(2.0) / cap)
    one = splat_f32(types.float32(1.0))
    e = exp(minimum(v * two, splat_f32(types.float32(60.0))))
    return divide(e - one, e + one) * splat_f32(cap)
