"""Vocabularies of kind `gpt2`: byte-level BPE by the tokenizers library.

`pre.py` knows how text is cut before merging.  A few of its names mean BPE over characters: spaces are
written as another character, and what is no token falls back to the byte tokens <0x00> to <0xFF>.
"""

from __future__ import annotations

import operator
import re
from functools import cache

from edgellama.errors import ModelFileError

from .pre import pre_tokenizer
from .vocab import Vocab


class ByteLevelBPE:
    """BPE over bytes written as printable characters."""

    adds_space_prefix = False

    def __init__(self, vocab: Vocab, pre: str) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        self._kind = kind = pre_tokenizer(pre)
        self.adds_bos_by_kind = kind.adds_bos
        self.insists_on_bos = kind.insists_on_bos
        self._tokens = vocab.tokens
        ids = {text: i for i, text in reversed(list(enumerate(vocab.tokens)))}
        merges = _read_merges(vocab.merges, ids)
        self._newlines = {
            text: i
            for text, i in ids.items()
            if kind.whole_newlines and text and not text.strip("\n")
        }
        # A symbol that is no token gives none, but its neighbours must not meet over it.
        unknown = "\0no token"
        self._tokenizer = Tokenizer(
            models.BPE(
                vocab=ids | {unknown: len(vocab.tokens)},
                merges=merges,
                unk_token=unknown,
                byte_fallback=kind.raw,
                ignore_merges=kind.ignore_merges,
            )
        )
        cutter = kind.cutter()
        if not kind.raw:
            bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            cutter = pre_tokenizers.Sequence([cutter, bytes_])
        self._tokenizer.pre_tokenizer = cutter

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        text = text.replace(" ", self._kind.space)
        if not self._newlines:
            return self._merge(text)
        ids = []
        for piece in re.findall(r"\n+|[^\n]+", text):
            token = self._newlines.get(piece)
            ids += self._merge(piece) if token is None else [token]
        return ids

    def _merge(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i < len(self._tokens)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a normal token."""
        text = self._tokens[token]
        if self._kind.raw:
            return text.replace(self._kind.space, " ").encode()
        table = byte_of_character()
        try:
            return bytes(table[c] for c in text)
        except KeyError:
            return text.encode()  # a token that is not written in the byte alphabet


def _read_merges(merges: list[str], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Split merges at their space; of equal ones the first counts."""
    # Whole columns at once: one by one takes three times as long.
    cuts = [merge.find(" ", 1) for merge in merges]
    lefts = [merge[:cut] for merge, cut in zip(merges, cuts, strict=True)]
    rights = [merge[cut + 1 :] for merge, cut in zip(merges, cuts, strict=True)]
    if min(cuts, default=1) < 0 or "" in rights:
        i = next(i for i, cut in enumerate(cuts) if cut < 0 or not rights[i])
        raise ModelFileError(
            f"tokenizer.ggml.merges[{i}] is {merges[i][:40]!r}; two pieces and a space are needed"
        )
    for pieces in (lefts, rights, list(map(operator.add, lefts, rights))):
        if not ids.keys() >= set(pieces):
            i = next(i for i, piece in enumerate(pieces) if piece not in ids)
            raise ModelFileError(
                f"tokenizer.ggml.merges[{i}] is {merges[i][:40]!r}; it names a piece that is no token"
            )
    return list(dict.fromkeys(zip(lefts, rights, strict=True)))


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    table = {}
    shifted = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            table[chr(byte)] = byte
        else:
            table[chr(256 + shifted)] = byte
            shifted += 1
    return table
