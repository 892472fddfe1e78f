"""LLVM IR by hand: the types and the few idioms that vector operations and lowerings are written in.

Functions take an IR builder and values and return a value; addresses are 64-bit integers.
"""

from __future__ import annotations

from llvmlite import ir

i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
f16, f32 = ir.HalfType(), ir.FloatType()


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def splat(element: ir.Type, lanes: int, value: float) -> ir.Constant:
    return ir.Constant(vector(element, lanes), [value] * lanes)


def splat_value(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """All lanes hold a value known when the kernel runs."""
    undefined = ir.Constant(vector(value.type, lanes), ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, value, i32(0)), [0] * lanes)


def shuffle(builder: ir.IRBuilder, value: ir.Value, lanes: list[int]) -> ir.Value:
    return builder.shuffle_vector(value, value, ir.Constant(vector(i32, len(lanes)), lanes))


def concatenate(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    lanes = list(range(2 * low.type.count))
    return builder.shuffle_vector(low, high, ir.Constant(vector(i32, len(lanes)), lanes))


def pointer(builder: ir.IRBuilder, address: ir.Value, pointee: ir.Type) -> ir.Value:
    return builder.inttoptr(address, pointee.as_pointer())


def load(builder: ir.IRBuilder, address: ir.Value, ir_type: ir.Type) -> ir.Value:
    return builder.load(pointer(builder, address, ir_type), align=1)


def store_value(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    builder.store(value, pointer(builder, address, value.type), align=1)


def broadcast4(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """4 neighbouring bytes at an address, 8 times."""
    return builder.bitcast(splat_value(builder, load(builder, address, i32), 8), vector(i8, 32))


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic."""
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, function_type, name)
    return builder.call(function, args)
