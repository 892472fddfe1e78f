"""How many threads decode and prefill run on: measured once per CPU and model shape, and remembered.

More threads are not always faster: siblings of one core share its units, small cores make the others
wait, and memory is saturated by a few.  A step's result never depends on the choice.  What was measured
lies in `tuning.json` beside the kernel packs; a file that cannot be read is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from edgellama import __version__, cpu
from edgellama.catalog import home

from .program import Program

N_PREFILL = 64  # tokens of the step that prefill is measured by
_FEW_TOKENS = 8  # steps of at most so many are bound by memory, like decode
_N_RUNS = 3
_GAIN = 0.9  # what takes the place of the default must take so much less time
_QUIET = 0.15  # share of the processors' time that others may have; told to within 0.07
_N_REMEMBERED = 64


class Threads(NamedTuple):
    """Threads of a step of few tokens and of one of many."""

    decode: int
    prefill: int

    def of_step(self, n_tokens: int) -> int:
        """Return the threads of a step of so many tokens."""
        return self.decode if n_tokens <= _FEW_TOKENS else self.prefill


class Tuning:
    """What was measured of a program on this CPU, with `counts` threads to choose from."""

    def __init__(self, program: Program, tier: str, counts: Sequence[int]) -> None:
        self._counts = counts
        shape = [(record.operation, record.n_macs) for record in program.records]
        machine = (cpu.cpu_name(), cpu.allowed_cpus(), cpu.cgroup_quota(), tier, __version__)
        self._key = hashlib.sha256(repr((machine, shape)).encode()).hexdigest()[:24]
        self._path = home() / "tuning.json"

    def recall(self) -> Threads | None:
        """Return what was measured, if it was and can be read, or if there is nothing to choose."""
        if len(self._counts) == 1:
            return Threads(self._counts[0], self._counts[0])
        found = self._read().get(self._key)
        try:
            threads = Threads(**found)  # type: ignore[arg-type]
        except TypeError:
            return None
        return threads if all(n in self._counts for n in threads) else None

    @property
    def default(self) -> Threads:
        """A thread for every usable core."""
        n = max(n for n in self._counts if n <= max(self._counts[0], cpu.n_usable_cores()))
        return Threads(n, n)

    def measure(self, run_s: Callable[[bool, int], float]) -> Threads:
        """Choose by `run_s(is_prefill, n_threads)` and remember the choice.

        On a busy machine it would say more of the others than of the model: then it is the default, and
        nothing is remembered.
        """
        others = _Others()
        choice = Threads(
            *(self._fastest(partial(run_s, is_prefill)) for is_prefill in (False, True))
        )
        if others.share() > _QUIET:
            return self.default
        self._remember(choice)
        return choice

    def _fastest(self, run_s: Callable[[int], float]) -> int:
        """The count with the shortest run; the default unless another is clearly better.

        Runs of all counts take turns, so that what else the machine does meets them all.
        """
        best = dict.fromkeys(self._counts, float("inf"))
        for _ in range(_N_RUNS):
            for n in self._counts:
                best[n] = min(best[n], run_s(n))
        shortest = min(self._counts, key=lambda n: best[n])
        (default, _) = self.default
        return shortest if best[shortest] < _GAIN * best[default] else default

    def _remember(self, threads: Threads) -> None:
        known = {key: value for key, value in self._read().items() if key != self._key}
        known = dict(list(known.items())[1 - _N_REMEMBERED :]) | {self._key: threads._asdict()}
        with suppress(OSError):
            handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix="tuning")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(known, file, indent=1)
                os.replace(temporary, self._path)
            except BaseException:
                os.unlink(temporary)
                raise

    def _read(self) -> dict[str, object]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


class _Others:
    """What other processes take of the processors, from now on."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return cpu.busy_s() or 0.0, time.process_time(), time.perf_counter()

    def share(self) -> float:
        """Return their share of the allowed processors' time; 0 where it cannot be told."""
        busy, own, wall = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return (busy - own) / (wall * len(cpu.allowed_cpus())) if busy else 0.0
