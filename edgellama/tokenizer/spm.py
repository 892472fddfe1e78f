"""Vocabularies of kind `llama`, split by the sentencepiece library.

The library wants its own model file: a protocol buffer of pieces, scores and types, which is written
here byte by byte from the GGUF's arrays.  Special tokens never reach it (`__init__.py` splits them off).
Source: sentencepiece_model.proto.
"""

from __future__ import annotations

import numpy as np

from edgellama.errors import ModelFileError

from .vocab import BYTE, CONTROL, NORMAL, UNKNOWN, Vocab

_SPACE = "\u2581"


class SentencePiece:
    """BPE by scores with byte fallback."""

    adds_bos_by_kind = True
    insists_on_bos = False

    def __init__(self, vocab: Vocab) -> None:
        from sentencepiece import SentencePieceProcessor

        self.adds_space_prefix = vocab.add_space_prefix
        self._tokens = vocab.tokens
        self._processor = SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(_model_proto(vocab))

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens, which begins the input or follows such a token."""
        prefix = " " if self.adds_space_prefix else ""
        return self._processor.EncodeAsIds(prefix + text)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a normal token."""
        return self._tokens[token].replace(_SPACE, " ").encode()


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def _model_proto(vocab: Vocab) -> bytes:
    """Serialize a ModelProto: pieces, then the trainer's and the normalizer's settings."""
    assert vocab.scores is not None
    # Adding 0 turns -0 into 0: the library ranks one below the other.
    scores = (vocab.scores.astype("<f4") + np.float32(0)).tobytes()
    small = [_varint(n) for n in range(256)]
    # Merging may give any token, as in llama.cpp, but those that text must not be able to spell.
    type_of = [NORMAL, NORMAL, CONTROL, CONTROL, NORMAL, NORMAL, BYTE]
    unknown = vocab.unk_id
    if unknown is None:
        unknown = next((i for i, kind in enumerate(vocab.types) if kind == UNKNOWN), 0)
    parts = []
    seen: set[str] = set()
    for i, text in enumerate(vocab.tokens):
        if not text or text in seen:
            text = f"\x00unused {i}"  # the library refuses empty and repeated pieces
        seen.add(text)
        piece = text.encode()
        length = len(piece)
        if length > 1 << 16:
            raise ModelFileError(
                f"tokenizer.ggml.tokens[{i}] has {length} bytes; 65536 are allowed"
            )
        kind = UNKNOWN if i == unknown else type_of[vocab.types[i]]
        prefix = small[length] if length < 256 else _varint(length)
        body = (
            b"\x0a" + prefix + piece + b"\x15" + scores[4 * i : 4 * i + 4] + b"\x18" + small[kind]
        )
        size = len(body)
        parts.append(b"\x0a" + (small[size] if size < 256 else _varint(size)) + body)
    has_bytes = len(set(vocab.byte_of.values())) == 256
    # trainer_spec: model_type = BPE (3: 2), byte_fallback (35), unk_id (40), no bos, eos, pad
    minus1 = b"\xff" * 9 + b"\x01"
    trainer = b"\x18\x02" + b"\x98\x02" + (b"\x01" if has_bytes else b"\x00")
    trainer += b"\xc0\x02" + _varint(unknown)
    trainer += b"\xc8\x02" + minus1 + b"\xd0\x02" + minus1 + b"\xd8\x02" + minus1
    parts.append(b"\x12" + _varint(len(trainer)) + trainer)
    # normalizer_spec: name "identity", no dummy prefix, keep white space, spaces become U+2581
    normalizer = b"\x0a\x08identity" + b"\x18\x00\x20\x00\x28\x01"
    parts.append(b"\x1a" + _varint(len(normalizer)) + normalizer)
    return b"".join(parts)
