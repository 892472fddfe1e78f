"""edgellama beside llama.cpp on the same file, same threads, turn by turn in one run.

    python benchmarks/vs_llama_cpp.py MODEL.gguf --peer-python PEER/bin/python [-t 2] [-r 5]

PEER is an environment with llama-cpp-python built natively; `--make-peer DIR` makes one (about eight
minutes).  Prints rows of Markdown for `RESULTS.md`: prefill of 512 (`-p`) tokens, decode of 64 tokens after
it, and whole-process start to first token with peak resident memory; medians over the repeats.
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

PEER = "llama-cpp-python==0.3.36"
N_DECODE = 64
_IDS = range(1000, 40000)  # ordinary tokens in both models' vocabularies


def worker(engine: str, model: str, threads: int, n_prompt: int, kv_type: str) -> None:
    """Child process: for every line on stdin, time one prefill and one decode; answer in JSON."""
    if engine == "edgellama":
        from edgellama.gguf import open_gguf
        from edgellama.models.config import read_config
        from edgellama.runtime.engine import Engine

        with open_gguf(model) as gguf:
            ours = Engine(
                gguf, read_config(gguf), n_ctx=n_prompt + 512, n_threads=threads, kv_type=kv_type
            )
    else:
        from llama_cpp import Llama

        theirs = Llama(
            model, n_ctx=n_prompt + 512, n_batch=512, n_ubatch=512, n_threads=threads,
            n_threads_batch=threads, verbose=False,
        )  # fmt: skip
    for line in sys.stdin:
        rng = random.Random(line)
        ids = [rng.choice(_IDS) for _ in range(n_prompt)]
        if engine == "edgellama":
            sequence = ours.new_sequence()
            start = time.perf_counter()
            ours.evaluate(sequence, ids)
            middle = time.perf_counter()
            for token in range(1000, 1000 + N_DECODE):
                ours.evaluate(sequence, [token])
            end = time.perf_counter()
            ours.free(sequence)
        else:
            theirs.reset()
            start = time.perf_counter()
            theirs.eval(ids)
            middle = time.perf_counter()
            for token in range(1000, 1000 + N_DECODE):
                theirs.eval([token])
            end = time.perf_counter()
        print(json.dumps([n_prompt / (middle - start), N_DECODE / (end - middle)]), flush=True)


_FIRST_TOKEN = """
import sys
from llama_cpp import Llama
m = Llama(sys.argv[1], n_ctx=2048, n_threads=int(sys.argv[2]), verbose=False)
print(m.create_completion("Once upon a time", max_tokens=1, temperature=0)["choices"][0]["text"])
"""


def first_token(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MB of a whole process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--peer-python")
    parser.add_argument("--make-peer", type=Path)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repeats", type=int, default=5)
    parser.add_argument("-p", "--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--kv-type", default="f16", help="edgellama's cache; the peer's is f16")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(
            arguments.worker, arguments.model, arguments.threads, arguments.prompt,
            arguments.kv_type,
        )  # fmt: skip
        return
    peer = make_peer(arguments.make_peer) if arguments.make_peer else arguments.peer_python
    if not peer:
        parser.error("give --peer-python or --make-peer")
    tail = [arguments.model, "-t", str(arguments.threads), "-p", str(arguments.prompt)]
    tail += ["--kv-type", arguments.kv_type]
    workers = [
        subprocess.Popen(
            [python, __file__, *tail, "--worker", engine],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for engine, python in (("edgellama", sys.executable), ("llama.cpp", peer))
    ]  # fmt: skip
    rates: list[list[list[float]]] = [[], []]
    for turn in range(arguments.repeats + 1):
        for i, process in enumerate(workers):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{turn}\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            if turn:  # the first warms up
                rates[i].append(answer)
            time.sleep(1.5)  # idle threads of one engine must not spin beside the other
    for process in workers:
        process.communicate()
    ours = [sys.executable, "-m", "edgellama", "run", arguments.model, "-c", "2048", "-n", "1"]
    ours += ["-t", str(arguments.threads), "--temp", "0", "--raw", "-p", "Once upon a time"]
    theirs = [peer, "-c", _FIRST_TOKEN, arguments.model, str(arguments.threads)]
    starts: list[list[tuple[float, float]]] = [[], []]
    for turn in range(arguments.repeats + 1):
        for i, command in enumerate((ours, theirs)):
            measured = first_token(command)
            if turn:
                starts[i].append(measured)
    name = Path(arguments.model).name
    depth = f" @ d{arguments.prompt}" if arguments.prompt != 512 else ""
    labels = (f"prefill pp{arguments.prompt}, tok/s", f"decode tg{N_DECODE}{depth}, tok/s")
    for k, label in enumerate(labels):
        a, b = (statistics.median(r[k] for r in rates[i]) for i in (0, 1))
        print(f"| {name} | {label} | {arguments.threads} | {a:.0f} | {b:.0f} | {a / b:.2f} |")
    for label, k in (("start to first token, s", 0), ("peak resident, MB", 1)):
        a, b = (statistics.median(s[k] for s in starts[i]) for i in (0, 1))
        print(f"| {name} | {label} | {arguments.threads} | {a:.2f} | {b:.2f} | {a / b:.2f} |")


if __name__ == "__main__":
    main()
