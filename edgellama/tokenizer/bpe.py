"""Vocabularies of kind `gpt2`: byte-level BPE.

`pre.py` knows how text is cut before merging, for which the tokenizers library has the patterns.  A few
of its names mean BPE over characters: spaces are written as another character, and what is no token
falls back to the byte tokens <0x00> to <0xFF>.  Merging is done here: two dictionaries of what the file
has are ready in 15 ms, where the library's own form of them took 90 and 15 MB.
Source: Sennrich et al., Neural machine translation of rare words with subword units, 2016.
"""

from __future__ import annotations

import re
from functools import cache
from heapq import heapify, heappop, heappush

from edgellama.errors import ModelFileError

from .pre import pre_tokenizer
from .vocab import Vocab

_N_KNOWN = 1 << 14  # pieces whose ids are remembered
_LONGEST_KNOWN = 64


class ByteLevelBPE:
    """BPE over bytes written as printable characters."""

    adds_space_prefix = False

    def __init__(self, vocab: Vocab, pre: str) -> None:
        from tokenizers import pre_tokenizers

        self._kind = kind = pre_tokenizer(pre)
        self.adds_bos_by_kind = kind.adds_bos
        self.insists_on_bos = kind.insists_on_bos
        self._tokens = vocab.tokens
        # Of equal tokens, and of equal merges, the first counts.
        self._ids = _first_places(vocab.tokens)
        self._ranks = _first_places(vocab.merges)
        ids = self._ids
        if not all(" " in merge[1:-1] and merge.replace(" ", "") in ids for merge in self._ranks):
            _check_merges(vocab.merges, ids)
        self._newlines = {
            text: i
            for text, i in (ids if kind.whole_newlines else {}).items()
            if text and not text.strip("\n")
        }
        self._known: dict[str, list[int]] = {}
        self._cutter = kind.cutter()
        if not kind.raw:
            bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            self._cutter = pre_tokenizers.Sequence([self._cutter, bytes_])

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Ids of a text without special tokens, wherever it stands."""
        text = text.replace(" ", self._kind.space)
        if not self._newlines:
            return self._encode(text)
        ids = []
        for piece in re.findall(r"\n+|[^\n]+", text):
            token = self._newlines.get(piece)
            ids += self._encode(piece) if token is None else [token]
        return ids

    def _encode(self, text: str) -> list[int]:
        ids = []
        for piece, _ in self._cutter.pre_tokenize_str(text):
            known = self._known.get(piece)
            if known is None:
                known = [self._ids[symbol] for symbol in self._merge(piece) if symbol]
                if len(piece) <= _LONGEST_KNOWN and len(self._known) < _N_KNOWN:
                    self._known[piece] = known
            ids += known
        return ids

    def _merge(self, piece: str) -> list[str]:
        """Join neighbours, the lowest rank first and of equal ones the leftmost; "" is no token."""
        if self._kind.ignore_merges and piece in self._ids:
            return [piece]
        symbols = self._symbols(piece)
        n = len(symbols)
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))
        pairs = ((self._rank(symbols[i], symbols[i + 1]), i) for i in range(n - 1))
        todo = [(rank, i) for rank, i in pairs if rank >= 0]
        heapify(todo)
        while todo:
            rank, i = heappop(todo)
            j = after[i]
            if j == n or self._rank(symbols[i], symbols[j]) != rank:
                continue  # one of the two has been joined with another meanwhile
            symbols[i] += symbols[j]
            symbols[j] = ""
            after[i] = after[j]
            if after[i] < n:
                before[after[i]] = i
            for left in (before[i], i):
                if left >= 0 and after[left] < n:
                    rank = self._rank(symbols[left], symbols[after[left]])
                    if rank >= 0:
                        heappush(todo, (rank, left))
        return symbols

    def _rank(self, left: str, right: str) -> int:
        """The place of a merge in the file, or -1; it is cut at a space after the first character."""
        rank = self._ranks.get(f"{left} {right}", -1)
        return rank if left and " " not in left[1:] else -1

    def _symbols(self, piece: str) -> list[str]:
        """The characters of a piece, or bytes in their place; "" keeps neighbours of no token apart."""
        symbols = list(piece)
        unknown = {character for character in symbols if character not in self._ids}
        if not unknown:
            return symbols
        instead = {character: [""] for character in unknown}
        for character in unknown if self._kind.raw else ():
            bytes_ = [f"<0x{byte:02X}>" for byte in character.encode()]
            if all(byte in self._ids for byte in bytes_):
                instead[character] = bytes_
        return [symbol for c in symbols for symbol in instead.get(c, [c])]

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

    def all_bytes(self) -> list[bytes]:
        """The bytes of every token, taken as a normal one."""
        return list(map(self.token_bytes, range(len(self._tokens))))


def _first_places(texts: list[str]) -> dict[str, int]:
    return dict(zip(reversed(texts), range(len(texts) - 1, -1, -1), strict=True))


def _check_merges(merges: list[str], ids: dict[str, int]) -> None:
    """Name the first merge that is not two tokens which make a third."""
    for i, merge in enumerate(merges):
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not right:
            raise ModelFileError(
                f"tokenizer.ggml.merges[{i}] is {merge[:40]!r}; two pieces and a space are needed"
            )
        if left not in ids or right not in ids or left + right not in ids:
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
