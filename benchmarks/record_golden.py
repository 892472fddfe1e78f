"""Record llama.cpp's answers for `tests/test_golden.py` and `tests/test_fidelity.py`.

Run from the top of a checkout with a Python that has llama-cpp-python and NumPy:

    python -m benchmarks.record_golden SmolLM2-135M-Instruct.Q4_1.gguf gemma-3-270m-q4_k_m.gguf

Writes greedy tokens with the lead of each step's token to `tests/data/golden.json`, and the
divergence of every row from the float reference to `tests/data/reference/<model>.npz`.  Then, with
the Python that runs the tests, the same line with `--float` adds what the oracle says of each step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.naive import NaiveModel, divergence, log_softmax

if TYPE_CHECKING:
    import llama_cpp

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
N_TOKENS = 64
N_THREADS = 2

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {
    "SmolLM2-135M-Instruct.Q4_1": [
        "The capital of France is",
        "A is for apple, B is for ball, C is for cat, D is for",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,",
        "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n",
        '{"name": "Ada", "born": 1815, "field":',
        "Janvier, f\u00e9vrier, mars, avril,",
        CHAT.format("What is the largest planet of the solar system?"),
        CHAT.format("Write three sentences about the sea."),
    ],
    "gemma-3-270m-q4_k_m": [
        "The capital of France is",
        "A is for apple, B is for ball, C is for cat, D is for",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,",
        "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n",
        '{"name": "Ada", "born": 1815, "field":',
        "Janvier, f\u00e9vrier, mars, avril,",
        "Monday, Tuesday, Wednesday,",
        "Wasser besteht aus Wasserstoff und Sauerstoff. Das bedeutet, dass",
    ],
}


def lead(logits: np.ndarray, token: int) -> float:
    """By how much the logit of `token` exceeds the largest other one; below 0 if it does not."""
    return round(float(logits[token] - np.delete(logits, token).max()), 4)


def record_greedy(model: llama_cpp.Llama, prompt: str) -> dict[str, Any]:
    """Continue a prompt greedily; `margins` say by how much each token leads."""
    import llama_cpp

    prompt_ids = model.tokenize(prompt.encode(), add_bos=True, special=True)
    model.reset()
    model.eval(prompt_ids)
    ids: list[int] = []
    margins: list[float] = []
    while True:
        logits = model.scores[model.n_tokens - 1]
        ids.append(int(np.argmax(logits)))
        margins.append(lead(logits, ids[-1]))
        is_end = llama_cpp.llama_vocab_is_eog(model._model.vocab, ids[-1])
        if len(ids) == N_TOKENS or is_end:
            break
        model.eval(ids[-1:])
    text_ids = ids[:-1] if is_end else ids
    text = model.detokenize(text_ids, prev_tokens=prompt_ids).decode(errors="replace")
    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "ids": ids,
        "ends": bool(is_end),
        "text": text,
        "margins": margins,
    }


def record_divergence(model: llama_cpp.Llama, path: Path) -> np.ndarray:
    """Add llama.cpp's divergence per row to a file of reference arrays."""
    with np.load(path) as arrays:
        reference = {name: arrays[name] for name in arrays.files}
    ids = reference["tokens"].tolist()
    model.reset()
    model.eval(ids)
    kl = divergence(log_softmax(model.scores[: len(ids)]), reference)
    np.savez_compressed(path, **(reference | {"llama_cpp_kl": kl.astype(np.float32)}))
    return kl


def record_peer(paths: list[Path]) -> dict[str, Any]:
    """Return llama.cpp's answers, and write its divergence."""
    import llama_cpp

    golden: dict[str, Any] = {"llama_cpp_python": llama_cpp.__version__, "models": {}}
    for path in paths:
        model = llama_cpp.Llama(
            str(path), n_ctx=1024, n_batch=512, n_threads=N_THREADS, n_threads_batch=N_THREADS,
            logits_all=True, verbose=False,
        )  # fmt: skip
        kl = record_divergence(model, DATA / "reference" / f"{path.stem}.npz")
        print(f"{path.stem}: mean KL of llama.cpp {kl.mean():.5f} over {len(kl)} rows")
        golden["models"][path.stem] = [record_greedy(model, p) for p in PROMPTS[path.stem]]
        model.close()
    return golden


def add_float_margins(golden: dict[str, Any], paths: list[Path]) -> None:
    """Add `float_margins`: the lead of each token in a float32 evaluation of the weights."""
    for path in paths:
        with NaiveModel(path, dtype=np.float32) as model:
            for answer in golden["models"][path.stem]:
                first = len(answer["prompt_ids"]) - 1
                rows = model.logits([*answer["prompt_ids"], *answer["ids"][:-1]])[first:]
                pairs = zip(rows, answer["ids"], strict=True)
                answer["float_margins"] = [lead(row, token) for row, token in pairs]
                margins = zip(answer["margins"], answer["float_margins"], strict=True)
                close = next((i for i, m in enumerate(margins) if min(m) < 0.3), N_TOKENS)
                print(f"first close call {close:2d}  {answer['prompt']!r} -> {answer['text']!r}")


def main() -> None:
    """Record every model that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help=", ".join(PROMPTS))
    parser.add_argument("--float", action="store_true", help="add the margins of the oracle")
    options = parser.parse_args()
    path = DATA / "golden.json"
    if options.float:
        golden = json.loads(path.read_text(encoding="ascii"))
        add_float_margins(golden, options.models)
    else:
        golden = record_peer(options.models)
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=True) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
