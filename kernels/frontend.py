"""Numba's front end alone: from Python functions to LLVM IR, in a fifth of the usual time.

For every function Numba would look for closures, arrays and objects, try each operator with all that
NumPy overloads, and optimise and link the result, with its own runtime, for this process.  Kernels need
none of that: their functions pass through type inference and lowering only, and the IR is kept as text
for `builder.py`, which optimises an operation once, as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from numba.core import codegen, cpu, typing
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import PassManager
from numba.core.dispatcher import Dispatcher
from numba.core.registry import CPUTarget
from numba.core.target_extension import (
    CPU,
    dispatcher_registry,
    jit_registry,
    target_override,
    target_registry,
)
from numba.core.typed_passes import (
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
    NopythonTypeInference,
)
from numba.core.untyped_passes import (
    DeadBranchPrune,
    FixupArgs,
    GenericRewrites,
    IRProcessing,
    RewriteSemanticConstants,
    TranslateByteCode,
)

_PASSES = (
    TranslateByteCode,
    FixupArgs,
    IRProcessing,
    RewriteSemanticConstants,
    DeadBranchPrune,
    GenericRewrites,
    NopythonTypeInference,
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
)
_OPTIONS = {
    "nopython": True,
    "error_model": "numpy",
    "boundscheck": False,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "_nrt": False,
}


class _Compiler(CompilerBase):
    def define_pipelines(self) -> list[PassManager]:
        passes = PassManager("kernel")
        for pass_ in _PASSES:
            passes.add_pass(pass_, pass_.__name__)
        passes.finalize()
        return [passes]


class _Library(codegen.JITCodeLibrary):
    """The IR of a function and the libraries of those that it calls; nothing is compiled."""

    def __init__(self, owner: codegen.Codegen, name: str) -> None:
        codegen.CodeLibrary.__init__(self, owner, name)
        self._modules: list[str] = []
        self._callees: list[_Library] = []

    def add_ir_module(self, ir_module: Any) -> None:
        self._modules.append(str(ir_module))

    def add_linking_library(self, library: _Library) -> None:
        self._callees.append(library)

    def finalize(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    def modules(self, seen: set[_Library]) -> Iterator[str]:
        """Its own IR and that of all it calls, each once."""
        if self not in seen:
            seen.add(self)
            yield from self._modules
            for library in self._callees:
                yield from library.modules(seen)


class _Codegen(codegen.JITCPUCodegen):
    _library_class = _Library

    def set_env(self, env_name: str, env: object) -> None:
        """A kernel has no globals that are Python objects."""


class _TypingContext(typing.Context):
    """Knows integers, floats, ranges and tuples, and remembers what it has resolved."""

    def __init__(self) -> None:
        self._resolved: dict[tuple[Any, ...], Any] = {}
        super().__init__()

    def load_additional_registries(self) -> None:
        """Leave out NumPy, lists, sets and the rest."""

    def resolve_function_type(self, func: Any, args: Any, kws: Any) -> Any:
        key = (func, tuple(args), tuple(dict(kws).items()))
        if key not in self._resolved:
            self._resolved[key] = super().resolve_function_type(func, args, kws)
        return self._resolved[key]


class _TargetContext(cpu.CPUContext):
    def init(self) -> None:
        self.is32bit = False
        self._internal_codegen = _Codegen("kernels")
        self._sizes: dict[Any, int] = {}

    def load_additional_registries(self) -> None:
        """Import what registers how those types are lowered."""
        from numba.cpython import builtins, iterators, numbers, rangeobj, tupleobj  # noqa: F401

    def post_lowering(self, mod: Any, library: _Library) -> None:
        """Leave out Numba's runtime."""

    def get_abi_sizeof(self, ty: Any) -> int:
        if ty not in self._sizes:  # Numba asks for every variable, and LLVM answers slowly
            self._sizes[ty] = super().get_abi_sizeof(ty)
        return self._sizes[ty]


class _Target(CPUTarget):
    @cached_property
    def _toplevel_typing_context(self) -> typing.Context:
        return _TypingContext()

    @cached_property
    def _toplevel_target_context(self) -> cpu.CPUContext:
        return _TargetContext(self.typing_context, self._target_name)


class _Dispatcher(Dispatcher):
    targetdescr = _Target("kernel")


class _Kernel(CPU):
    """What Numba calls the target: it takes intrinsics and overloads that are for any CPU."""


def inline(function: Callable[..., Any]) -> Any:
    """Decorate a function that kernels call."""
    return _Dispatcher(function, targetoptions=_OPTIONS.copy(), pipeline_class=_Compiler)


target_registry["kernel"] = _Kernel
dispatcher_registry[_Kernel] = _Dispatcher
jit_registry[_Kernel] = lambda **options: inline  # for overloads, like those of min and max


def lower(function: Callable[..., Any], signature: Any) -> tuple[str, list[str]]:
    """Return the name of a function in LLVM IR, and the modules that define it and all it calls."""
    dispatcher = inline(function)
    with target_override("kernel"):
        dispatcher.compile(signature)
    (compiled,) = dispatcher.overloads.values()
    return compiled.fndesc.llvm_func_name, list(compiled.library.modules(set()))
