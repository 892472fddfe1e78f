"""CPU tiers: what a kernel pack is built for, and which of them this machine can run.

A tier is a row of `TARGETS`; `lowering` names the module beside this one that says how the few
target-dependent operations of `simd.py` become LLVM IR.  No Numba here: the runtime asks for the tier.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """A CPU tier: the LLVM CPU and features of its objects and the CPU flags it needs to run."""

    name: str
    machine: str
    cpu: str
    features: str
    lowering: str
    needs: frozenset[str]

    @property
    def triple(self) -> str:
        """Objects are ELF on every system: MCJIT links them itself."""
        return f"{self.machine}-unknown-linux-gnu"


_V3 = frozenset({"avx2", "fma", "f16c"})
_VNNI = _V3 | {"avx512f", "avx512bw", "avx512vl", "avx512vnni"}
_V3_FEATURES = "+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+movbe"

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (  # best first
        Target(
            "x86-64-avx512vnni",
            "x86_64",
            "x86-64-v3",
            _V3_FEATURES + ",+avx512f,+avx512bw,+avx512dq,+avx512cd,+avx512vl,+avx512vnni",
            "x86.AVX512VNNI",
            _VNNI,
        ),
        Target("x86-64-v3", "x86_64", "x86-64-v3", _V3_FEATURES, "x86.AVX2", _V3),
        Target("x86-64-generic", "x86_64", "x86-64", "", "generic.Generic", frozenset()),
        Target("arm64-generic", "aarch64", "generic", "+neon", "generic.Generic", frozenset()),
    )
}

_MACHINES = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


# Where Linux and LLVM spell a flag differently.
_SPELLING = {
    "avx512_vnni": "avx512vnni",
    "avx_vnni": "avxvnni",
    "asimd": "neon",
    "asimddp": "dotprod",
}


@cache
def host_features() -> frozenset[str]:
    """Flags of this CPU, in LLVM's spelling.

    Linux tells them itself, which saves importing LLVM, and knows dotprod and i8mm, which LLVM does not.
    """
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, flags = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(_SPELLING.get(flag, flag) for flag in flags.split())
    except OSError:
        pass
    import llvmlite.binding as llvm

    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


@cache
def detect() -> Target:
    """Return the best tier that this machine runs; EDGELLAMA_TARGET overrides it by name.

    Raises: RuntimeError for a machine or a tier name that is not known.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise RuntimeError(
            f"{platform.machine()} processors are not supported; edgellama needs x86-64 or arm64"
        )
    wanted = os.environ.get("EDGELLAMA_TARGET")
    if wanted:
        if wanted not in TARGETS or TARGETS[wanted].machine != machine:
            known = ", ".join(t.name for t in TARGETS.values() if t.machine == machine)
            raise RuntimeError(f"EDGELLAMA_TARGET={wanted} is not a tier of this machine ({known})")
        if not TARGETS[wanted].needs <= host_features():
            raise RuntimeError(f"EDGELLAMA_TARGET={wanted} needs instructions this CPU lacks")
        return TARGETS[wanted]
    return next(t for t in TARGETS.values() if t.machine == machine and t.needs <= host_features())
