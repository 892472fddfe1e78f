"""Decode on a quiet machine and while one busy process runs on each core, beside llama.cpp.

    python benchmarks/under_load.py MODEL.gguf --peer-python PEER/bin/python [-t 2] [-r 4]

PEER as in `vs_llama_cpp.py`.  Both engines decode turn by turn, quiet and loaded, and medians are
printed as rows of Markdown: tokens/s, and what is left of them under load.  A thread that has to wait for
one that is not running shows here: half of the machine's time is left, so half is the most to expect.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import vs_llama_cpp

ENGINES = ("edgellama", "llama.cpp")
_SETTLE_S = 0.2


@contextmanager
def busy_cores() -> Iterator[None]:
    """One process per processor that does nothing but work."""
    cpus = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    processes = []
    for cpu in cpus:
        pin = f"os.sched_setaffinity(0, {{{cpu}}})" if hasattr(os, "sched_setaffinity") else "0"
        code = f"import os\n{pin}\nwhile True: pass"
        processes.append(subprocess.Popen([sys.executable, "-c", code]))
    try:
        time.sleep(_SETTLE_S)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Worker:
    """An engine in a process of its own."""

    def __init__(self, engine: str, python: str, model: str, threads: int, n_ctx: int) -> None:
        command = [python, vs_llama_cpp.__file__, model, "-t", str(threads), "--ctx", str(n_ctx)]
        self._process = subprocess.Popen(
            [*command, "--worker", engine],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def decode_s(self, n_tokens: int, seed: int) -> float:
        """Seconds of `n_tokens` steps of one token."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([0, n_tokens, seed]) + "\n")
        self._process.stdin.flush()
        seconds: float = json.loads(self._process.stdout.readline())[1]
        return seconds

    def close(self) -> None:
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repeats", type=int, default=4)
    parser.add_argument("-n", "--n-gen", type=int, default=64)
    given = parser.parse_args()
    workers = [
        Worker(engine, python, given.model, given.threads, given.n_gen + 64)
        for engine, python in zip(ENGINES, (sys.executable, given.peer_python), strict=True)
    ]
    quiet: list[list[float]] = [[], []]
    loaded: list[list[float]] = [[], []]
    for turn in range(given.repeats + 1):
        for i, worker in enumerate(workers):
            seconds = [worker.decode_s(given.n_gen, turn)]
            with busy_cores():
                seconds.append(worker.decode_s(given.n_gen, turn))
            if turn:  # the first warms up
                quiet[i].append(given.n_gen / seconds[0])
                loaded[i].append(given.n_gen / seconds[1])
            time.sleep(vs_llama_cpp._IDLE_S)
    for worker in workers:
        worker.close()
    print("| model | engine | threads | quiet, tok/s | loaded, tok/s | left |")
    print("|---|---|---|---|---|---|")
    for engine, a, b in zip(ENGINES, quiet, loaded, strict=True):
        rates = statistics.median(a), statistics.median(b)
        print(
            f"| {Path(given.model).name} | {engine} | {given.threads} | {rates[0]:.0f} "
            f"| {rates[1]:.0f} ({min(b):.0f}-{max(b):.0f}) | {rates[1] / rates[0]:.0%} |"
        )


if __name__ == "__main__":
    main()
