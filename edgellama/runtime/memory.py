"""Large memory from the system, zeroed, in pages of the size that suits its use.

NumPy asks for huge pages on its own, which makes whatever lies around a touched byte resident: right for
weights, which are read from end to end, wrong for caches and arenas, which are mostly not used.
"""

from __future__ import annotations

import mmap

import numpy as np

_HUGE_PAGE = 1 << 21


def huge_pages(nbytes: int) -> np.ndarray:
    """Return u8 (nbytes,) that is about to be filled: few faults, few address look-ups.

    Raises: OSError, MemoryError.
    """
    return _map(nbytes, _HUGE_PAGE)


def small_pages(nbytes: int) -> np.ndarray:
    """Return u8 (nbytes,) of which only what is touched becomes resident.

    Raises: OSError, MemoryError.
    """
    return _map(nbytes, mmap.PAGESIZE)


def _map(nbytes: int, page: int) -> np.ndarray:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return np.zeros(nbytes, np.uint8)
    # Shared memory, which is what mmap gives unasked, never has huge pages.
    memory = mmap.mmap(-1, nbytes + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE if page == _HUGE_PAGE else mmap.MADV_NOHUGEPAGE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % page
    return np.frombuffer(memory, np.uint8, nbytes, start)
