"""Vocabularies of kind `gpt2`: byte-level BPE by the tokenizers library.

`pre.py` knows how text is cut before merging.  A few of its names mean BPE over characters: spaces are
written as another character, and what is no token falls back to the byte tokens <0x00> to <0xFF>.
"""

from __future__ import annotations

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
        n = len(vocab.tokens)
        ids = dict(zip(reversed(vocab.tokens), range(n - 1, -1, -1), strict=True))
        merges = _read_merges(vocab.merges)
        self._newlines = {
            text: i
            for text, i in (ids if kind.whole_newlines else {}).items()
            if text and not text.strip("\n")
        }
        # A symbol that is no token gives none, but its neighbours must not meet over it.
        unknown = "\0no token"
        try:
            model = models.BPE(
                vocab=ids | {unknown: n},
                merges=merges,
                unk_token=unknown,
                byte_fallback=kind.raw,
                ignore_merges=kind.ignore_merges,
            )
        except Exception:  # the library has no type of its own
            _check_merges(merges, ids)
            raise
        self._tokenizer = Tokenizer(model)
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


def _read_merges(merges: list[str]) -> list[tuple[str, str]]:
    """Split merges at their space; of equal ones the first counts."""
    cuts = [merge.find(" ", 1) for merge in merges]
    pairs = [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]
    if min(cuts, default=1) < 0 or not all(right for _, right in pairs):
        i = next(i for i, cut in enumerate(cuts) if cut < 0 or not pairs[i][1])
        raise ModelFileError(
            f"tokenizer.ggml.merges[{i}] is {merges[i][:40]!r}; two pieces and a space are needed"
        )
    return pairs if len(set(merges)) == len(merges) else list(dict.fromkeys(pairs))


def _check_merges(pairs: list[tuple[str, str]], ids: dict[str, int]) -> None:
    """Name the merge that the library has refused: it looks up every piece anyway."""
    for i, (left, right) in enumerate(pairs):
        if left not in ids or right not in ids or left + right not in ids:
            merge = f"{left} {right}"
            raise ModelFileError(
                f"tokenizer.ggml.merges[{i}] is {merge[:40]!r}; it names a piece that is no token"
            )


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
