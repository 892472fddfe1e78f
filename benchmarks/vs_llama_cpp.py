"""edgellama beside llama.cpp on the same file, same threads, turn by turn in one run.

    python benchmarks/vs_llama_cpp.py MODEL.gguf ... --peer-python PEER/bin/python [--deep] [--start]

PEER is an environment with llama-cpp-python built natively; `--make-peer DIR` makes one (about eight
minutes).  Prints rows of Markdown for `RESULTS.md`: prefill of 512 tokens and decode of 128 after none;
`--deep` also prefill of 4096 tokens and decode of 64 after them; `--start` whole-process start to first
token and peak resident memory.  Medians over the repeats.  Beside them stands how much of what the
machine allows edgellama reached, by ceilings measured in the same run: reading for decode, the
multipliers of each activation form for prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PEER = "llama-cpp-python==0.3.36"
TESTS = [("prefill pp512", 512, 0), ("decode tg128", 0, 128)]
DEEP = [("prefill pp4096", 4096, 0), ("decode tg64 @ d4096", 4096, 64)]
_IDS = range(1000, 40000)  # ordinary tokens in every model's vocabulary
_IDLE_S = 1.2  # threads of one engine must not spin beside the other


def worker(engine: str, model: str, threads: int, n_ctx: int) -> None:
    """Child process: for every line [prompt, decode] on stdin, answer [prompt_s, decode_s]."""
    evaluate, reset = (
        _edgellama(model, threads, n_ctx)
        if engine == "edgellama"
        else _llama_cpp(model, threads, n_ctx)
    )
    for line in sys.stdin:
        n_prompt, n_decode, seed = json.loads(line)
        rng = random.Random(seed)
        ids = [rng.choice(_IDS) for _ in range(n_prompt + n_decode)]
        reset()
        start = time.perf_counter()
        for at in range(0, n_prompt, 512):
            evaluate(ids[at : min(at + 512, n_prompt)])
        middle = time.perf_counter()
        for token in ids[n_prompt:]:
            evaluate([token])
        print(json.dumps([middle - start, time.perf_counter() - middle]), flush=True)


def _edgellama(model: str, threads: int, n_ctx: int) -> tuple[Any, Any]:
    from edgellama.gguf import open_gguf
    from edgellama.models.config import read_config
    from edgellama.runtime.engine import Engine

    with open_gguf(model) as gguf:
        engine = Engine(gguf, read_config(gguf), n_ctx=n_ctx, n_threads=threads)
    state = [engine.new_sequence()]

    def reset() -> None:
        engine.free(state[0])
        state[0] = engine.new_sequence()

    return (lambda ids: engine.evaluate(state[0], ids)), reset


def _llama_cpp(model: str, threads: int, n_ctx: int) -> tuple[Any, Any]:
    from llama_cpp import Llama

    llama = Llama(
        model, n_ctx=n_ctx, n_batch=512, n_ubatch=512, n_threads=threads,
        n_threads_batch=threads, verbose=False,
    )  # fmt: skip
    return llama.eval, llama.reset


_FIRST_TOKEN = """
import sys
from llama_cpp import Llama
m = Llama(sys.argv[1], n_ctx=2048, n_threads=int(sys.argv[2]), verbose=False)
print(m.create_completion("Once upon a time", max_tokens=1, temperature=0)["choices"][0]["text"])
"""


def first_token(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MB of a whole process, its modules compiled as pip leaves them."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def make_peer(folder: Path) -> str:
    """Build the peer natively in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    environment = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
    subprocess.run([python, "-m", "pip", "install", PEER], check=True, env=environment)
    return python


