"""From an operation's name to its object: the worker processes of `compiler.build`.

Only they import Numba.  An operation becomes LLVM IR (`frontend.py`), is optimised once with everything
inlined, and becomes a flat image (`link.py`).
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from numba import int64, void

from . import calls, vectors
from .compiler import BuildError, calling_convention, object_path, parse_name, write_object
from .frontend import inline, lower
from .layout import MAX_ARGUMENTS, RECORD_ARGUMENTS
from .link import LinkError, flatten
from .simd import load_f32, load_i64
from .targets import TARGETS, Target

_COMMON = ("step", "part", "first", "count", "scratch")


def _entry(name: str) -> tuple[Any, list[str], list[str]]:
    """Return the Python function to compile, its record arguments and which of them are floats."""
    module_name, function_name, variant = parse_name(name)
    module = importlib.import_module(f"{__package__}.{module_name}")
    function = getattr(module, function_name)
    if variant is not None:
        function = function(variant)
    parameters = inspect.signature(function).parameters
    arguments = list(parameters)
    if arguments[: len(_COMMON)] != list(_COMMON):
        return function, arguments, []
    arguments = arguments[len(_COMMON) :]
    floats = [a for a in arguments if parameters[a].annotation in (float, "float")]
    assert len(arguments) <= MAX_ARGUMENTS, f"{name} takes more arguments than a record holds"
    reads = [
        f"{'load_f32' if a in floats else 'load_i64'}(record + {RECORD_ARGUMENTS + 8 * i})"
        for i, a in enumerate(arguments)
    ]
    source = (
        "def entry(step, record, part, first, count, scratch):\n"
        f"    kernel({', '.join([*_COMMON, *reads])})\n"
    )
    space = {"kernel": inline(function), "load_f32": load_f32, "load_i64": load_i64}
    exec(compile(source, f"<{name}>", "exec"), space)
    return space["entry"], arguments, floats


def build_object(name: str, target: Target) -> tuple[dict[str, Any], bytes]:
    """Compile one operation for one tier: header and image.

    Raises: BuildError when it would need a symbol from outside.
    """
    header, machine, module = compile_module(name, target)
    try:
        image, entry = flatten(machine.emit_object(module), header["entry"])
    except LinkError as error:
        raise BuildError(f"{name} for {target.name}: {error}") from error
    return header | {"entry": entry}, image


def compile_module(
    name: str, target: Target
) -> tuple[dict[str, Any], llvm.TargetMachine, llvm.ModuleRef]:
    """Return the header of an operation, and its optimised IR with the machine that emits code."""
    module_name, _, class_name = target.lowering.partition(".")
    lowering = importlib.import_module(f"{__package__}.{module_name}")
    vectors.lowering = getattr(lowering, class_name)
    calls.system_convention = calling_convention(target)

    function, arguments, floats = _entry(name)
    is_operation = function.__name__ == "entry"
    n = 6 if is_operation else len(arguments)
    inner, modules = lower(function, (void if is_operation else int64)(*[int64] * n))

    symbol = re.sub(r"\W+", "_", name).strip("_")
    taken = ", ".join(f"i64 %a{i}" for i in range(n))
    caller = (
        f'declare i32 @"{inner}"(ptr, ptr, {", ".join(["i64"] * n)})\n'
        f"define {calls.system_convention} {'void' if is_operation else 'i64'} @{symbol}({taken})\n"
        "{\n  %result = alloca i64\n  %error = alloca ptr\n"
        f'  %status = call i32 @"{inner}"(ptr %result, ptr %error, {taken})\n'
        + ("  ret void\n" if is_operation else "  %r = load i64, ptr %result\n  ret i64 %r\n")
        + "}\n"
    )
    header = {"name": name, "entry": symbol, "arguments": arguments, "floats": floats}
    return header, *_optimised([caller, *modules], symbol, target)


def _optimised(
    modules: list[str], symbol: str, target: Target
) -> tuple[llvm.TargetMachine, llvm.ModuleRef]:
    """Optimise modules of LLVM IR as one, in which only `symbol` is seen."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu,
        features=target.feature_string,
        opt=3,
        reloc="pic",
        codemodel="small",
        jit=True,
    )
    head = f'target triple = "{target.triple}"\ntarget datalayout = "{machine.target_data}"\n'
    whole = llvm.parse_assembly(head)
    for text in modules:
        text = re.sub(r"^target (triple|datalayout) = .*$", "", text, flags=re.MULTILINE)
        # The loop passes must not turn copies into calls of memset and memcpy.
        text = re.sub(r"^(define .*)$", r'\1 "no-builtins"', text, flags=re.MULTILINE)
        whole.link_in(llvm.parse_assembly(head + text))
    for function in whole.functions:
        if function.name != symbol and not function.is_declaration:
            function.linkage = "internal"
            function.add_function_attribute("alwaysinline")
    for variable in whole.global_variables:
        variable.linkage = "internal"
    # Level 3 unrolls more, which takes half as long again and runs no faster.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(whole, builder)
    return machine, whole


def serve_builds() -> None:
    """Worker process: read names from stdin, build each, answer a line of JSON."""
    target = TARGETS[sys.argv[1]]
    directory = Path(sys.argv[2])
    for line in sys.stdin:
        name = line.strip()
        try:
            write_object(object_path(name, target, directory), *build_object(name, target))
            answer = {"name": name}
        except Exception as error:
            answer = {"name": name, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
