"""What this machine can do at most, measured: reading memory and multiplying, on all threads at once.

The loops are `kernels/ceiling.py`; what a step of a model needs of them is counted in `cost.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from edgellama.errors import OutOfMemoryError
from edgellama.kernels import layout, targets, team

from .cost import FORMS, Cost
from .packs import load_pack

_BUFFER_NBYTES = 256 << 20  # beyond every cache
_BUDGET_S = 0.25  # of each measurement
_OPERATIONS = ("ceiling.read_memory", *(f"ceiling.multiply_{form}" for form in FORMS))
_PART_MACS = 1 << 24  # about 0.3 ms, so that threads end together
_ROUND_MACS = {"f32": 32 * 12 * 8, "i16": 32 * 12 * 16, "i8": 8 * 64 * 32}  # written out there
_OPERANDS_NBYTES = 8192  # stay in the first-level cache


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The most that `n_threads` threads reach: bytes and multiply-adds per second."""

    n_threads: int
    read: float
    macs: dict[str, float]  # by the form of activations

    def shortest_s(self, cost: Cost) -> float:
        """Seconds that a step takes at least: memory and multipliers work side by side."""
        return max(cost.nbytes / self.read, sum(cost.macs[f] / self.macs[f] for f in FORMS))


def measure(n_threads: int) -> Ceilings:
    """Measure for most of a second; every rate is that of the best run.

    Raises: KernelError, OutOfMemoryError.
    """
    pack = load_pack([*_OPERATIONS, *team.NAMES], targets.detect())
    try:
        data = np.ones(_BUFFER_NBYTES, np.uint8)
    except MemoryError as error:
        raise OutOfMemoryError(
            f"{_BUFFER_NBYTES >> 20} MB to measure memory with could not be had"
        ) from error
    operands = np.ones(_OPERANDS_NBYTES + 64, np.uint8)
    operands_at = -(-operands.ctypes.data // 64) * 64
    n_parts = 16 * n_threads
    part_nbytes = _BUFFER_NBYTES // n_parts // 256 * 256
    sums = np.zeros(n_parts, np.int64)
    rounds = [_PART_MACS // _ROUND_MACS[form] for form in FORMS]
    arguments = [
        {"data": data.ctypes.data, "nbytes": part_nbytes},
        *({"operands": operands_at, "n_rounds": n} for n in rounds),
    ]
    work = [part_nbytes, *(n * _ROUND_MACS[f] for f, n in zip(FORMS, rounds, strict=True))]

    table = np.zeros((len(_OPERATIONS), layout.RECORD_NBYTES // 8), np.int64)
    for row, name, given in zip(table, _OPERATIONS, arguments, strict=True):
        values = given | {"sums": sums.ctypes.data}
        team.fill_record(row, pack[name], values, parts=n_parts)
    step = np.zeros(layout.STEP_NBYTES // 8, np.int64)
    step[layout.STEP_N_TOKENS // 8] = 1

    threads = team.Team(pack, n_threads, 4096)
    try:
        threads.use(table)
        read, *macs = [n_parts * work[i] / _best_s(threads, step, i) for i in range(len(work))]
    finally:
        threads.close()
    return Ceilings(n_threads, read, dict(zip(FORMS, macs, strict=True)))


def _best_s(threads: team.Team, step: np.ndarray, record: int) -> float:
    """Seconds of the best of several runs; the first ones also wake the processor."""
    times: list[float] = []
    end = time.perf_counter() + _BUDGET_S
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        threads.run(step, record, record + 1)
        times.append(time.perf_counter() - start)
    return min(times)
