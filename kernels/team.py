"""The thread team: n-1 Python threads that live inside native code and serve launches.

The caller is thread 0. Between launches a worker spins, then yields or naps; after a second it
returns to Python and sleeps on a semaphore at no cost.  How chunks are shared out is in `step.py`.

A launch comes back to Python at least every `_LAUNCH_S`, where Ctrl-C and other signals are served: an
exception leaves a team that does nothing, and can go on with something else.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Mapping

import numpy as np

from . import layout
from .compiler import Operation, Pack

NAMES = ("step.launch", "step.work")
_NAPS_BEFORE_PARKING = 10_000  # of 100 us
_LAUNCH_S = 0.1


def _system_waits() -> tuple[int, int, int, int]:
    """Addresses of yield() and sleep(units), how often to yield before, and the units of a nap.

    A nap of 100 us costs a waiting thread little, and on a busy machine it runs again as soon as it wakes,
    where one that yields loses its turn: with a busy process on each core, decode keeps half of its
    speed instead of two fifths.  Windows cannot sleep for less than a millisecond, so there it yields.
    """
    if sys.platform == "win32":
        kernel = ctypes.WinDLL("kernel32")
        return _address(kernel.SwitchToThread), _address(kernel.Sleep), 2000, 1
    library = ctypes.CDLL(None)
    return _address(library.sched_yield), _address(library.usleep), 0, 100


def _system_clock(words: int) -> tuple[int, int, int]:
    """A clock that writes to `words`: address, first argument, nanoseconds of the first word."""
    if sys.platform == "win32":
        return _address(ctypes.WinDLL("kernel32").QueryUnbiasedInterruptTime), words, 100
    return _address(ctypes.CDLL(None).clock_gettime), time.CLOCK_MONOTONIC, 1_000_000_000


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def pread_address() -> int:
    """Address of the system's pread, or 0 where there is none (Windows)."""
    return 0 if sys.platform == "win32" else _address(ctypes.CDLL(None).pread)


