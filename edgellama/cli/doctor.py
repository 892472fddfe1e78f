"""`edgellama doctor` and `warmup`: what this machine is, and making it ready."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import click

from edgellama import __version__, catalog
from edgellama.cpu import cgroup_quota, n_usable_cores
from edgellama.errors import UsageError


@click.command("doctor")
def doctor() -> None:
    """Show what edgellama sees of this machine."""
    from edgellama.kernels import targets

    target = targets.detect()
    quota = cgroup_quota()
    rows = {
        "edgellama": f"{__version__}, Python {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libraries": ", ".join(f"{p} {version(p)}" for p in ("numba", "llvmlite", "numpy")),
        "tier": f"{target.name} (known: {', '.join(targets.TARGETS)})",
        "CPU flags": " ".join(sorted(targets.host_features() & _INTERESTING)) or "none of note",
        "processors": f"{os.cpu_count()}, {n_usable_cores()} threads by default"
        + (f", control group grants {quota:g}" if quota else ""),
        "home": str(catalog.home()),
        "kernel packs": f"{len(list((catalog.home() / 'packs' / target.name).glob('*.o')))} objects",
        "models": ", ".join(name for name, _, _ in catalog.installed()) or "none fetched",
    }
    for name, text in rows.items():
        click.echo(f"{name:14}{text}")


_INTERESTING = frozenset(
    [
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avxvnni",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512vnni",
        "neon",
        "dotprod",
        "i8mm",
        "sve",
    ]
)


@click.command("warmup")
@click.argument("model", required=False)
@click.option("--target", "tier", metavar="TIER", help="Build for another CPU tier.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
def warmup(model: str | None, tier: str | None, offline: bool) -> None:
    """Build the kernels that MODEL needs, for this machine or another tier."""
    from edgellama.gguf import open_gguf
    from edgellama.kernels import targets
    from edgellama.models.config import read_config
    from edgellama.runtime.engine import prepare_pack

    if tier is not None and tier not in targets.TARGETS:
        raise UsageError(f"no tier is called {tier!r}; tiers: {', '.join(targets.TARGETS)}")
    target = targets.TARGETS[tier] if tier else targets.detect()
    with open_gguf(catalog.resolve(model, offline=offline)) as gguf:
        n_built = prepare_pack(gguf, read_config(gguf), target)
    click.echo(f"{n_built} kernels built for {target.name}")


COMMANDS = {"doctor": doctor, "warmup": warmup}
