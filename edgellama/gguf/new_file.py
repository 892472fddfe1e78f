"""A file that gets its name when it is whole: until then it lies beside it, hidden, and is locked.

What a killed process left is removed by the next one that writes the same file.
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from edgellama.errors import UsageError


class NewFile:
    """Opens the hidden file; `finish` gives it its name, `discard` leaves nothing of it.

    Raises: UsageError as `check_absent`, and where there is no such folder; OSError when `nbytes` are
    more than the disk has.
    """

    def __init__(self, path: Path, nbytes: int = 0, *, force: bool = False) -> None:
        check_absent(path, force)
        self.path, self._force = path, force
        if not path.parent.is_dir():
            raise UsageError(f"{path.parent} is no folder; make it, or write {path.name} elsewhere")
        # Names have 255 bytes at most.
        stem = f".{path.name.encode(errors='replace')[:200].decode(errors='ignore')}."
        _remove_stale(path.parent, stem)
        free = shutil.disk_usage(path.parent).free
        if nbytes > free:
            raise OSError(
                errno.ENOSPC,
                f"{path} needs {nbytes / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; make room, or "
                "write to another disk",
            )
        self._temporary = path.with_name(f"{stem}{os.getpid()}.part")
        # A signal's exception may come before anybody has hold of this.
        atexit.register(self.discard)
        self.file = _open(self._temporary, path)
        _lock(self.file)

    def finish(self) -> None:
        """Give the file its name, once all of it is on the disk."""
        self.sync()
        check_absent(self.path, self._force)
        if sys.platform == "win32":
            self.file.close()  # an open file cannot be renamed; elsewhere the lock is to last
        os.replace(self._temporary, self.path)

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def discard(self) -> None:
        """Close the file, and delete it if it has no name yet."""
        # Closing writes what is buffered, which fails again on a full disk.
        with suppress(OSError, AttributeError):
            self.file.close()
        self._temporary.unlink(missing_ok=True)
        atexit.unregister(self.discard)


def _open(hidden: Path, path: Path) -> IO[bytes]:
    try:
        return open(hidden, "wb")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(error.errno, f"{path} cannot be written: {reason}") from None


def check_absent(path: Path, force: bool, sources: Iterable[Path] = ()) -> None:
    """Refuse to overwrite a file without being told to, and one of the `sources` even so.

    Raises: UsageError.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if not path.exists():
        return
    if not path.is_file():
        raise UsageError(f"{path} is a device or a pipe; a regular file is needed")
    if any(source.exists() and path.samefile(source) for source in sources):
        raise UsageError(f"{path} is a file to be read; give the new one another name")
    if not force:
        raise UsageError(f"{path} exists; give another name, or --force to overwrite it")


def _remove_stale(folder: Path, stem: str) -> None:
    hidden = re.compile(re.escape(stem) + r"\d+\.part")
    for name in filter(hidden.fullmatch, os.listdir(folder)):
        with suppress(OSError):  # Windows deletes no file that is open; elsewhere a lock tells
            with open(folder / name, "rb") as file:
                held = not _lock(file)
            if not held:
                os.unlink(folder / name)


def _lock(file: IO[bytes]) -> bool:
    """Hold a file until it is closed; False when another process may do so."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        return False
    return True
