"""The checkpoint's own tokenizer, tried on texts of many kinds.

Where it cuts a text tells the pre-tokenizer of a GGUF file; its ids must be those that edgellama's
tokenizer gives from the file's metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgellama.errors import ModelFileError, UnsupportedModelError, shown
from edgellama.tokenizer import load_tokenizer
from edgellama.tokenizer.pre import PRE_TOKENIZERS, PreTokenizer

from .folder import read_file

PROBES = (
    "Hello world", " Hello  World!\n\nI'm here; we'll see, they've gone. IT'S 'quoted'",
    "1 12 123 1234 12345 3.14159 1,000,000 x2y3", "def f(x):\n\treturn x**2  # done\r\n\r\n  end",
    "   leading and trailing   ", "\n\n\n\t\t  \n mixed \t white\n space ", "äöü ÀÉÎ ñ ß œ Ǆ ﬁ",
    "你好，世界！今天天气很好。", "こんにちは世界 カタカナ", "안녕하세요 세계", "Привет, мир! Ёлка",
    "مرحبا بالعالم", "नमस्ते दुनिया", "👍🏽 🇫🇷 👨‍👩‍👧 ✓ → ∞", "http://a.b/c?d=e&f=g#h user@example.com",
    "<tag attr='v'>text</tag> {\"k\": [1, null]}", "a" * 40, "?!?! ... --- *** ___ $5.00 50% #1",
    "HTTPServer iPhone camelCase snake_case SCREAMING", "e\u0301 \u00a0nbsp \u200bzero\ufeff",
)  # fmt: skip
"""Texts on which two tokenizers are compared: scripts, cases, digits, white space, symbols."""


Ids = Callable[[str], list[int]]
"""From a text to its ids, without special tokens around them."""


def load_library_tokenizer(path: Path, document: dict[str, Any]) -> Any:
    """Return the `tokenizers.Tokenizer` of a tokenizer.json, which holds `document`.

    The library has checked the types of all its parts then, and that they are not nested deep.
    Raises: ModelFileError with what the library does not take.
    """
    from tokenizers import Tokenizer

    model = document.get("model")
    # The library does not check that pieces are as long as the prefix, and panics.
    if isinstance(model, dict) and "merges" in model and model.get("continuing_subword_prefix"):
        raise UnsupportedModelError(
            f"{path.name} has a continuing_subword_prefix, for which GGUF has no place"
        )
    try:
        return Tokenizer.from_str(read_file(path).decode())
    except Exception as error:  # the library has no type of its own
        raise ModelFileError(f"{path} cannot be used: {error}") from None


def ids_of_library(library: Any) -> Ids:
    """How a tokenizer.json gives ids."""
    return lambda text: list(library.encode(text, add_special_tokens=False).ids)


def ids_of_sentencepiece(path: Path) -> Ids:
    """How a sentencepiece model gives ids.  Raises: ModelFileError."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(read_file(path))
    except RuntimeError as error:
        raise ModelFileError(f"{path} cannot be used: {error}; fetch it again") from None
    return lambda text: list(processor.EncodeAsIds(text))


def find_pre_tokenizer(library: Any, ignore_merges: bool) -> str:
    """Return the name of the pre-tokenizer that cuts the probes as the library's does.

    Raises: UnsupportedModelError naming the nearest.
    """
    from tokenizers import pre_tokenizers

    wanted = library.pre_tokenizer
    if wanted is None:
        raise UnsupportedModelError("tokenizer.json has no pre_tokenizer; none is known that fits")
    expected = [_pieces(wanted, text) for text in PROBES]
    seen: list[PreTokenizer] = []
    best, fewest = "", len(PROBES) + 1
    for name, kind in PRE_TOKENIZERS.items():
        if kind.raw or kind in seen or kind.ignore_merges != ignore_merges:
            continue
        seen.append(kind)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        cutter = pre_tokenizers.Sequence([kind.cutter(), bytes_])
        wrong = sum(_pieces(cutter, t) != e for t, e in zip(PROBES, expected, strict=True))
        if wrong < fewest:
            best, fewest = name, wrong
        if not wrong:
            break
    if fewest:
        raise UnsupportedModelError(
            f"tokenizer.json cuts text as no known pre-tokenizer does; the nearest, {best}, cuts "
            f"{fewest} of {len(PROBES)} probes otherwise"
        )
    return best


def _pieces(cutter: Any, text: str) -> list[str]:
    return [piece for piece, _ in cutter.pre_tokenize_str(text)]


def compare(metadata: dict[str, Any], wanted: Ids) -> None:
    """Raise: UnsupportedModelError where edgellama's tokenizer gives other ids for a probe."""
    ours = load_tokenizer(metadata)
    for text in PROBES:
        expected, got = wanted(text), ours.encode(text, add_special=False)
        if got != expected:
            pairs = enumerate(zip(got, expected, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(got), len(expected)))
            raise UnsupportedModelError(
                f"the tokenizer cannot be carried over: for {shown(text)} it gives "
                f"{expected[at : at + 4]} at token {at} where the GGUF's gives {got[at : at + 4]}"
            )
