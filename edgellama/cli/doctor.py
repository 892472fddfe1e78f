"""`edgellama doctor` and `warmup`: what this machine is, and making it ready."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from edgellama import __version__, catalog, cpu
from edgellama.errors import EdgeLlamaError, UsageError


@click.command("doctor")
@click.argument("model", required=False)
@click.option("--offline", is_flag=True, help="Never touch the network.")
def doctor(model: str | None, offline: bool) -> None:
    """Show what edgellama sees of this machine, and what that allows for MODEL.

    Reading and multiplying are measured; a MODEL cannot run faster than they let it.
    """
    from edgellama.kernels import targets

    try:
        target = targets.detect()
    except RuntimeError as error:
        raise UsageError(str(error)) from error
    total, available = cpu.memory_nbytes()
    limit, quota = cpu.cgroup_memory_nbytes(), cpu.cgroup_quota()
    path = None if model is None else catalog.resolve(model, offline=offline)
    measured = _measured(path)
    packs = catalog.home() / "packs" / target.name
    rows = {
        "edgellama": f"{__version__}, Python {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libraries": ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES),
        "CPU": cpu.cpu_name(),
        "tier": f"{target.name} (known: {', '.join(targets.TARGETS)})",
        "CPU flags": " ".join(sorted(targets.host_features() & _INTERESTING)) or "none of note",
        "processors": f"{os.cpu_count()}, of which {len(cpu.allowed_cpus())} allowed on "
        f"{cpu.n_allowed_cores()} cores"
        + (f"; the control group grants {quota:g}" if quota else ""),
        "threads": f"{cpu.n_usable_cores()} cores to use; {_list(cpu.thread_counts())} to choose from, "
        "measured for every model",
        "memory": f"{_gigabytes(total)}, {_gigabytes(available)} available"
        + (f"; the control group grants {_gigabytes(limit)}" if limit else ""),
        "home": str(catalog.home()),
        "kernel packs": f"{len(list(packs.glob('*.bin')))} objects",
        "models": ", ".join(name for name, _, _ in catalog.installed()) or "none fetched",
        **measured,
    }
    for name, text in rows.items():
        click.echo(f"{name:14}{text}")


def _measured(path: Path | None) -> dict[str, str]:
    """Rows of what the machine reaches, and of the bounds that follow for a model."""
    from edgellama.runtime.ceiling import measure

    try:
        ceilings = measure(cpu.n_usable_cores())
    except EdgeLlamaError as error:  # the other rows may say why
        if path is not None:
            raise
        return {"reads": f"not measured: {error}"}
    rows = {
        "reads": f"{ceilings.read / 1e9:.1f} GB/s on {ceilings.n_threads} threads",
        "multiplies": ", ".join(f"{n / 1e9:.0f} GMAC/s of {f}" for f, n in ceilings.macs.items()),
    }
    if path is None:
        return rows
    from edgellama.gguf import open_gguf
    from edgellama.kernels import targets
    from edgellama.models.config import read_config
    from edgellama.runtime.cost import CostModel
    from edgellama.runtime.tuning import Tuning

    with open_gguf(path) as gguf:
        costs = CostModel(gguf, read_config(gguf), "f16")
    threads = Tuning(costs.program, targets.detect().name, cpu.thread_counts()).recall()
    decode, prefill = costs.step(0, 1), costs.step(0, _N_PROMPT)
    return rows | {
        "model": str(path),
        "its threads": "measured when it is first used, or by edgellama warmup"
        if threads is None
        else f"{threads.decode} for decode, {threads.prefill} for prefill",
        "decode": f"at most {ceilings.read / decode.nbytes:.0f} tokens/s: a step reads "
        f"{decode.nbytes / 1e6:.1f} MB",
        "prefill": f"at most {_N_PROMPT / ceilings.shortest_s(prefill):.0f} tokens/s: a token of "
        f"{_N_PROMPT} takes "
        + ", ".join(f"{n / _N_PROMPT / 1e6:.1f} M of {f}" for f, n in prefill.macs.items() if n),
    }


def _list(numbers: list[int]) -> str:
    *rest, last = (str(number) for number in numbers)
    return f"{', '.join(rest)} or {last}" if rest else last


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "missing"


def _gigabytes(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / 1e9:.1f} GB"


_N_PROMPT = 512
_LIBRARIES = (
    "click", "jinja2", "llvmlite", "numba", "numpy", "rich", "sentencepiece", "tokenizers",
)  # fmt: skip
_INTERESTING = frozenset({
    "avx", "avx2", "fma", "f16c", "avxvnni", "avx512f", "avx512bw", "avx512vl", "avx512vnni",
    "neon", "dotprod", "i8mm", "sve",
})  # fmt: skip


@click.command("warmup")
@click.argument("model", required=False)
@click.option("--target", "tier", metavar="TIER", help="Build for another CPU tier.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
def warmup(model: str | None, tier: str | None, offline: bool) -> None:
    """Build the kernels that MODEL needs and measure how many threads it should run on.

    For another tier than this machine's, kernels are all there is to make ready.
    """
    from edgellama.gguf import open_gguf
    from edgellama.kernels import targets
    from edgellama.models.config import read_config
    from edgellama.runtime.engine import Engine
    from edgellama.runtime.packs import prepare_pack

    if tier is not None and tier not in targets.TARGETS:
        raise UsageError(f"no tier is called {tier!r}; tiers: {', '.join(targets.TARGETS)}")
    target = targets.TARGETS[tier] if tier else targets.detect()
    with open_gguf(catalog.resolve(model, offline=offline)) as gguf:
        config = read_config(gguf)
        n_built = prepare_pack(gguf, config, "f16", target)
        click.echo(f"{n_built} kernels built for {target.name}")
        if tier is not None:
            return
        engine = Engine(gguf, config, n_ctx=min(_N_PROMPT, config.context_length))
        decode, prefill = engine.tune()
        engine.close()
    click.echo(f"threads: {decode} for decode, {prefill} for prefill")
