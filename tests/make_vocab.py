"""Small vocabularies of kind `gpt2` in which a cut shows: merges know no boundary but those of the cut.

`byte_level` is GPT-2's alphabet, `characters` the other way with byte tokens; both have tokens that no
merge leads to.  `grow` finds merges for some texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import models

from edgellama.tokenizer.bpe import byte_of_character

RAW = ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace")
SPECIAL = ("<start>", "<stop>", "<\u00e9 \n>")
_ALPHABET = list(byte_of_character())
_CHARACTER_OF = {byte: character for character, byte in byte_of_character().items()}


def spell(text: str) -> str:
    """Write the bytes of a text in GPT-2's alphabet."""
    return "".join(_CHARACTER_OF[byte] for byte in text.encode())


def grow(words: Iterable[str]) -> list[str]:
    """Return merges that make each word one token: first all pairs of letters, then pairs of those."""
    words = list(words)
    letters = dict.fromkeys(letter for word in words for letter in word)
    merges: dict[tuple[str, str], None] = {}
    while True:
        tokens = dict.fromkeys([*letters, *map("".join, merges)])
        model = models.BPE({token: i for i, token in enumerate(tokens)}, list(merges))
        cut = [[token.value for token in model.tokenize(word)] if word else [] for word in words]
        new = dict.fromkeys(pair for pieces in cut for pair in pairwise(pieces))
        if not new:
            return [" ".join(pair) for pair in merges]
        merges |= new


def _metadata(pre: str, tokens: list[str], types: list[int], merges: list[str]) -> dict[str, Any]:
    start = len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *SPECIAL],
        "tokenizer.ggml.token_type": np.array([*types, 3, 3, 4], np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": start,
        "tokenizer.ggml.eos_token_id": start + 1,
    }


def byte_level(pre: str, merges: list[str], whole: list[str]) -> dict[str, Any]:
    """Return the metadata of a vocabulary of bytes, merges and tokens that must be found whole."""
    tokens = list(dict.fromkeys([*_ALPHABET, *(m.replace(" ", "") for m in merges), *whole]))
    return _metadata(pre, tokens, [1] * len(tokens), merges)


def characters(pre: str, merges: list[str], whole: list[str]) -> dict[str, Any]:
    """Return the same over characters: those that merges name, and for the others byte tokens."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    parts = [part for merge in merges for part in (*merge.split(" "), merge.replace(" ", ""))]
    tokens = list(dict.fromkeys([*bytes_, *parts, *whole]))
    return _metadata(pre, tokens, [6] * 256 + [1] * (len(tokens) - 256), merges)


def vocabulary(pre: str, texts: Iterable[str], whole: Iterable[str]) -> dict[str, Any]:
    """Return the metadata of a vocabulary of the kind that the name wants, for some texts."""
    if pre in RAW:
        return characters(pre, *_escaped(tuple(texts), tuple(whole)))
    return byte_level(pre, *_spelled(tuple(texts), tuple(whole)))


@cache
def _spelled(texts: tuple[str, ...], whole: tuple[str, ...]) -> tuple[list[str], list[str]]:
    return grow(map(spell, texts)), [spell(text) for text in whole]


@cache
def _escaped(texts: tuple[str, ...], whole: tuple[str, ...]) -> tuple[list[str], list[str]]:
    # Every other text, so that some characters are left to byte tokens; GGUF readers in C end at NUL.
    words = [text.replace(" ", "\u2581") for text in texts[::2] if "\0" not in text]
    return grow(words), [text.replace(" ", "\u2581") for text in whole]


def write_gguf(path: Path, metadata: dict[str, Any]) -> None:
    """Write a file that has a vocabulary and no model."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None and len(value):
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
