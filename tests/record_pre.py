"""Record llama.cpp's ids for every pre-tokenizer name, for `tests/test_pre.py`.

Run from the top of a checkout with a Python that has llama-cpp-python, gguf and tokenizers:

    PYTHONPATH=.:tests python tests/record_pre.py

Reads the texts of `tests/data/pre.json` and writes the file anew: names that never differ are one
class; of each text, which answer each class gives (a digit to base 36) and then the answers.  Null is
where llama.cpp would abort.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
from make_vocab import vocabulary, write_gguf

from edgellama.tokenizer.pre import PRE_TOKENIZERS

GOLDEN = Path(__file__).parent / "data" / "pre.json"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def ask(name: str, metadata: dict[str, Any], texts: list[str]) -> list[list[int] | None]:
    """What llama.cpp makes of each text, with the tokens that the vocabulary wants added."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.gguf"
        write_gguf(path, metadata)
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ids = [
        None
        if name == "whitespace" and re.search(r"\s\s", text)
        else model.tokenize(text.encode(), add_bos=True, special=False)
        for text in texts
    ]
    model.close()
    return ids


def main() -> None:
    """Ask about every name and write the file."""
    golden = json.loads(GOLDEN.read_text(encoding="ascii"))
    whole = golden["whole"]
    texts = list(dict.fromkeys(text for text, *_ in golden["cases"]))
    classes: dict[str, list[str]] = {}
    for name in PRE_TOKENIZERS:
        ids = ask(name, vocabulary(name, texts, whole), texts)
        classes.setdefault(json.dumps(ids), []).append(name)
    cases = []
    for text, *given in zip(texts, *map(json.loads, classes), strict=True):
        answers = list({json.dumps(ids): ids for ids in given}.values())
        cases.append([text, "".join(DIGITS[answers.index(ids)] for ids in given), *answers])

    def rows(values: list[Any]) -> str:
        return ",\n".join(json.dumps(value, separators=(",", ":")) for value in values)

    names = [" ".join(names) for names in classes.values()]
    GOLDEN.write_text(
        f'{{"whole": {json.dumps(whole)},\n'
        f'"classes": [\n{rows(names)}\n],\n"cases": [\n{rows(cases)}\n]}}\n',
        encoding="ascii",
    )


if __name__ == "__main__":
    main()