class Allowed:
    """What the machine allows a model, by ceilings measured now."""

    def __init__(self, model: str, threads: int) -> None:
        from edgellama.gguf import open_gguf
        from edgellama.models.config import read_config
        from edgellama.runtime.ceiling import measure
        from edgellama.runtime.cost import CostModel

        with open_gguf(model) as gguf:
            self._costs = CostModel(gguf, read_config(gguf), "f16")
        self.ceilings = measure(threads)

    def share(self, n_prompt: int, n_decode: int, seconds: float) -> str:
        """The ceiling's share and the rate that was reached."""
        steps = self._costs.steps(0, n_prompt, n_decode, 512)
        steps = steps[-n_decode:] if n_decode else steps
        least = sum(self.ceilings.shortest_s(step) for step in steps)
        if n_decode:
            reached = f"{sum(step.nbytes for step in steps) / seconds / 1e9:.1f} GB/s"
        else:
            reached = f"{sum(step.n_macs for step in steps) / seconds / 1e9:.0f} GMAC/s"
        return f"{reached}, {least / seconds:.0%}"


def compare(model: str, python: str, threads: int, repeats: int, tests: list[Any]) -> None:
    """Print a row per test."""
    n_ctx = 512 + max(n_prompt + n_decode for _, n_prompt, n_decode in tests)
    tail = [model, "-t", str(threads), "--ctx", str(n_ctx)]
    workers = [
        subprocess.Popen(
            [python_, __file__, *tail, "--worker", engine],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for engine, python_ in (("edgellama", sys.executable), ("llama.cpp", python))
    ]  # fmt: skip
    allowed = Allowed(model, threads)
    print(
        f"<!-- ceilings: read {allowed.ceilings.read / 1e9:.1f} GB/s, "
        + ", ".join(f"{form} {n / 1e9:.0f} GMAC/s" for form, n in allowed.ceilings.macs.items())
        + " -->"
    )
    for label, n_prompt, n_decode in tests:
        seconds: list[list[float]] = [[], []]
        for turn in range(repeats + 1):
            for i, process in enumerate(workers):
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps([n_prompt, n_decode, turn]) + "\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                if turn:  # the first warms up
                    seconds[i].append(answer[1 if n_decode else 0])
                time.sleep(_IDLE_S)
        ours, theirs = (statistics.median(s) for s in seconds)
        n = n_decode or n_prompt
        print(
            f"| {Path(model).name} | {label}, tok/s | {threads} | {n / ours:.0f} | {n / theirs:.0f} "
            f"| {theirs / ours:.2f} | {allowed.share(n_prompt, n_decode, ours)} |",
            flush=True,
        )
    for process in workers:
        process.communicate()


def compare_start(model: str, python: str, threads: int, repeats: int) -> None:
    """Print rows of whole processes; to be called while this one is small, which a child counts."""
    ours = [sys.executable, "-m", "edgellama", "run", model, "-c", "2048", "-n", "1"]
    ours += ["-t", str(threads), "--temp", "0", "--raw", "-p", "Once upon a time"]
    theirs = [python, "-c", _FIRST_TOKEN, model, str(threads)]
    measured: list[list[tuple[float, float]]] = [[], []]
    for turn in range(repeats + 1):
        for i, command in enumerate((ours, theirs)):
            figures = first_token(command)
            if turn:
                measured[i].append(figures)
    for label, k, digits in (("start to first token, s", 0, 2), ("peak resident, MB", 1, 0)):
        a, b = (statistics.median(figures[k] for figures in m) for m in measured)
        row = f"| {Path(model).name} | {label} | {threads} | {a:.{digits}f} | {b:.{digits}f} "
        print(f"{row}| {a / b:.2f} | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--peer-python")
    parser.add_argument("--make-peer", type=Path)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repeats", type=int, default=5)
    parser.add_argument("--deep", action="store_true", help="4096 tokens as well")
    parser.add_argument("--start", action="store_true", help="whole processes as well")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--ctx", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.models[0], given.threads, given.ctx)
        return
    peer = make_peer(given.make_peer) if given.make_peer else given.peer_python
    if not peer:
        parser.error("give --peer-python or --make-peer")
    for model in given.models:
        if given.start:
            compare_start(model, peer, given.threads, given.repeats)
    for model in given.models:
        compare(model, peer, given.threads, given.repeats, TESTS + (DEEP if given.deep else []))


if __name__ == "__main__":
    main()
