"""The thread team: n-1 Python threads that live inside native code and serve launches.

The caller is thread 0. Between launches a worker spins, then yields, then naps; after a second it
returns to Python and sleeps on a semaphore at no cost.  How chunks are shared out is in `step.py`.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Mapping

import numpy as np

from . import layout
from .compiler import Operation, Pack

NAMES = ("step.launch", "step.work")
_NAPS_BEFORE_PARKING = 10_000  # of 100 us


def _system_waits() -> tuple[int, int, int]:
    """Addresses of yield() and sleep(units), and the units of a nap of about 100 us."""
    if sys.platform == "win32":
        kernel = ctypes.WinDLL("kernel32")
        return _address(kernel.SwitchToThread), _address(kernel.Sleep), 1
    library = ctypes.CDLL(None)
    return _address(library.sched_yield), _address(library.usleep), 100


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
        waits = _system_waits()
        self._set(layout.TEAM_STEP, self._step.ctypes.data)
        self._set(layout.TEAM_SCRATCH, -(-self._scratch.ctypes.data // 64) * 64)
        self._set(layout.TEAM_SCRATCH_NBYTES, scratch_nbytes)
        self._set(layout.TEAM_YIELD, waits[0])
        self._set(layout.TEAM_SLEEP, waits[1])
        self._set(layout.TEAM_SLEEP_UNITS, waits[2])
        self._start()
        _teams.add(self)

    def _set(self, field: int, value: int) -> None:
        self._words[field // 8] = value

    def _start(self) -> None:
        self._pid = os.getpid()
        self._set(layout.TEAM_STOP, 0)
        self._wake = threading.Semaphore(0)
        self._n_parked = 0
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._serve, args=(i,), daemon=True, name=f"edgellama-{i}")
            for i in range(1, self.n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, thread: int) -> None:
        address = self._words.ctypes.data
        while self._work(address, thread, _NAPS_BEFORE_PARKING) == 0:
            epoch = self._words[0]
            with self._lock:
                self._n_parked += 1
            if self._words[0] == epoch and not self._words[layout.TEAM_STOP // 8]:
                self._wake.acquire()
            else:
                with self._lock:
                    self._n_parked -= 1

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

    def run(self, step: np.ndarray, first: int, last: int) -> None:
        """Run operations [first, last) of the table on a step, on all threads."""
        if self._pid != os.getpid():
            self._start()
        if self._n_parked:
            with self._lock:
                n, self._n_parked = self._n_parked, 0
            if n > 0:
                self._wake.release(n)
        self._launch(self._words.ctypes.data, step.ctypes.data, first, last)

    def close(self) -> None:
        """Stop and join the threads."""
        self._set(layout.TEAM_STOP, 1)
        if self._pid == os.getpid():
            self._wake.release(self.n_threads)
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
