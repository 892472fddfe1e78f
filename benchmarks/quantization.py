"""edgellama's quantizer beside llama.cpp's: size, time, memory, KL divergence and perplexity of every type.

    python benchmarks/quantization.py SOURCE.gguf TEXT --peer-python PEER/bin/python [--types q4_0,q8_0]

SOURCE has float weights; both sides quantize it, each in a process of its own.  All files are evaluated
on windows of 512 tokens of TEXT: by edgellama, mean KL divergence from SOURCE over the first
`--kl-windows`; by both engines, perplexity over `--windows` (of the second half of each window, as
llama.cpp counts).  Prints rows of Markdown for `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgellama import LLM
from edgellama.convert.recipes import RECIPES

WINDOW = 512
_PEER = """
import ctypes, json, resource, sys, time
import llama_cpp
source, out, file_type = sys.argv[1], sys.argv[2], int(sys.argv[3])
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.nthread = file_type, 2
start = time.perf_counter()
status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings))
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([status, time.perf_counter() - start, used]))
"""
_OURS = """
import json, resource, sys, time
from pathlib import Path
from edgellama.convert.encoder import Encoder
from edgellama.convert.quantize import Quantization, quantize
source, out, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
start = time.perf_counter()
with Encoder(2) as encoder:
    quantize(source, out, Quantization(name, force=True), encoder)
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([0, time.perf_counter() - start, used]))
"""
_PEER_EVALUATES = """
import json, sys
import llama_cpp, numpy as np
windows = json.load(sys.stdin)
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_batch=512, n_threads=2, n_threads_batch=2,
                      logits_all=True, verbose=False)
half, nll = np.arange(256, 511), []
for ids in windows:
    llm.reset()
    llm.eval(ids)
    logits = llm.scores[half]
    logits -= logits.max(1, keepdims=True)
    of_next = logits[np.arange(len(half)), np.array(ids)[half + 1]]
    nll.append(float((np.log(np.exp(logits).sum(1)) - of_next).mean(dtype=np.float64)))
print(json.dumps(float(np.exp(np.mean(nll)))))
"""


class Quality(NamedTuple):
    """How near a file comes to its source, and to the text."""

    kl: float
    perplexity: float


def make(python: str, program: str, source: Path, out: Path, kind: str) -> tuple[float, float]:
    """Quantize in a child process; return seconds and peak MB."""
    command = [python, "-c", program, str(source), str(out), kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    status, seconds, kilobytes = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    return seconds, kilobytes / 1024


def windows_of(model: Path, text: Path, n: int) -> list[list[int]]:
    """The first `n` windows of a text."""
    raw = text.read_bytes()
    raw = gzip.decompress(raw) if text.suffix == ".gz" else raw
    with LLM(model, n_ctx=WINDOW) as llm:
        ids = llm.tokenize(raw.decode()[: n * WINDOW * 8], add_special=False)
    return [ids[at : at + WINDOW] for at in range(0, n * WINDOW, WINDOW)]


def log_probabilities(model: Path, windows: list[list[int]]) -> Iterator[np.ndarray]:
    """Yield log softmax f32 (512, V) of every window."""
    with LLM(model, n_ctx=WINDOW) as llm:
        for ids in windows:
            logits = llm.logits(ids)
            logits -= logits.max(1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(1, keepdims=True))
            yield logits


def quality(model: Path, windows: list[list[int]], reference: list[np.ndarray]) -> Quality:
    """Compare a file with its source on the windows for which there are reference rows."""
    kl, nll = [], []
    for i, (ids, got) in enumerate(zip(windows, log_probabilities(model, windows), strict=True)):
        half = np.arange(WINDOW // 2, WINDOW - 1)
        nll.append(-got[half, np.array(ids)[half + 1]].mean(dtype=np.float64))
        if i < len(reference):
            expected = reference[i]
            kl.append((np.exp(expected) * (expected - got)).sum(1, dtype=np.float64).mean())
    return Quality(float(np.mean(kl)) if kl else np.nan, float(np.exp(np.mean(nll))))


def perplexity_by_peer(python: str, model: Path, windows: list[list[int]]) -> float:
    """Let llama.cpp evaluate a file."""
    command = [python, "-c", _PEER_EVALUATES, str(model)]
    text = json.dumps(windows)
    done = subprocess.run(command, input=text, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print a row for every type and side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--types", default="q4_0,q5_0,q8_0,q4_k_m,q6_k")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--kl-windows", type=int, default=8)
    arguments = parser.parse_args()
    types = arguments.types.split(",")
    with tempfile.TemporaryDirectory() as folder:
        # All files first: a child's peak counts what its parent held when it was forked.
        made = {}
        for name in types:
            for side, python, program, kind in (
                ("edgellama", sys.executable, _OURS, name),
                ("llama.cpp", arguments.peer_python, _PEER, str(RECIPES[name].file_type)),
            ):
                out = Path(folder) / f"{name}-{side}.gguf"
                made[out] = make(python, program, arguments.source, out, kind)
        windows = windows_of(arguments.source, arguments.text, arguments.windows)
        some = windows[: arguments.kl_windows]
        reference = list(log_probabilities(arguments.source, some))
        print("| type | by | MB | s | peak MB | KL | perplexity | by llama.cpp |\n"
              "|---|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
        for out, (seconds, peak) in made.items():
            name, side = out.stem.split("-")
            of_file = quality(out, windows, reference)
            theirs = perplexity_by_peer(arguments.peer_python, out, windows)
            print(f"| {name} | {side} | {out.stat().st_size / 1e6:.1f} | {seconds:.1f} | {peak:.0f} "
                  f"| {of_file.kl:.4f} | {of_file.perplexity:.3f} | {theirs:.3f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
