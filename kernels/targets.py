"""CPU tiers: what a kernel pack is built for, and which of them this machine can run.

A tier is a row of `TARGETS`; `lowering` names the module beside this one that says how the few
target-dependent operations of `simd.py` become LLVM IR.  No Numba here: the runtime asks for the tier.
"""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """A CPU tier: the LLVM CPU and features of its objects, which it also needs to run."""

    name: str
    machine: str
    cpu: str
    features: tuple[str, ...]
    lowering: str
    hints: tuple[str, ...] = ()
    """LLVM's names of what this CPU is good at; they need nothing of it."""

    @property
    def triple(self) -> str:
        """Objects are ELF on every system: `link.py` makes flat images of them."""
        return f"{self.machine}-unknown-linux-gnu"

    @property
    def feature_string(self) -> str:
        """As LLVM and Numba take it."""
        return ",".join(f"+{name}" for name in (*self.features, *self.hints))


_X86, _ARM = "x86_64", "aarch64"
_V3 = ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "popcnt", "movbe")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512cd", "avx512vl", "avx512vnni")
_VNNI_HINTS = (
    "fast-dpwssd",
)  # else LLVM takes most vpdpwssd apart, into a fifth more instructions
_AVX512_HINTS = (*_VNNI_HINTS, "prefer-256-bit")  # a few stores of 512 bits would lower the clock

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (  # of each machine the best first; its last runs everywhere
        Target("x86-64-avx512vnni", _X86, "x86-64-v3", (*_V3, *_AVX512), "x86.VNNI", _AVX512_HINTS),
        Target("x86-64-avxvnni", _X86, "x86-64-v3", (*_V3, "avxvnni"), "x86.VNNI", _VNNI_HINTS),
        Target("x86-64-v3", _X86, "x86-64-v3", _V3, "x86.AVX2"),
        Target("x86-64-generic", _X86, "x86-64", (), "generic.Generic"),
        Target("arm64-dotprod", _ARM, "generic", ("neon", "dotprod"), "arm.DotProd"),
        Target("arm64-neon", _ARM, "generic", ("neon",), "arm.NEON"),
    )
}

_MACHINES = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM, "ARM64": _ARM}


def host_machine() -> str:
    """Return `x86_64` or `aarch64`.

    Raises: RuntimeError for any other machine.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise RuntimeError(
            f"{platform.machine()} processors are not supported; edgellama needs x86-64 or arm64"
        )
    return machine


@cache
def host_features() -> frozenset[str]:
    """Flags of this CPU that the system lets programs use, in LLVM's spelling."""
    return _arm_features() if host_machine() == _ARM else _x86_features()


def _x86_features() -> frozenset[str]:
    """Linux tells them itself, which saves importing LLVM."""
    spelling = {
        "abm": "lzcnt",
        "bmi1": "bmi",
        "avx_vnni": "avxvnni",
        "avx512_vnni": "avx512vnni",
    }
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, flags = line.partition(":")
            if key.strip() == "flags":
                return frozenset(spelling.get(flag, flag) for flag in flags.split())
    except OSError:
        pass
    import llvmlite.binding as llvm

    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def _arm_features() -> frozenset[str]:
    """Each system is asked in its own way: LLVM does not tell dotprod of a CPU it has no name for.

    Source: Linux, arm64 ELF hwcaps; Apple, "Determining instruction set characteristics"; Windows,
    IsProcessorFeaturePresent.
    """
    import ctypes

    if sys.platform == "win32":
        dotprod = ctypes.WinDLL("kernel32").IsProcessorFeaturePresent(43)
    elif sys.platform == "darwin":
        value, nbytes = ctypes.c_int(0), ctypes.c_size_t(4)
        name = b"hw.optional.arm.FEAT_DotProd"
        arguments = (name, ctypes.byref(value), ctypes.byref(nbytes), None, ctypes.c_size_t(0))
        dotprod = ctypes.CDLL(None).sysctlbyname(*arguments) == 0 and value.value
    else:
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.restype = ctypes.c_ulong
        dotprod = getauxval(ctypes.c_ulong(16)) >> 20 & 1  # AT_HWCAP, HWCAP_ASIMDDP
    return frozenset({"neon", "dotprod"} if dotprod else {"neon"})


@cache
def detect() -> Target:
    """Return the best tier that this machine runs; EDGELLAMA_TARGET overrides it by name.

    Raises: RuntimeError for a machine or a tier name that is not known.
    """
    machine = host_machine()
    wanted = os.environ.get("EDGELLAMA_TARGET")
    if wanted:
        if wanted not in TARGETS or TARGETS[wanted].machine != machine:
            known = ", ".join(t.name for t in TARGETS.values() if t.machine == machine)
            raise RuntimeError(f"EDGELLAMA_TARGET={wanted} is not a tier of this machine ({known})")
        if not host_features().issuperset(TARGETS[wanted].features):
            raise RuntimeError(f"EDGELLAMA_TARGET={wanted} needs instructions this CPU lacks")
        return TARGETS[wanted]
    return next(
        target
        for target in TARGETS.values()
        if target.machine == machine and host_features().issuperset(target.features)
    )
