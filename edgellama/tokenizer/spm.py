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

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Ids of a text without special tokens; it `begins` the input or follows such a token."""
        prefix = " " if begins and self.adds_space_prefix else ""
        return self._processor.EncodeAsIds(prefix + text)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a normal token."""
        return self._tokens[token].replace(_SPACE, " ").encode()

    def all_bytes(self) -> list[bytes]:
        """The bytes of every token, taken as a normal one."""
        return [text.replace(_SPACE, " ").encode() for text in self._tokens]


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
    unknown = vocab.unk_id
    if unknown is None:
        unknown = int((vocab.types == UNKNOWN).argmax())
    # Merging may give any token, as in llama.cpp, but those that text must not be able to spell.
    type_of = np.array([NORMAL, NORMAL, CONTROL, CONTROL, NORMAL, NORMAL, BYTE], np.uint8)
    kinds = type_of[vocab.types]
    kinds[unknown] = UNKNOWN
    # Adding 0 turns -0 into 0: the library ranks one below the other.
    pieces = _pieces(vocab.tokens, vocab.scores.astype("<f4") + np.float32(0), kinds)
    has_bytes = len(set(vocab.byte_of.values())) == 256
    # trainer_spec: model_type = BPE (3: 2), byte_fallback (35), unk_id (40), no bos, eos, pad
    minus1 = b"\xff" * 9 + b"\x01"
    trainer = b"\x18\x02" + b"\x98\x02" + (b"\x01" if has_bytes else b"\x00")
    trainer += b"\xc0\x02" + _varint(unknown)
    trainer += b"\xc8\x02" + minus1 + b"\xd0\x02" + minus1 + b"\xd8\x02" + minus1
    trainer = b"\x12" + _varint(len(trainer)) + trainer
    # normalizer_spec: name "identity", no dummy prefix, keep white space, spaces become U+2581
    normalizer = b"\x0a\x08identity" + b"\x18\x00\x20\x00\x28\x01"
    return pieces + trainer + b"\x1a" + _varint(len(normalizer)) + normalizer


def _pieces(tokens: list[str], scores: np.ndarray, kinds: np.ndarray) -> bytes:
    """Serialize {text 1, score 2, type 3} as field 1 for every token.

    All at once in NumPy: 262144 of them one by one take most of a second.
    """
    texts = [text.encode() for text in _distinct(tokens)]
    length = np.fromiter(map(len, texts), np.int64, len(texts))
    if len(length) and length.max() >= 1 << 14:
        i = int(length.argmax())
        raise ModelFileError(
            f"tokenizer.ggml.tokens[{i}] has {length[i]} bytes; {(1 << 14) - 1} are allowed"
        )
    size = length + 9 + (length > 127)  # of the message: 1 + varint + text + 5 + 2
    ends = np.cumsum(size + 2 + (size > 127))
    out = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    at = _put_field(out, ends - size - 2 - (size > 127), size)
    at = _put_field(out, at, length)
    places = np.repeat(at - (np.cumsum(length) - length), length)
    places += np.arange(len(places))  # in place: 20 MB less at the peak of loading Gemma 3
    out[places] = np.frombuffer(b"".join(texts), np.uint8)
    at += length
    out[at] = 0x15
    for i, byte in enumerate(scores.view(np.uint8).reshape(-1, 4).T, 1):
        out[at + i] = byte
    out[at + 5] = 0x18
    out[at + 6] = kinds
    return out.tobytes()


def _put_field(out: np.ndarray, at: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Write the key of field 1 and a length below 2^14; return where what it counts begins."""
    out[at] = 0x0A
    long = value > 127
    out[at + 1] = np.where(long, value & 127 | 128, value)
    out[at[long] + 2] = value[long] >> 7
    return at + 2 + long


def _distinct(tokens: list[str]) -> list[str]:
    """The library refuses empty and repeated pieces: all but the first become unspeakable."""
    if len(set(tokens)) == len(tokens) and "" not in tokens:
        return tokens
    seen = {""}
    out = []
    for i, text in enumerate(tokens):
        out.append(f"\x00unused {i}" if text in seen else text)
        seen.add(text)
    return out
