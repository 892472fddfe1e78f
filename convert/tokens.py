"""The tokens of a model, from whatever file holds them, in the order of their ids.

Read are `tokenizer.json` (byte-level BPE, or BPE over characters with byte fallback), `tokenizer.model`
of sentencepiece or tiktoken, and llama2.c's `tokenizer.bin`.  Tokens that a checkpoint adds to these,
and what tokens mean, are for `vocabulary.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError, shown
from edgellama.tokenizer.vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED

from .folder import inside, read_file
from .probes import find_pre_tokenizer
from .sentencepiece_model import is_sentencepiece, read_sentencepiece
from .tiktoken import LLAMA3_NAMED, read_tiktoken

_PREFIX = "tokenizer.ggml."
_NO_SCORE = np.float32(-1e4)  # of a token that no merge makes


@dataclass
class Tokens:
    """What the kinds of files have in common."""

    kind: str  # tokenizer.ggml.model
    texts: list[str]
    types: np.ndarray  # i32, as in tokenizer.ggml.token_type
    scores: np.ndarray | None = None
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    flags: dict[str, bool] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)  # of special tokens, by GGUF's name for them

    def put(self, token: int, text: str, kind: int, n_most: int) -> None:
        """Set a token.  Raises: ModelFileError for one beyond the embeddings."""
        if not 0 <= token < n_most:
            raise ModelFileError(
                f"the token {shown(text)} has id {token}; the model has {n_most} rows of embeddings"
            )
        self.extend(token + 1)
        self.texts[token] = text
        self.types[token] = kind

    def extend(self, n: int) -> None:
        """Fill up with tokens that no text gives."""
        more = n - len(self.texts)
        if more > 0:
            self.texts += [f"[PAD{i}]" for i in range(len(self.texts), n)]
            self.types = np.append(self.types, np.full(more, UNUSED, np.int32))
            if self.scores is not None:
                self.scores = np.append(self.scores, np.full(more, _NO_SCORE))

    def metadata(self) -> dict[str, Any]:
        """The keys of the file."""
        out: dict[str, Any] = {_PREFIX + "model": self.kind, _PREFIX + "pre": self.pre}
        out[_PREFIX + "tokens"] = self.texts
        if self.scores is not None:
            out[_PREFIX + "scores"] = self.scores.astype(np.float32)
        out[_PREFIX + "token_type"] = self.types.astype(np.int32)
        if self.merges:
            out[_PREFIX + "merges"] = self.merges
        out |= {f"{_PREFIX}{key}_token_id": token for key, token in self.ids.items()}
        return out | {_PREFIX + key: value for key, value in self.flags.items()}


def read_tokens(folder: Path, document: dict[str, Any], library: Any, n_vocab: int) -> Tokens:
    """Return the tokens of a folder, at most `n_vocab`.

    `document` is its tokenizer.json, empty where there is none, and `library` what the tokenizers
    library made of it.  Raises: ModelFileError, UnsupportedModelError.
    """
    if document and _is_byte_level(document):
        return _from_byte_level(document, library, n_vocab)
    if (folder / "tokenizer.model").is_file():
        return _from_model_file(inside(folder, "tokenizer.model"), n_vocab)
    if document:
        return _from_fallback_bpe(document, n_vocab)
    for name in ("tok512.bin", "tokenizer.bin"):
        if (folder / name).is_file():
            return _from_llama2c(inside(folder, name), n_vocab)
    raise ModelFileError(
        f"{folder} has no tokenizer.json and no tokenizer.model; put the model's own beside it"
    )


# --- tokenizer.json -------------------------------------------------------------------------------
def _parts_of(node: Any) -> Iterable[dict[str, Any]]:
    """A pre-tokenizer or decoder, and what it is made of."""
    if isinstance(node, dict):
        yield node
        for key in ("pretokenizers", "decoders"):
            for part in node.get(key) or ():
                yield from _parts_of(part)


def _is_byte_level(document: dict[str, Any]) -> bool:
    nodes = (document.get("pre_tokenizer"), document.get("decoder"))
    return any(part.get("type") == "ByteLevel" for node in nodes for part in _parts_of(node))


def _bpe(document: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Return vocabulary and merges, whose types the library has checked."""
    model = document["model"]
    vocab, merges = model.get("vocab"), model.get("merges")
    if model.get("type", "BPE") != "BPE" or not isinstance(merges, list):
        raise UnsupportedModelError(
            f"tokenizer.json holds a model of type {shown(model.get('type'))}; BPE is needed"
        )
    return vocab, [" ".join(merge) if isinstance(merge, list) else merge for merge in merges]


