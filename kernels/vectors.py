"""The vector types, and `operation`, which declares what is done with them.

Only types and machinery are here; the operations lie by subject in `memory.py`, `integers.py`,
`floats.py` and `calls.py`, and kernels import all of them from `simd.py`.  What depends on the CPU is
asked of `lowering`, which the compiler sets before it compiles anything.
"""

from __future__ import annotations

import inspect
import operator

from numba import types
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

from . import generic
from .emit import f32, i8, i16, i32, vector

lowering: type[generic.Generic] = generic.Generic


class Vec(types.Type):
    """A machine vector as a Numba type: lives in registers, passes between jitted functions."""

    def __init__(self, name, ir_type):
        self.ir_type = ir_type
        super().__init__(name)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, fe_type.ir_type)


class _Pairs(Vec):
    """Its machine type is the tier's, looked up when it is compiled."""

    def __init__(self):
        types.Type.__init__(self, "Pairs")

    @property
    def ir_type(self):
        return lowering.pairs_type


register_model(_Pairs)(_VecModel)

F32x8 = Vec("F32x8", vector(f32, 8))
I32x8 = Vec("I32x8", vector(i32, 8))
Bytes32 = Vec("Bytes32", vector(i8, 32))
Bytes16 = Vec("Bytes16", vector(i8, 16))
Words16 = Vec("Words16", vector(i16, 16))
Pairs = _Pairs()


def operation(result, emit):
    """Return what kernels call: its result is of a fixed type, and `emit(builder, *values)` its IR.

    It takes the arguments that `emit` takes after the builder; integers reach `emit` as 64 bits, so
    that literals and small ints are welcome.  Each argument has a name: Numba would make a tuple of *args.
    """

    def declared(typingctx, *args):
        def codegen(context, builder, sig, values):
            wide = [
                context.cast(builder, value, type_, types.int64)
                if isinstance(type_, types.Integer) and type_.bitwidth != 64
                else value
                for type_, value in zip(sig.args, values, strict=True)
            ]
            value = emit(builder, *wide)
            return context.get_dummy_value() if result is types.void else value

        return result(*args), codegen

    declared.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
    return intrinsic(declared)


# --- the operators of Python ----------------------------------------------------------------------
def _operator(python, name_f32, name_i32):
    @infer_global(python)
    class _OperatorOfVectors(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and args[0] == args[1] and args[0] in (F32x8, I32x8):
                return signature(args[0], *args)
            return None

    for type_, name in ((F32x8, name_f32), (I32x8, name_i32)):

        def codegen(context, builder, sig, args, name=name):
            return getattr(builder, name)(*args)

        lower_builtin(python, type_, type_)(codegen)


_operator(operator.add, "fadd", "add")
_operator(operator.sub, "fsub", "sub")
_operator(operator.mul, "fmul", "mul")
