"""Text to token ids and back, from the vocabulary inside a GGUF file.

`vocab.py` validates the metadata, `spm.py` and `bpe.py` are the two kinds, `pre.py` has the patterns of
the second, `stream.py` turns ids into whole characters as they come.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError, UsageError, shown

from .stream import StreamDecoder
from .vocab import BYTE, SPECIAL, USER_DEFINED, Vocab, read_vocab

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]

_WHITE_SPACE = " \t\n\v\f\r"


class Tokenizer:
    """A vocabulary and the way its kind splits text.

    Special tokens are split off first: user-defined ones always, control ones when asked.
    """

    def __init__(self, vocab: Vocab, override_pre: str | None = None) -> None:
        from .bpe import ByteLevelBPE
        from .spm import SentencePiece

        self.vocab = vocab
        self.n_vocab = len(vocab.tokens)
        self.bos_id, self.eos_id = vocab.bos_id, vocab.eos_id
        self.eog_ids = vocab.eog_ids
        self.add_bos, self.add_eos = vocab.add_bos, vocab.add_eos
        kinds = {"llama": SentencePiece, "gpt2": ByteLevelBPE}
        if vocab.model not in kinds:
            raise UnsupportedModelError(
                f"tokenizer.ggml.model is {shown(vocab.model)}; known kinds: {', '.join(kinds)}"
            )
        self._model: SentencePiece | ByteLevelBPE = (
            SentencePiece(vocab)
            if vocab.model == "llama"
            else ByteLevelBPE(vocab, override_pre or vocab.pre)
        )
        if self._model.insists_on_bos or (self._model.adds_bos_by_kind and vocab.add_bos_unset):
            self.add_bos = True
        special = np.flatnonzero(np.isin(vocab.types, SPECIAL)).tolist()
        self._special = {i for i in special if vocab.types[i] != USER_DEFINED}
        # Longest first, so that a token is never cut by one that is part of it.
        special.sort(key=lambda i: -len(vocab.tokens[i].encode()))
        self._split_off = [(vocab.tokens[i], i) for i in special if vocab.tokens[i]]

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Return the ids of a text; `add_special` adds BOS and EOS where the model wants them.

        Raises: UsageError for text that is not Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text holds a lone surrogate at character {error.start}; valid Unicode is needed"
            ) from None
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        for part in self._partition(text, parse_special):
            ids += self._model.encode(part) if isinstance(part, str) else [part]
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut a text at its special tokens: strings, and ids between them."""
        parts: list[str | int] = [text] if text else []
        # Some vocabularies have thousands; what two characters rule out is not searched for.
        starts = {text[i : i + 2] for i in range(len(text))} | set(text)
        for special, token in self._split_off:
            if special[:2] not in starts or (token in self._special and not parse_special):
                continue
            cut: list[str | int] = []
            for part in parts:
                if not isinstance(part, str) or special not in part:
                    cut.append(part)
                    continue
                if token in self.vocab.strip_right:
                    left, *rights = re.split(f"{re.escape(special)}[{_WHITE_SPACE}]*", part)
                else:
                    left, *rights = part.split(special)
                for right in rights:
                    if token in self.vocab.strip_left:
                        left = left.rstrip(_WHITE_SPACE)
                    cut += [left, token] if left else [token]
                    left = right
                cut += [left] if left else []
            parts = cut
        return parts

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; special tokens give their own text."""
        if not 0 <= token < self.n_vocab:
            raise UsageError(f"token id {token} is outside the vocabulary of {self.n_vocab}")
        if self.vocab.types[token] in SPECIAL:
            return self.vocab.tokens[token].encode()
        if self.vocab.types[token] == BYTE:
            return bytes([self.vocab.byte_of[token]])
        return self._model.token_bytes(token)

    def token_text(self, token: int) -> str:
        """The text of a token in the vocabulary."""
        return self.vocab.tokens[token]

    def all_bytes(self) -> list[bytes]:
        """The bytes of all tokens, as `token_bytes` gives them."""
        out = self._model.all_bytes()
        for token in np.flatnonzero(np.isin(self.vocab.types, (*SPECIAL, BYTE))).tolist():
            out[token] = self.token_bytes(token)
        return out

    def encode_inside(self, text: str) -> list[int]:
        """The ids of a text that goes on from another, without special tokens."""
        return self._model.encode(text, begins=False)

    def is_special(self, token: int) -> bool:
        """Whether a token is control or unknown: not part of the text."""
        return token in self._special

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        kept = [i for i in ids if not (skip_special and self.is_special(i))]
        text = b"".join(map(self.token_bytes, kept))
        if self._model.adds_space_prefix and text.startswith(b" "):
            text = text[1:]
        return text.decode(errors="replace")

    def stream(self, shown: frozenset[int] = frozenset()) -> StreamDecoder:
        """Return a decoder for ids that come one at a time; special tokens among `shown` are text."""
        return StreamDecoder(self, shown)


def load_tokenizer(metadata: Mapping[str, Any], override_pre: str | None = None) -> Tokenizer:
    """Build the tokenizer that a file's metadata describes.

    Raises: ModelFileError naming the key; UnsupportedModelError for a kind or pre-tokenizer that is
    not known.
    """
    try:
        return Tokenizer(read_vocab(metadata), override_pre)
    except (ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"the tokenizer in the file cannot be used: {error}") from error
