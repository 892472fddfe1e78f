"""What reaches beyond a kernel's own data: atomics that other threads see, and calls by address.

Objects have no external symbols, so the system's functions and other operations are called through
addresses that Python puts into memory.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from . import vectors
from .emit import i32, i64, pointer
from .vectors import operation

system_convention = "ccc"  # of what is called through an address; set by the compiler


# --- atomics --------------------------------------------------------------------------------------
def _compare_exchange(builder, address, old, new):
    """1 where the value was `old` and is now `new`, else 0."""
    at = pointer(builder, address, i64)
    return builder.zext(
        builder.extract_value(builder.cmpxchg(at, old, new, "seq_cst", "seq_cst"), 1), i64
    )


load_acquire = operation(types.int64, lambda b, a: b.load_atomic(pointer(b, a, i64), "acquire", 8))
store_release = operation(
    types.void, lambda b, a, v: b.store_atomic(v, pointer(b, a, i64), "release", 8)
)
atomic_add = operation(
    types.int64, lambda b, a, v: b.atomic_rmw("add", pointer(b, a, i64), v, "seq_cst")
)
compare_exchange = operation(types.int64, _compare_exchange)
pause = operation(types.void, lambda b: vectors.lowering.pause(b))


# --- calls ----------------------------------------------------------------------------------------
def _call(builder, address, result, convention, *args):
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    function = builder.inttoptr(address, function_type.as_pointer())
    return builder.call(function, args, cconv=convention)


def _call_system(builder, function, *args):
    _call(builder, function, ir.VoidType(), system_convention, *args)


def _call_yield(builder, function):
    _call_system(builder, function)


def _call_clock(builder, function, argument, words):
    _call_system(builder, function, argument, words)


def _call_sleep(builder, function, units):
    """The system's sleep takes an unsigned 32-bit count."""
    _call_system(builder, function, builder.trunc(units, i32))


def _call_pread(builder, function, file, to, nbytes, offset):
    """Bytes read, 0 at the end of the file, -1 on an error."""
    return _call(builder, function, i64, "ccc", builder.trunc(file, i32), to, nbytes, offset)


def _call_operation(builder, function, step, record, part, first, count, scratch):
    _call_system(builder, function, step, record, part, first, count, scratch)


call_yield = operation(types.void, _call_yield)
call_clock = operation(types.void, _call_clock)
call_sleep = operation(types.void, _call_sleep)
call_pread = operation(types.int64, _call_pread)
call_operation = operation(types.void, _call_operation)
