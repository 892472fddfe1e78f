"""Session files: the tokens of a text, with the keys and values of its full pages.

    magic (24) | model (16) | cache (16) | KV type (8) | n_tokens u64
    tokens i32 (n_tokens,)
    of every layer: pages (n_kv_heads, n, page), the last n full ones, as many as the layer's window sees
    BLAKE2b of all before it (32)

`model` is of the metadata, the table of tensors and a block of each; `cache` of what else decides what a
page says: how positions rotate, and the layout of pages (`kernels/kv.py`).  A file is believed only when
all of it has been read and checked; numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgellama.errors import SessionError
from edgellama.gguf import open_gguf
from edgellama.gguf.new_file import NewFile
from edgellama.kernels.layout import PAGE

_MAGIC = b"edgellama session 1\n"
_HEADER = struct.Struct("<24s16s16s8sQ")
_DIGEST_NBYTES = 32


class Source(NamedTuple):
    """The file that a model was opened from, and how to know it again."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Source:
        """Note a file as it is now; its size is -1 where there is none, as of a synthetic model."""
        try:
            status = path.stat()
        except OSError:
            return cls(path, -1, 0)
        return cls(path, status.st_size, status.st_mtime_ns)


class Identity(NamedTuple):
    """What a session has to agree with."""

    model: bytes
    cache: bytes
    kv_type: str
    n_vocab: int
    n_ctx: int


def identify(source: Source, kv_type: str, n_vocab: int, n_ctx: int, *others: object) -> Identity:
    """Return the identity of an open model, whose file is looked at again.

    `others` is what else decides what pages say.  Raises: SessionError when the file is another one now.
    """
    now = Source.of(source.path)
    if now.size < 0:
        raise SessionError(
            f"{source.path}, the model, is no file; a session needs one to be known by"
        )
    if now != source:
        raise SessionError(f"{source.path} has changed since the model was opened; open it again")
    model = hashlib.blake2b(digest_size=16)
    with open_gguf(source.path) as gguf:
        for key, value in gguf.metadata.items():
            of_array = isinstance(value, np.ndarray)
            model.update(key.encode() + (value.tobytes() if of_array else repr(value).encode()))
        for name, info in gguf.tensors.items():
            model.update(repr((name, info.shape, info.type_name)).encode())
            n_blocks = info.nbytes // info.format.nbytes
            if n_blocks:
                block = np.empty(info.format.nbytes, np.uint8)
                gguf.bytes_of(name).read_into(block, n_blocks // 2 * info.format.nbytes)
                model.update(block.tobytes())
    cache = hashlib.blake2b(repr(others).encode(), digest_size=16)
    return Identity(model.digest(), cache.digest(), kv_type, n_vocab, n_ctx)


def _check(identity: Identity, name: str, header: bytes) -> int:
    """Check a file's header; return its number of tokens."""
    magic, model, cache, kv_type, n_tokens = _HEADER.unpack(header)
    if magic.rstrip(b"\0") != _MAGIC:
        raise SessionError(f"{name} is no session file, or one of another version of edgellama")
    if model != identity.model:
        raise SessionError(f"{name} is a session of another model; open the one it was saved with")
    if kv_type.rstrip(b"\0") != identity.kv_type.encode():
        raise SessionError(
            f"{name} has other keys and values than {identity.kv_type}; open the model with the kv_type "
            "it was saved with (--kv-type)"
        )
    if cache != identity.cache:
        raise SessionError(f"{name} was saved with another rotation of positions; save it anew")
    if not 0 < n_tokens <= identity.n_ctx:
        raise SessionError(
            f"{name} claims {n_tokens} tokens, and the context holds {identity.n_ctx}; open the model "
            "with a larger n_ctx (-c)"
        )
    return int(n_tokens)


def write_session(
    path: Path, identity: Identity, tokens: list[int], pages: list[np.ndarray]
) -> None:
    """Write a session, whole or not at all; `pages` is u8 (n_kv_heads, n, page) for every layer.

    Raises: SessionError, UsageError.
    """
    ids = np.array(tokens, "<i4").view(np.uint8)
    nbytes = _HEADER.size + ids.nbytes + sum(a.nbytes for a in pages) + _DIGEST_NBYTES
    try:
        new = NewFile(path, nbytes, force=True)
        try:
            header = _HEADER.pack(
                _MAGIC, identity.model, identity.cache, identity.kv_type.encode(), len(tokens)
            )
            digest = hashlib.blake2b(digest_size=_DIGEST_NBYTES)
            for part in (np.frombuffer(header, np.uint8), ids, *pages):
                digest.update(part)
                new.file.write(part.data)
            new.file.write(digest.digest())
            new.finish()
        finally:
            new.discard()
    except OSError as error:
        reason = error.strerror or str(error)
        raise SessionError(f"the session could not be written to {path}: {reason}") from None


def read_session(
    path: Path, identity: Identity, shapes_of: Callable[[int], list[tuple[int, int, int]]]
) -> tuple[list[int], list[np.ndarray]]:
    """Read and check a session; return what `write_session` was given.

    `shapes_of` returns the shapes of the pages of every layer of a text of n full pages.
    Raises: SessionError.
    """
    if path.exists() and not path.is_file():
        raise SessionError(f"{path} is no regular file; a session file is needed")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise SessionError(f"{path.name} has {size} bytes; it is no session file")
            n_tokens = _check(identity, path.name, header)
            shapes = shapes_of(n_tokens // PAGE)
            needed = sum(a * b * c for a, b, c in shapes) + 4 * n_tokens
            if size != _HEADER.size + needed + _DIGEST_NBYTES:
                raise SessionError(
                    f"{path.name} has {size} bytes, and {n_tokens} tokens take "
                    f"{_HEADER.size + needed + _DIGEST_NBYTES}; it is damaged: save it anew"
                )
            body = np.empty(needed, np.uint8)
            n_read = file.readinto(body)
            digest = file.read()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SessionError(f"{path} cannot be read: {reason}") from None
    expected = hashlib.blake2b(header, digest_size=_DIGEST_NBYTES)
    expected.update(body)
    if n_read != needed or digest != expected.digest():
        raise SessionError(f"{path.name} is damaged (its checksum is wrong); save it anew")
    tokens = body[: 4 * n_tokens].view("<i4").tolist()
    worst = [i for i in tokens if not 0 <= i < identity.n_vocab]
    if worst:
        raise SessionError(
            f"{path.name} has token id {worst[0]}; ids of this model are 0 to {identity.n_vocab - 1}"
        )
    ends = np.cumsum([4 * n_tokens, *(a * b * c for a, b, c in shapes)])
    pages = [
        body[start:stop].reshape(shape)
        for start, stop, shape in zip(ends, ends[1:], shapes, strict=False)
    ]
    return tokens, pages