def fill_record(
    row: np.ndarray,
    operation: Operation,
    arguments: Mapping[str, float],
    *,
    parts: int = 1,
    tokens: int = 1,
    count: int = layout.STEP_N_TOKENS,
    wait: int = 0,
    of_spans: int = 0,
) -> None:
    """Write an operation into its record i64 (RECORD_NBYTES / 8,); fields as in `layout.py`."""
    assert set(arguments) == set(operation.arguments), (arguments, operation.arguments)
    row[layout.RECORD_FUNCTION // 8] = operation.address
    row[layout.RECORD_PARTS // 8] = parts
    row[layout.RECORD_TOKENS // 8] = tokens
    row[layout.RECORD_COUNT // 8] = count
    row[layout.RECORD_WAIT // 8] = wait
    row[layout.RECORD_OF_SPANS // 8] = of_spans
    for i, name in enumerate(operation.arguments, layout.RECORD_ARGUMENTS // 8):
        if name in operation.floats:
            row[i : i + 1].view(np.float32)[0] = arguments[name]
        else:
            row[i] = arguments[name]


def call_here(pack: Pack, name: str, arguments: Mapping[str, float]) -> None:
    """Run the first part of an operation that needs no step, on the calling thread."""
    record = np.zeros(layout.RECORD_NBYTES // 8, np.int64)
    scratch = np.empty(512, np.int64)
    fill_record(record, pack[name], arguments)
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)
    prototype(pack[name].address)(0, record.ctypes.data, 0, 0, 1, scratch.ctypes.data)


class Team:
    """`n_threads` threads that run tables of operations.

    A team notices that it is in a forked child, where its threads do not exist, and starts new ones.
    """

    def __init__(self, pack: Pack, n_threads: int, scratch_nbytes: int) -> None:
        self.n_threads = n_threads
        self.pack = pack  # threads run in its memory
        self._launch = pack.function("step.launch")
        self._work = pack.function("step.work")
        self._words = np.zeros(layout.TEAM_NBYTES // 8 + 8, np.int64)
        self._step = np.zeros(layout.STEP_NBYTES // 8, np.int64)
        scratch_nbytes = -(-scratch_nbytes // 4096) * 4096
        self._scratch = np.zeros(n_threads * scratch_nbytes + 64, np.uint8)
        self._counters = np.zeros(0, np.int64)
        self._table: object = None
        self._retired: list[object] = []
        self._set(layout.TEAM_STEP, self._step.ctypes.data)
        self._set(layout.TEAM_SCRATCH, -(-self._scratch.ctypes.data // 64) * 64)
        self._set(layout.TEAM_SCRATCH_NBYTES, scratch_nbytes)
        waits = layout.TEAM_YIELD, layout.TEAM_SLEEP, layout.TEAM_N_YIELDS, layout.TEAM_SLEEP_UNITS
        for field, value in zip(waits, _system_waits(), strict=True):
            self._set(field, value)
        clock = layout.TEAM_CLOCK, layout.TEAM_CLOCK_ARGUMENT, layout.TEAM_CLOCK_UNIT
        clock_words = self._words.ctypes.data + layout.TEAM_CLOCK_WORDS
        for field, value in zip(clock, _system_clock(clock_words), strict=True):
            self._set(field, value)
        self._start()
        _teams.add(self)

    def _set(self, field: int, value: int) -> None:
        self._words[field // 8] = value

    def _start(self) -> None:
        self._pid = os.getpid()
        self._set(layout.TEAM_STOP, 0)
        self._parked: set[int] = set()
        self._wake = [threading.Semaphore(0) for _ in range(self.n_threads)]
        self._threads = [
            threading.Thread(target=self._serve, args=(i,), daemon=True, name=f"edgellama-{i}")
            for i in range(1, self.n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, thread: int) -> None:
        address = self._words.ctypes.data
        while self._work(address, thread, _NAPS_BEFORE_PARKING) == 0:
            self._parked.add(thread)
            self._wake[thread].acquire()

    def use(self, table: np.ndarray) -> None:
        """Take the operation table (n, RECORD_NBYTES / 8) that launches run.

        A thread may still be on its way through the last one: it must find nothing there to claim, whatever
        the next step says, and nothing freed.
        """
        self._counters[:] = -1  # of no epoch
        self._retired.append((self._table, self._counters))
        self._table = table
        self._counters = np.zeros(len(table) * layout.COUNTER_NBYTES // 8 + 8, np.int64)
        self._set(layout.TEAM_COUNTERS, -(-self._counters.ctypes.data // 64) * 64)
        self._set(layout.TEAM_TABLE, table.ctypes.data)

    def run(self, step: np.ndarray, first: int, last: int, n_threads: int | None = None) -> bool:
        """Run operations [first, last) of the table on a step, on all threads or so many.

        Returns False when `abort` ended it.  It, or an exception of a signal's, leaves a part undone.
        """
        if self._pid != os.getpid():
            self._start()
        n_threads = n_threads or self.n_threads
        self._set(layout.TEAM_N_ACTIVE, n_threads)
        resumes = 0
        while True:
            for thread in tuple(self._parked):
                if thread < n_threads:
                    self._parked.discard(thread)
                    self._wake[thread].release()
            first = self._launch(
                self._words.ctypes.data,
                step.ctypes.data,
                first,
                last,
                resumes,
                int(_LAUNCH_S * 1e9),
            )
            if first == last:
                return True
            if self._words[layout.TEAM_ABORT // 8]:
                self._set(layout.TEAM_ABORT, 0)
                return False
            resumes = 1

    def abort(self) -> None:
        """End what another thread runs, or if none does, the next run."""
        self._set(layout.TEAM_ABORT, 1)

    def close(self) -> None:
        """Stop and join the threads."""
        self._set(layout.TEAM_STOP, 1)
        if self._pid == os.getpid():
            for wake in self._wake:
                wake.release()
            for thread in self._threads:
                thread.join()
        self._threads = []
        _teams.discard(self)


_teams: weakref.WeakSet[Team] = weakref.WeakSet()


def _close_all() -> None:
    for team in list(_teams):
        team.close()


# Before the interpreter is torn down: a daemon thread in native code would otherwise be cut off
# while it touches memory that is being freed.
atexit.register(_close_all)
