"""Convert a small checkpoint of every family and run it with llama.cpp beside us; no part of CI.

    python tests/compare_llama_cpp.py --peer PYTHON [FAMILY ...]

PYTHON is that of an environment with llama-cpp-python.  Both evaluate the same file in f32, and go on
greedily for 16 tokens: does it load, are the tokens the same, how far apart are the logits (relative to
the largest).  Exits with 1 where a file does not load, or other tokens come for no reason named here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from checkpoints import CONFIGS
from test_convert import make_folder
from test_families import IDS, open_engine

from edgellama.convert.checkpoint import open_checkpoint
from edgellama.convert.convert import convert
from edgellama.convert.encoder import Encoder
from edgellama.convert.quantize import Quantization

N_NEW = 16
ROWS = {"mistral": (40, "has no window for llama"), "phi3": (47, "has switched off Phi's window")}
"""Families of which llama.cpp agrees on the first rows only, and why."""
WRONG = {"gemma2-scale": "does not read attention.scale for gemma2"}
COARSE = dict.fromkeys(("gemma", "gemma2", "gemma3"), "looks gelu up in a table of f16")

_PEER = """
import sys, numpy as np, llama_cpp
path, out, ids, n = sys.argv[1], sys.argv[2], [int(i) for i in sys.argv[3].split(",")], int(sys.argv[4])
llm = llama_cpp.Llama(path, n_ctx=1024, n_batch=512, logits_all=True, type_k=0, type_v=0, verbose=False)
llm.eval(ids)
for _ in range(n):
    llm.eval([int(llm.scores[llm.n_tokens - 1].argmax())])
np.savez(out, ids=llm.input_ids[: llm.n_tokens], logits=llm.scores[: llm.n_tokens])
"""


def make(family: str, folder: Path) -> Path:
    """Convert a folder of Hugging Face, with a trained tokenizer, to f32.

    llama.cpp goes by names: one with "phi3" in it must have the tokens of Phi-3, or is not loaded.
    """
    make_folder(folder / family, family)
    out = folder / "m.gguf"
    with open_checkpoint(folder / family) as checkpoint, Encoder() as encoder:
        convert(checkpoint, out, Quantization("f32"), encoder, name="toy")
    return out


def greedy(path: Path, ids: list[int]) -> tuple[list[int], np.ndarray]:
    """Return `ids` and what follows, and the logits of every row."""
    engine = open_engine(path)
    for _ in range(N_NEW):
        ids = [*ids, int(engine.logits(ids)[-1].argmax())]
    logits = engine.logits(ids)
    engine.close()
    return ids, logits


def compare(family: str, peer: str) -> tuple[str, bool]:
    """Return a row of the table, and whether all is as it should be."""
    n_rows, reason = ROWS.get(family, (len(IDS) + N_NEW, (WRONG | COARSE).get(family, "")))
    prompt = IDS[: n_rows - N_NEW]
    with tempfile.TemporaryDirectory() as name:
        path, out = make(family, Path(name)), Path(name, "peer.npz")
        ids, ours = greedy(path, prompt)
        command = [peer, "-c", _PEER, str(path), str(out), ",".join(map(str, prompt)), str(N_NEW)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            return f"| {family} | no: {last} | | | |", False
        with np.load(out) as theirs:
            same = ids == theirs["ids"].tolist()
            apart = np.abs(ours - theirs["logits"])[: len(prompt)].max() / np.abs(ours).max()
    note = f"llama.cpp {reason}" if reason else ""
    row = f"| {family} | yes | {'yes' if same else 'no'} | {apart:.1e} | {note} |"
    return row, same or family in WRONG


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", default=list(CONFIGS))
    parser.add_argument("--peer", required=True, help="Python with llama-cpp-python")
    arguments = parser.parse_args()
    print("| family | loads | same tokens | logits apart | why |\n|---|---|---|---|---|")
    good = True
    for family in arguments.families:
        row, is_good = compare(family, arguments.peer)
        print(row, flush=True)
        good = good and is_good
    sys.exit(not good)


if __name__ == "__main__":
    main()
