"""Flat images (`link.py` makes them) in memory that runs."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys

PAGE = 4096


class ExecutableMemory:
    """Images in memory, each at a page of its own, readable and executable but not writable.

    Raises: OSError where the system grants no such memory.
    """

    def __init__(self, images: list[bytes]) -> None:
        self.addresses: list[int] = []
        offsets = []
        nbytes = 0
        for image in images:
            offsets.append(nbytes)
            nbytes += -(-len(image) // PAGE) * PAGE
        content = bytearray(max(nbytes, PAGE))
        for offset, image in zip(offsets, images, strict=True):
            content[offset : offset + len(image)] = image
        base = _map_windows(content) if sys.platform == "win32" else self._map(content)
        self.addresses = [base + offset for offset in offsets]

    def _map(self, content: bytearray) -> int:
        library = ctypes.CDLL(None, use_errno=True)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        # Apple silicon hands out memory for code only under this flag, writable for one thread.
        jit = getattr(library, "pthread_jit_write_protect_np", None)
        if jit is not None:
            flags |= 0x800  # MAP_JIT
            writable |= mmap.PROT_EXEC
        self._memory = mmap.mmap(-1, len(content), flags=flags, prot=writable)
        self._pin = (ctypes.c_char * len(content)).from_buffer(self._memory)
        base = ctypes.addressof(self._pin)
        if jit is not None:
            jit(0)
        self._memory[:] = bytes(content)
        if jit is not None:
            jit(1)
            library.sys_icache_invalidate(ctypes.c_void_p(base), ctypes.c_size_t(len(content)))
            return base
        protection = mmap.PROT_READ | mmap.PROT_EXEC
        size = ctypes.c_size_t(len(content))
        if library.mprotect(ctypes.c_void_p(base), size, protection):
            raise OSError(ctypes.get_errno(), "the system grants no executable memory")
        with contextlib.suppress(OSError, AttributeError):  # of no effect on x86
            clear = ctypes.CDLL("libgcc_s.so.1")["__clear_cache"]
            clear(ctypes.c_void_p(base), ctypes.c_void_p(base + len(content)))
        return base


def _map_windows(content: bytearray) -> int:
    """Code stays until the process ends: a pack lives as long."""
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined, unused-ignore]
    kernel.VirtualAlloc.restype = ctypes.c_void_p
    size = ctypes.c_size_t(len(content))
    base = kernel.VirtualAlloc(None, size, 0x3000, 4)  # commit and reserve, read and write
    before = ctypes.c_uint32()
    if base:
        ctypes.memmove(base, bytes(content), len(content))
    if not base or not kernel.VirtualProtect(
        ctypes.c_void_p(base),
        size,
        0x20,
        ctypes.byref(before),  # read and execute
    ):
        raise OSError("the system grants no executable memory")
    kernel.FlushInstructionCache(kernel.GetCurrentProcess(), ctypes.c_void_p(base), size)
    return int(base)
