"""From a Python function to an object that runs without Python: build, cache, check, load.

An operation is named `module.function` or `module.function[variant]`, for example
`matmul.project[q4_1]`: module and function lie beside this file; with a variant the function is a
factory that returns the one to compile.  A function whose first parameter is `step` is an operation of
the program: the compiler wraps it so that its further parameters are read from the record; any other
takes and returns 64-bit integers (`step.launch`).

Numba is imported only in the worker processes that build.  One object per operation and tier, named by
the SHA-256 of everything that made it, so that a stale one is never found; it carries its own SHA-256,
because a damaged object does not fail but runs wrongly or crashes the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .image import ExecutableMemory
from .targets import TARGETS, Target, host_machine

_SOURCES = Path(__file__).parent
_COMMON = ("step", "part", "first", "count", "scratch")


class BuildError(RuntimeError):
    """An operation did not compile, or its object is not self-contained."""


class Operation(NamedTuple):
    """A loaded operation: its address, and the names of its record arguments (float ones marked)."""

    address: int
    arguments: tuple[str, ...]
    floats: frozenset[str]


# --- names and keys -------------------------------------------------------------------------------
def parse_name(name: str) -> tuple[str, str, str | None]:
    """Split `module.function[variant]`."""
    match = re.fullmatch(r"(\w+)\.(\w+)(?:\[(\w+)\])?", name)
    if match is None:
        raise BuildError(f"{name!r} is not the name of an operation")
    return match[1], match[2], match[3]


@cache
def _source_hash(module: str) -> bytes:
    """SHA-256 over a module of this folder and all that it imports from here."""
    seen: dict[str, bytes] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        path = _SOURCES / f"{name}.py"
        if name in seen or not path.exists():
            continue
        seen[name] = path.read_bytes()
        text = seen[name].decode()
        pending += re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)
        for names in re.findall(r"^\s*from \. import (.+)", text, re.MULTILINE):
            pending += re.findall(r"\w+", names)
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(name.encode() + hashlib.sha256(seen[name]).digest())
    return digest.digest()


@cache
def _tool_versions() -> str:
    """Numba's and llvmlite's versions, from the names of their metadata folders: importing either,
    or importlib.metadata, would take longer than loading a whole pack."""
    found = []
    for package in ("numba", "llvmlite"):
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            site = Path(spec.origin).parents[1]
            found += sorted(path.name for path in site.glob(f"{package}-*.dist-info"))
    return " ".join(found)


def object_path(name: str, target: Target, directory: Path) -> Path:
    """Where the object of an operation lies, whether it is built or not."""
    module, function, variant = parse_name(name)
    digest = hashlib.sha256()
    for module_ in (module, "compiler", "link", target.lowering.partition(".")[0]):
        digest.update(_source_hash(module_))
    made_for = (target.triple, target.cpu, target.feature_string, target.lowering)
    digest.update(repr((name, made_for, _convention(target), _tool_versions())).encode())
    stem = function if variant is None else f"{function}_{variant}"
    return directory / target.name / f"{module}-{stem}-{digest.hexdigest()[:24]}.bin"


def _convention(target: Target) -> str:
    """How Python calls into a pack: on Windows not as the kernels call one another."""
    return "win64cc" if sys.platform == "win32" and target.machine == "x86_64" else "ccc"


# --- the file form: the SHA-256 of the rest, a line of JSON, the image -------------------------
def _read_object(path: Path) -> tuple[dict[str, Any], bytes] | None:
    """Return header and image, or None where there is none that can be trusted."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if hasattr(os, "getuid") and (
                status.st_uid not in (os.getuid(), 0)
                or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            ):
                return None
            digest, content = file.readline(100), file.read()
    except OSError:
        return None
    if digest.decode(errors="replace").strip() != hashlib.sha256(content).hexdigest():
        return None
    header, _, image = content.partition(b"\n")
    return json.loads(header), image


