"""Text to token ids and back, from the vocabulary inside a GGUF file.

`vocab.py` validates the metadata, `spm.py` and `bpe.py` are the two kinds, `stream.py` turns ids into
whole characters as they come.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from edgellama.errors import ModelFileError, UnsupportedModelError, UsageError, shown

from .stream import StreamDecoder
from .vocab import BYTE, CONTROL, UNKNOWN, USER_DEFINED, Vocab, read_vocab

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]


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
        if self._model.adds_bos_by_kind and vocab.add_bos_unset:
            self.add_bos = True
        texts: dict[str, int] = {}
        self._special: set[int] = set()
        for i, kind in enumerate(vocab.types):
            if kind in (CONTROL, UNKNOWN, USER_DEFINED):
                texts.setdefault(vocab.tokens[i], i)
                if kind != USER_DEFINED:
                    self._special.add(i)
        self._special_id = texts
        user = [t for t, i in texts.items() if i not in self._special]
        self._split_user = _alternatives(user)
        self._split_all = _alternatives(list(texts))

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
        pattern = self._split_all if parse_special else self._split_user
        at = 0
        follows_special = True  # the space prefix goes before the text and after special tokens
        for match in pattern.finditer(text) if pattern else ():
            if match.start() > at:
                ids += self._model.encode(text[at : match.start()], follows_special)
            token = self._special_id[match[0]]
            ids.append(token)
            follows_special = True
            at = match.end()
        if at < len(text):
            ids += self._model.encode(text[at:], follows_special)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; special tokens give their own text."""
        if not 0 <= token < self.n_vocab:
            raise UsageError(f"token id {token} is outside the vocabulary of {self.n_vocab}")
        if self.vocab.types[token] in (CONTROL, UNKNOWN, USER_DEFINED):
            return self.vocab.tokens[token].encode()
        if self.vocab.types[token] == BYTE:
            return bytes([self.vocab.byte_of[token]])
        return self._model.token_bytes(token)

    def token_text(self, token: int) -> str:
        """The text of a token in the vocabulary."""
        return self.vocab.tokens[token]

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

    def stream(self) -> StreamDecoder:
        """Return a decoder for ids that come one at a time."""
        return StreamDecoder(self)


def _alternatives(texts: list[str]) -> re.Pattern[str] | None:
    """A pattern that finds the longest of the texts."""
    texts = sorted((t for t in texts if t), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


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
