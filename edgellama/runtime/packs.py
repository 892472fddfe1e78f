"""Kernels for a model: loaded for this CPU, built first where they are missing."""

from __future__ import annotations

from collections.abc import Sequence

from edgellama.catalog import home
from edgellama.cpu import n_usable_cores
from edgellama.errors import KernelError
from edgellama.gguf import GGUFFile
from edgellama.kernels import targets, team
from edgellama.kernels.compiler import BuildError, Pack, build, missing_objects
from edgellama.models.config import ModelConfig
from edgellama.progress import progress

from .lowering import compile_program


def load_pack(names: Sequence[str], target: targets.Target) -> Pack:
    """Load operations for this CPU, building first those that are missing or damaged.

    Raises: KernelError.
    """
    try:
        pack = Pack(target, home() / "packs")
        missing = pack.missing(names)
        if missing:
            _build(missing, target)
        pack.load(names)
    except (BuildError, RuntimeError, OSError) as error:
        raise KernelError(f"kernels could not be prepared: {error}") from error
    return pack


def prepare_pack(gguf: GGUFFile, config: ModelConfig, kv_type: str, target: targets.Target) -> int:
    """Build what is missing of a model's kernels for any tier; return how many were built.

    Raises: KernelError.
    """
    program = compile_program(config, gguf.tensors, kv_type)
    try:
        missing = missing_objects([*program.operations, *team.NAMES], target, home() / "packs")
        if missing:
            _build(missing, target)
    except (BuildError, OSError) as error:
        raise KernelError(f"kernels could not be prepared: {error}") from error
    return len(missing)


def _build(names: Sequence[str], target: targets.Target) -> None:
    title = f"Building kernels for {target.name} (once)"
    with progress(title, len(names), unit="") as advance:
        build(names, target, home() / "packs", n_processes=n_usable_cores(), advance=advance)