def _write_object(path: Path, header: dict[str, Any], image: bytes) -> None:
    import tempfile

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = json.dumps(header).encode() + b"\n" + image
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# --- building (in a worker process) ---------------------------------------------------------------
def _entry(name: str) -> tuple[Any, list[str], list[str]]:
    """Return the Python function to compile, its record arguments and which of them are floats."""
    import importlib
    import inspect

    module_name, function_name, variant = parse_name(name)
    module = importlib.import_module(f"{__package__}.{module_name}")
    function = getattr(module, function_name)
    if variant is not None:
        function = function(variant)
    from .simd import inline, load_f32, load_i64

    parameters = inspect.signature(function).parameters
    arguments = list(parameters)
    if arguments[: len(_COMMON)] != list(_COMMON):
        return function, arguments, []
    arguments = arguments[len(_COMMON) :]
    floats = [a for a in arguments if parameters[a].annotation in (float, "float")]
    from .layout import MAX_ARGUMENTS, RECORD_ARGUMENTS

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


def compile_module(name: str, target: Target) -> tuple[dict[str, Any], Any, Any]:
    """Compile one operation for one tier: (header, LLVM target machine, optimised module).

    The environment must name the tier's CPU to Numba before it is imported (`builder_environment`).
    """
    import importlib

    import llvmlite.binding as llvm
    from numba import int64, njit, void
    from numba.core.codegen import JITCodeLibrary, JITCPUCodegen

    from . import calls, vectors

    # Nothing runs in this process, whose CPU may not have the tier's instructions.
    JITCodeLibrary._finalize_specific = lambda library: None
    JITCodeLibrary.get_pointer_to_function = lambda library, name: library._ensure_finalized() or 0
    JITCPUCodegen.set_env = lambda codegen, name, environment: None

    module_name, _, class_name = target.lowering.partition(".")
    lowering = importlib.import_module(f"{__package__}.{module_name}")
    vectors.lowering = getattr(lowering, class_name)
    calls.system_convention = _convention(target)

    function, arguments, floats = _entry(name)
    is_operation = function.__name__ == "entry"
    n = 6 if is_operation else len(arguments)
    signature = (void if is_operation else int64)(*[int64] * n)
    dispatcher = njit(
        signature, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
    )(function)
    (compiled,) = dispatcher.overloads.values()
    inner = compiled.fndesc.llvm_func_name
    text = compiled.library.get_llvm_str()

    convention = _convention(target)
    symbol = re.sub(r"\W+", "_", name).strip("_")
    taken = ", ".join(f"i64 %a{i}" for i in range(n))
    text += (
        f"\ndefine {convention} {'void' if is_operation else 'i64'} @{symbol}({taken}) {{\n"
        "  %result = alloca i64\n  %error = alloca ptr\n"
        f'  %status = call i32 @"{inner}"(ptr %result, ptr %error, {taken})\n'
        + ("  ret void\n" if is_operation else "  %r = load i64, ptr %result\n  ret i64 %r\n")
        + "}\n"
    )
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
    text = re.sub(r'target triple = "[^"]*"', f'target triple = "{target.triple}"', text)
    layout = f'target datalayout = "{machine.target_data}"'
    text = re.sub(r'target datalayout = "[^"]*"', layout, text)
    # The loop passes must not turn copies into calls of memset and memcpy.
    text = re.sub(r"^attributes #(\d+) = \{", r'attributes #\1 = { "no-builtins"', text, flags=re.M)
    module = llvm.parse_assembly(text)
    for global_ in [*module.functions, *module.global_variables]:
        if global_.name != symbol and not global_.is_declaration:
            global_.linkage = "internal"
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    header = {"name": name, "entry": symbol, "arguments": arguments, "floats": floats}
    return header, machine, module


def build_object(name: str, target: Target) -> tuple[dict[str, Any], bytes]:
    """Compile one operation for one tier: header and image.

    Raises: BuildError when it would need a symbol from outside.
    """
    from .link import LinkError, flatten

    header, machine, module = compile_module(name, target)
    try:
        image, entry = flatten(machine.emit_object(module), header["entry"])
    except LinkError as error:
        raise BuildError(f"{name} for {target.name}: {error}") from error
    return header | {"entry": entry}, image