def _listed(vocab: dict[str, int], n_most: int) -> tuple[list[str], np.ndarray]:
    """Tokens in the order of their ids, and their types; a gap is filled."""
    if not vocab:
        raise ModelFileError("tokenizer.json has an empty vocabulary; fetch it again")
    n = max(vocab.values()) + 1
    if n > n_most:
        raise ModelFileError(
            f"tokenizer.json has tokens up to id {n - 1}; the model has {n_most} rows of embeddings"
        )
    texts = [f"[PAD{i}]" for i in range(n)]
    types = np.full(n, UNUSED, np.int32)
    for text, token in vocab.items():
        if types[token] == NORMAL:
            raise ModelFileError(
                f"tokenizer.json gives the id {token} to {shown(texts[token])} and {shown(text)}"
            )
        texts[token], types[token] = text, NORMAL
    return texts, types


def _from_byte_level(document: dict[str, Any], library: Any, n_vocab: int) -> Tokens:
    vocab, merges = _bpe(document)
    texts, types = _listed(vocab, n_vocab)
    ignore_merges = bool(document["model"].get("ignore_merges", False))
    pre = find_pre_tokenizer(library, ignore_merges)
    return Tokens("gpt2", texts, types, merges=merges, pre=pre)


def _from_fallback_bpe(document: dict[str, Any], n_vocab: int) -> Tokens:
    """BPE over characters with byte tokens: a sentencepiece model in other clothes.

    A merge's rank becomes the score of what it makes, for that is how its converters ranked them.
    """
    vocab, merges = _bpe(document)
    if not document["model"].get("byte_fallback"):
        raise UnsupportedModelError("tokenizer.json is BPE without byte level and byte_fallback")
    texts, types = _listed(vocab, n_vocab)
    scores = np.full(len(texts), _NO_SCORE)
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        token = vocab.get(left + right)
        if token is not None and scores[token] == _NO_SCORE:
            scores[token] = -rank
    for byte in range(256):
        token = vocab.get(f"<0x{byte:02X}>")
        if token is not None:
            types[token] = BYTE
    unknown = document["model"].get("unk_token")
    if unknown in vocab:
        types[vocab[unknown]] = UNKNOWN
    return Tokens("llama", texts, types, scores)


# --- tokenizer.model and tokenizer.bin ------------------------------------------------------------
def _from_model_file(path: Path, n_vocab: int) -> Tokens:
    if not is_sentencepiece(path):
        ranks = read_tiktoken(path)
        types = np.full(len(ranks.tokens), NORMAL, np.int32)
        out = Tokens("gpt2", ranks.tokens, types, merges=ranks.merges, pre="llama-bpe")
        out.flags["add_bos_token"] = True
        for token, text in ranks.special.items():
            out.put(token, text, CONTROL, n_vocab)
            if text in LLAMA3_NAMED:
                out.ids[LLAMA3_NAMED[text]] = token
        return out
    model = read_sentencepiece(path)
    if len(model.pieces) > n_vocab:
        raise ModelFileError(
            f"{path} has {len(model.pieces)} pieces; the model has {n_vocab} rows of embeddings"
        )
    flags = {
        "add_space_prefix": model.add_dummy_prefix,
        "remove_extra_whitespaces": model.remove_extra_whitespaces,
        "add_bos_token": True,
    }
    ids = {"bos": model.bos_id, "eos": model.eos_id, "unknown": model.unk_id}
    return Tokens(
        "llama",
        [piece.text for piece in model.pieces],
        np.array([piece.kind for piece in model.pieces], np.int32),
        np.array([piece.score for piece in model.pieces], np.float32),
        flags=flags,
        ids={key: token for key, token in ids.items() if 0 <= token < len(model.pieces)},
    )


def _from_llama2c(path: Path, n_vocab: int) -> Tokens:
    """llama2.c's tokenizer.bin: the longest token's length, then score, length and text of each."""
    data = read_file(path)
    texts: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(data) and len(texts) < n_vocab:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + size > len(data):
            raise ModelFileError(f"{path} is cut off at byte {at}; fetch it again")
        scores.append(float(np.frombuffer(data, "<f4", 1, at)[0]))
        texts.append(data[at + 8 : at + 8 + size].decode("utf-8", "replace"))
        at += 8 + size
    if len(texts) < n_vocab or n_vocab < 259:
        raise ModelFileError(f"{path} has {len(texts)} tokens; the model has {n_vocab}")
    # The exporter wrote U+2581 as a space and framed the two special tokens in newlines.
    texts = [text.replace(" ", "\u2581") for text in texts]
    texts[:3] = ["<unk>", "<s>", "</s>"]
    types = np.full(len(texts), NORMAL, np.int32)
    types[:3] = UNKNOWN, CONTROL, CONTROL
    types[3:259] = BYTE
    flags = {"add_space_prefix": True, "add_bos_token": True}
    ids = {"unknown": 0, "bos": 1, "eos": 2}
    return Tokens("llama", texts, types, np.array(scores, np.float32), flags=flags, ids=ids)
