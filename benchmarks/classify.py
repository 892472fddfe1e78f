"""How well `LLM.classify` labels sentences: SST-2's development set and TREC's question classes.

    python benchmarks/classify.py MODEL.gguf --sst2 sst2_dev.tsv.gz --trec trec_qc_test.txt

Prints a row of Markdown for each way: accuracy and sentences per second.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

from edgellama import LLM
from edgellama.tasks import Classifier

_SENTIMENT = {"0": "negative", "1": "positive"}
_TREC = {
    "ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "person",
    "LOC": "place", "NUM": "number",
}  # fmt: skip
_SHOTS = {
    "sst2": [
        ("a warm and funny film that never loses its way", "positive"),
        ("two hours of noise without a single idea", "negative"),
        ("the cast is wonderful and the script sparkles", "positive"),
        ("flat, predictable and far too long", "negative"),
    ],
    "trec": [
        ("What does CPU stand for ?", "abbreviation"),
        ("Why does bread rise ?", "description"),
        ("What is the fastest animal ?", "entity"),
        ("Who painted the Mona Lisa ?", "person"),
        ("Where is the Eiffel Tower ?", "place"),
        ("How many legs does a spider have ?", "number"),
    ],
}
_PROMPTS = {"sst2": "{text}\nSentiment:", "trec": "Question: {text}\nAbout:"}


def read_sst2(path: Path) -> list[tuple[str, str]]:
    """Return (sentence, label) pairs."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    pairs = [line.rsplit("\t", 1) for line in lines]
    return [(text, _SENTIMENT[label]) for text, label in pairs if label in _SENTIMENT]


def read_trec(path: Path) -> list[tuple[str, str]]:
    """Return (question, class) pairs."""
    pairs = [line.split(" ", 1) for line in path.read_text("latin-1").splitlines()]
    return [(text, _TREC[label.split(":")[0]]) for label, text in pairs]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sst2", type=Path)
    parser.add_argument("--trec", type=Path)
    args = parser.parse_args()
    print("| model | set | examples | calibrated | accuracy | texts/s |\n|---|---|---|---|---|---|")
    with LLM(args.model) as llm:
        for name, path, read in (("sst2", args.sst2, read_sst2), ("trec", args.trec, read_trec)):
            if path is None:
                continue
            pairs = read(path)
            labels = sorted({label for _, label in pairs})
            for shots in ([], _SHOTS[name]):
                for calibrated in (False, True):
                    classify = Classifier(
                        llm.score, labels, prompt=_PROMPTS[name], examples=shots,
                        calibrated=calibrated,
                    )  # fmt: skip
                    start = time.perf_counter()
                    n_right = sum(classify(text).label == label for text, label in pairs)
                    seconds = time.perf_counter() - start
                    print(
                        f"| {args.model.name} | {name} | {len(shots)} | "
                        f"{'yes' if calibrated else 'no'} | {n_right / len(pairs):.3f} | "
                        f"{len(pairs) / seconds:.0f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