def serve_builds() -> None:
    """Worker process: read names from stdin, build each, answer a line of JSON."""
    target = TARGETS[sys.argv[1]]
    directory = Path(sys.argv[2])
    for line in sys.stdin:
        name = line.strip()
        try:
            _write_object(object_path(name, target, directory), *build_object(name, target))
            answer = {"name": name}
        except Exception as error:
            answer = {"name": name, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def builder_environment(target: Target) -> dict[str, str]:
    """Environment of a process that compiles for a tier."""
    at_home = target.machine == host_machine()
    return os.environ | {
        "NUMBA_CPU_NAME": target.cpu if at_home else "generic",
        "NUMBA_CPU_FEATURES": target.feature_string if at_home else "",
        "NUMBA_OPT": "1",  # the module is optimised once, by compile_module
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }


def build(
    names: Iterable[str],
    target: Target,
    directory: Path,
    *,
    n_processes: int,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Build the objects of `names` in parallel processes; `advance(1)` is called after each."""
    import subprocess  # 10 ms that most starts do not need

    # The costly ones first, so that no process is left with one at the end.
    queue = sorted(names, key=lambda name: not name.startswith(("matmul", "attention")))
    lock = threading.Lock()
    problems: list[str] = []
    environment = builder_environment(target)
    program = f"from {__package__}.compiler import serve_builds; serve_builds()"
    workers: list[subprocess.Popen[str]] = []

    def drive(worker: subprocess.Popen[str]) -> None:
        assert worker.stdin is not None
        assert worker.stdout is not None
        while True:
            with lock:
                if not queue:
                    break
                name = queue.pop(0)
            try:
                worker.stdin.write(name + "\n")
                worker.stdin.flush()
                answer = json.loads(worker.stdout.readline() or '{"error": "the builder died"}')
            except (OSError, ValueError) as error:
                answer = {"error": str(error)}
            if "error" in answer:
                with lock:
                    problems.append(f"{name}: {answer['error']}")
                    queue.clear()
            advance(1)

    try:
        for _ in range(max(1, min(n_processes, len(queue)))):
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-c", program, target.name, str(directory)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    text=True,
                )
            )
        threads = [threading.Thread(target=drive, args=(w,), daemon=True) for w in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # so that Ctrl-C is seen on every system
                thread.join(0.1)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    if problems:
        raise BuildError(problems[0])


def missing_objects(names: Iterable[str], target: Target, directory: Path) -> list[str]:
    """Which of `names` have no sound object on disk."""
    return [
        name
        for name in dict.fromkeys(names)
        if _read_object(object_path(name, target, directory)) is None
    ]


# --- loading --------------------------------------------------------------------------------------
class Pack:
    """The loaded operations of one tier. Keep it alive as long as anything may call into it."""

    def __init__(self, target: Target, directory: Path) -> None:
        self.target = target
        self.directory = directory
        self._operations: dict[str, Operation] = {}
        self._memory: list[ExecutableMemory] = []

    def __getitem__(self, name: str) -> Operation:
        return self._operations[name]

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which of `names` have no sound object on disk."""
        fresh = [name for name in names if name not in self._operations]
        return missing_objects(fresh, self.target, self.directory)

    def load(self, names: Iterable[str]) -> None:
        """Load objects that `missing` no longer names.

        Raises: BuildError when one is not there or damaged after all.
        """
        headers, images = [], []
        for name in dict.fromkeys(names):
            if name in self._operations:
                continue
            found = _read_object(object_path(name, self.target, self.directory))
            if found is None:
                raise BuildError(f"the object of {name} is missing or damaged")
            headers.append(found[0])
            images.append(found[1])
        memory = ExecutableMemory(images)
        self._memory.append(memory)
        for header, address in zip(headers, memory.addresses, strict=True):
            self._operations[header["name"]] = Operation(
                address + header["entry"], tuple(header["arguments"]), frozenset(header["floats"])
            )

    def function(self, name: str) -> Callable[..., int]:
        """A loaded function of 64-bit integers as a Python callable; it runs without the GIL."""
        operation = self[name]
        prototype = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(operation.arguments))
        return prototype(operation.address)
