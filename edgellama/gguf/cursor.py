"""Bytes of a file that is not to be trusted, and the values a GGUF header is made of.

Every count and length is a Python integer (no wrap-around) and is checked against what is left of the
file, and against a budget, before anything is allocated.  What the values mean: `reader.py`.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError

# A list of two-letter strings takes six times its bytes in the file: this bounds the memory for it.
MAX_HEADER_NBYTES = 1 << 26
_FIRST_READ = 1 << 18

_SCALARS: dict[int, tuple[str, str]] = {  # value type: struct code, NumPy dtype
    0: ("B", "u1"),
    1: ("b", "i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("B", "u1"),  # bool
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class Part:
    """An open file. It is read, never mapped: touching a mapped page that another process has cut
    off kills this one (SIGBUS), and no check before it can be in time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer.
            handle = os.open(
                path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            )
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ModelFileError(f"{path} cannot be opened: {reason}") from None
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            os.close(handle)
            raise ModelFileError(f"{path} is not a regular file; a model file is needed")
        self.size = status.st_size
        self._file = io.FileIO(handle)
        self._lock = threading.Lock()  # one position for all threads

    def read(self, out: np.ndarray, start: int, what: str) -> None:
        """Fill `out` u8 from byte `start` on; the caller has checked that the file has so many."""
        done = 0
        with self._lock:
            try:
                self._file.seek(start)
                while done < len(out) and (n := self._file.readinto(memoryview(out)[done:])):
                    done += n
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise ModelFileError(
                    f"{self.path.name} cannot be read: {reason} (byte {start + done})"
                ) from None
        if done < len(out):
            now = os.fstat(self._file.fileno()).st_size
            raise ModelFileError(
                f"{self.path.name} shrank from {self.size} to {now} bytes after it was opened; "
                f"{what} is gone. Fetch the file again"
            )

    def fileno(self) -> int:
        """The descriptor, good as long as this object."""
        return self._file.fileno()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class Cursor:
    """A position in the header, which is read piece by piece; every read is checked."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.data = b""
        self.at = 0

    def fail(self, what: str, at: int | None = None) -> ModelFileError:
        return ModelFileError(
            f"{self.part.path.name}: {what} (byte {self.at if at is None else at})"
        )

    def need(self, nbytes: int, what: str) -> int:
        """Take `nbytes` and return where they begin."""
        start, end = self.at, self.at + nbytes
        if end > self.part.size:
            raise self.fail(
                f"{what} needs {nbytes} bytes but {self.part.size - start} are left; "
                "the file is cut off or damaged"
            )
        if end > MAX_HEADER_NBYTES:
            raise self.fail(
                f"{what} needs {nbytes} bytes; all metadata may have {MAX_HEADER_NBYTES} bytes"
            )
        if end > len(self.data):  # twice as much each time, so that copying stays linear
            size = max(end, 2 * len(self.data), _FIRST_READ)
            size = min(size, self.part.size, MAX_HEADER_NBYTES)
            more = np.empty(size - len(self.data), np.uint8)
            self.part.read(more, len(self.data), what)
            self.data += more.tobytes()
        self.at = end
        return start

    def u32(self, what: str) -> int:
        at = self.need(4, what)  # before `self.data` is looked at, which it may replace
        return int(_U32.unpack_from(self.data, at)[0])

    def u64(self, what: str) -> int:
        at = self.need(8, what)
        return int(_U64.unpack_from(self.data, at)[0])

    def string(self, what: str, limit: int = MAX_HEADER_NBYTES) -> str:
        at = self.at
        length = self.u64(what)
        if length > limit:
            raise self.fail(f"{what} claims {length} bytes; at most {limit} are allowed", at)
        start = self.need(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8", at) from None

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise self.fail(f"{what} has value type {kind}; GGUF defines 0 to 12", self.at - 4)
        code = _SCALARS[kind][0]
        at = self.need(struct.calcsize(code), what)
        value = struct.unpack_from(code, self.data, at)[0]
        if kind == _BOOL:
            if value > 1:
                raise self.fail(f"{what} is a bool with value {value}; it must be 0 or 1", at)
            return bool(value)
        return value

    def array(self, what: str) -> Any:
        at = self.at
        kind = self.u32(what)
        count = self.u64(what)
        if kind == _ARRAY:
            raise self.fail(f"{what} is an array of arrays, which is not supported", at)
        if kind == _STRING:
            return self.strings(count, what)
        if kind not in _SCALARS:
            raise self.fail(f"{what} has element type {kind}; GGUF defines 0 to 12", at)
        dtype = np.dtype(_SCALARS[kind][1])
        start = self.need(count * dtype.itemsize, what)
        values = np.frombuffer(self.data, dtype, count, start)
        if kind == _BOOL:
            if (values > 1).any():
                raise self.fail(f"{what} is an array of bools with a value other than 0 and 1", at)
            return values.astype(bool)
        return values.copy()

    def strings(self, count: int, what: str) -> list[str]:
        """Many strings, fast: tokens of a vocabulary. Invalid UTF-8 is replaced, never refused."""
        data, loaded, at = self.data, len(self.data), self.at
        unpack = _U64.unpack_from
        out: list[str] = []
        append = out.append
        for i in range(count):
            if at + 8 > loaded:
                self.at = at
                self.need(8, f"{what}[{i}]")
                data, loaded = self.data, len(self.data)
            start = at + 8
            at = start + unpack(data, at)[0]
            if at > loaded:
                self.at = start
                self.need(at - start, f"{what}[{i}]")
                data, loaded = self.data, len(self.data)
            append(data[start:at].decode("utf-8", "replace"))
        self.at = at
        return out
