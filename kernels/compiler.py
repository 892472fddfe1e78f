"""Operations as objects that run without Python: names, files, checks, loading, building in processes.

An operation is named `module.function` or `module.function[variant]`, for example
`matmul.project[q4_1]`: module and function lie beside this file; with a variant the function is a
factory that returns the one to compile.  A function whose first parameter is `step` is an operation of
the program: the compiler wraps it so that its further parameters are read from the record; any other
takes and returns 64-bit integers (`step.launch`).

Only the worker processes that build import Numba (`builder.py`).  One object per operation and tier,
named by the SHA-256 of everything that made it, so that a stale one is never found; it carries its own
SHA-256, because a damaged object does not fail but runs wrongly or crashes the process.
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
from .targets import Target

_SOURCES = Path(__file__).parent


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
    for module_ in (module, "builder", target.lowering.partition(".")[0]):
        digest.update(_source_hash(module_))
    made_for = (target.triple, target.cpu, target.feature_string, target.lowering)
    digest.update(repr((name, made_for, calling_convention(target), _tool_versions())).encode())
    stem = function if variant is None else f"{function}_{variant}"
    return directory / target.name / f"{module}-{stem}-{digest.hexdigest()[:24]}.bin"


def calling_convention(target: Target) -> str:
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


def write_object(path: Path, header: dict[str, Any], image: bytes) -> None:
    """Write an object that `_read_object` trusts, whole or not at all."""
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


# --- building -------------------------------------------------------------------------------------
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
    cost = {"attention.attend": -2, "matmul.project": -1}
    queue = sorted(names, key=lambda name: cost.get(name.partition("[")[0], 0))
    lock = threading.Lock()
    problems: list[str] = []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    program = f"from {__package__}.builder import serve_builds; serve_builds()"
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
