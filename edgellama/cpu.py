"""Facts about this machine: how many threads it makes sense to run, and how much memory there is.

Every fact has a fallback, so that an odd system is served with fewer facts rather than an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import sys
from pathlib import Path

MAX_THREADS = 256


def allowed_cpus() -> list[int]:
    """Logical processors that this process may run on."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return list(range(os.cpu_count() or 1))


def n_allowed_cores() -> int:
    """Physical cores among them, where the system tells which processors share one."""
    siblings = set()
    for cpu in allowed_cpus():
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)


def n_usable_cores() -> int:
    """Physical cores worth a thread: affinity, SMT siblings and cgroup quota respected."""
    n_cores = n_allowed_cores()
    return max(1, min(n_cores, math.ceil(cgroup_quota() or n_cores)))


def thread_counts() -> list[int]:
    """Numbers of threads that may be the fastest here, the least first.

    They are the usable cores, half of them, the fast ones among them, and every SMT sibling.
    """
    usable, siblings, quota = n_usable_cores(), len(allowed_cpus()), cgroup_quota()
    if quota is not None:
        siblings = min(siblings, math.ceil(quota))
    fast = n_fast_cores() or usable
    counts = (usable, max(1, usable // 2), min(usable, fast), siblings)
    return sorted({min(n, MAX_THREADS) for n in counts})


def n_fast_cores() -> int | None:
    """Cores that are about as fast as the fastest, where a processor mixes two kinds; or None."""
    if sys.platform == "darwin":
        return _darwin_number("hw.perflevel0.physicalcpu")
    speeds: dict[str, int] = {}  # by core
    for cpu in allowed_cpus():
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}")
        for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
            try:
                core = (folder / "topology/thread_siblings_list").read_text()
                speeds[core] = int((folder / name).read_text())
                break
            except (OSError, ValueError):
                continue
    # Turbo frequencies of equal cores differ by a tenth; those of unequal ones by a quarter and more.
    return sum(speed > 0.85 * max(speeds.values()) for speed in speeds.values()) or None


def _darwin_number(name: str) -> int | None:
    value = ctypes.c_int64(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    library = ctypes.CDLL(None)
    if library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0):
        return None
    return value.value or None


def cgroup_quota() -> float | None:
    """CPUs' worth of time that the control group grants, or None."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        base = Path("/sys/fs/cgroup/cpu")
        quota_us = int((base / "cpu.cfs_quota_us").read_text())
        period_us = int((base / "cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else None
    except (OSError, ValueError):
        return None


def busy_s() -> float | None:
    """Seconds that the allowed processors have worked since the system started, for anybody; or None.

    Time that a virtual machine's host took for others counts as work.
    """
    names = {f"cpu{cpu}" for cpu in allowed_cpus()}
    try:
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        # user, nice, system, idle, iowait, irq, softirq, steal
        ticks = [[int(n) for n in row[1:9]] for row in rows if row[0] in names]
        return sum(sum(n[:3]) + sum(n[5:]) for n in ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def cpu_name() -> str:
    """The processor's name as the system gives it, or its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_nbytes() -> tuple[int | None, int | None]:
    """Memory of the machine: (all, available now); None where it cannot be told."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        return total, free
    except (OSError, KeyError, ValueError):
        pass
    if sys.platform == "win32":
        return _windows_memory()
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (AttributeError, OSError, ValueError):
        return None, None


def _windows_memory() -> tuple[int | None, int | None]:
    class Status(ctypes.Structure):
        _fields_ = (  # MEMORYSTATUSEX
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("available", ctypes.c_uint64),
            ("others", ctypes.c_uint64 * 5),
        )

    status = Status(length=ctypes.sizeof(Status))
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined, unused-ignore]
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None, None
    return status.total, status.available


def cgroup_memory_nbytes() -> int | None:
    """Memory that the control group grants, or None."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limit = int((Path("/sys/fs/cgroup") / name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return limit if limit < 1 << 60 else None
    return None


def peak_memory_nbytes() -> int | None:
    """The most memory that this process had resident so far, or since `reset_peak_memory`."""
    try:
        rows = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        return int(rows["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    if sys.platform == "win32":
        return _windows_peak_nbytes()
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    except ImportError:
        return None


def reset_peak_memory() -> None:
    """Forget the peak so far, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _windows_peak_nbytes() -> int | None:
    class Counters(ctypes.Structure):
        _fields_ = (  # PROCESS_MEMORY_COUNTERS
            ("length", ctypes.c_uint32),
            ("page_faults", ctypes.c_uint32),
            ("peak", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 7),
        )

    counters = Counters(length=ctypes.sizeof(Counters))
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined, unused-ignore]
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    function = kernel.K32GetProcessMemoryInfo
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
    if not function(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.length):
        return None
    return counters.peak
