"""The parts of a sentencepiece model file that a vocabulary is made of.

The sentencepiece library tells neither user-defined pieces nor the normalizer's settings, so its
protocol buffer is walked here; nothing but lengths and field numbers is interpreted.
Source: sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edgellama.errors import ModelFileError, UnsupportedModelError

from .folder import read_file

_BPE = 2
_KINDS = {1: "unigram", 3: "word", 4: "char"}


class Piece(NamedTuple):
    """A piece as the file has it; `kind` is numbered as in `tokenizer.ggml.token_type`."""

    text: str
    score: float
    kind: int


class SentencePieceModel(NamedTuple):
    """Pieces in the order of their ids, and how text is prepared."""

    pieces: list[Piece]
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int


def is_sentencepiece(path: Path) -> bool:
    """Say whether a `tokenizer.model` begins as sentencepiece's do: field 1, the first piece."""
    with open(path, "rb") as file:
        return file.read(1) == b"\x0a"


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a `tokenizer.model` of kind BPE.

    Raises: ModelFileError for a damaged file; UnsupportedModelError for another kind of model.
    """
    data = read_file(path)
    try:
        fields = list(_fields(data))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer = _last(fields, 2)
        normalizer = _last(fields, 3)
        kind = trainer.get(3, 1)
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise ModelFileError(
            f"{path} is damaged or no sentencepiece model ({error}); fetch it again"
        ) from None
    if not pieces:
        raise ModelFileError(f"{path} holds no pieces; a sentencepiece model is needed")
    if kind != _BPE:
        raise UnsupportedModelError(
            f"{path} is a sentencepiece model of kind {_KINDS.get(kind, kind)}; bpe is needed"
        )
    return SentencePieceModel(
        pieces=pieces,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        unk_id=_signed(trainer.get(40, 0)),
        bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)),
        pad_id=_signed(trainer.get(43, -1)),
    )


def _last(fields: list[tuple[int, int | bytes]], number: int) -> dict[int, int]:
    """The integers of the last message with this number."""
    found = [value for key, value in fields if key == number and isinstance(value, bytes)]
    return {k: v for k, v in _fields(found[-1]) if isinstance(v, int)} if found else {}


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _piece(data: int | bytes) -> Piece:
    if not isinstance(data, bytes):
        raise ValueError("a piece is no message")
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            score = float(struct.unpack("<f", value)[0])
        elif number == 3 and isinstance(value, int):
            kind = value
    if not 1 <= kind <= 6:
        raise ValueError(f"piece {text!r} has type {kind}")
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of every field of a message: an integer, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {at}, {len(data) - at} are left")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"an integer of over 64 bits at byte {at}")
