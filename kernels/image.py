"""From an ELF object to a flat image, and from images to memory that runs.

`flatten` lays out the sections of a relocatable object and resolves every reference, all of which lie
inside it: what is left is bytes that run at any page-aligned address. So a process that only runs
kernels needs no linker and no LLVM, which would cost 60-100 ms and 47 MB at every start.

Source: the ELF-64 object file format; System V ABI supplements for x86-64 and AArch64 (relocations).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from dataclasses import dataclass
from struct import iter_unpack, pack_into, unpack_from

PAGE = 4096
_ALLOCATED, _WRITABLE = 2, 1  # section flags
_SYMBOLS, _RELOCATIONS, _NO_BITS = 2, 4, 8  # section types


class ImageError(ValueError):
    """An object asks for something from outside, or for a relocation that is not known."""


# --- flattening -----------------------------------------------------------------------------------
@dataclass(slots=True)
class _Section:
    name: str
    kind: int
    flags: int
    offset: int
    nbytes: int
    link: int
    target: int
    alignment: int
    at: int = -1  # where it lies in the image


def _sections(elf: bytes) -> list[_Section]:
    (table,) = unpack_from("<Q", elf, 40)
    entry_nbytes, n_sections, names_index = unpack_from("<HHH", elf, 58)
    rows = [unpack_from("<IIQQQQIIQQ", elf, table + i * entry_nbytes) for i in range(n_sections)]
    names = rows[names_index][4]
    return [
        _Section(_text(elf, names + r[0]), r[1], r[2], r[4], r[5], r[6], r[7], r[8]) for r in rows
    ]


def _text(elf: bytes, at: int) -> str:
    return elf[at : elf.index(b"\0", at)].decode()


def flatten(elf: bytes, symbol: str) -> tuple[bytes, int]:
    """Return the image of a 64-bit little-endian object and where in it `symbol` begins.

    Raises: ImageError naming the symbol from outside or the relocation that cannot be resolved.
    """
    (machine,) = unpack_from("<H", elf, 18)
    sections = _sections(elf)
    end = 0
    for section in sections:
        if not section.flags & _ALLOCATED or section.name.startswith(".eh_frame"):
            continue
        if section.flags & _WRITABLE and section.nbytes:
            raise ImageError(f"section {section.name} is writable; kernels keep no state")
        section.at = -(-end // section.alignment) * section.alignment
        end = section.at + section.nbytes
    image = bytearray(end)
    for section in sections:
        if section.at >= 0 and section.kind != _NO_BITS:
            source = elf[section.offset : section.offset + section.nbytes]
            image[section.at : section.at + section.nbytes] = source

    (table,) = (section for section in sections if section.kind == _SYMBOLS)
    strings = sections[table.link].offset
    names: list[str] = []
    places: list[int | None] = []
    for name, _, _, index, value, _ in iter_unpack(
        "<IBBHQQ", elf[table.offset : table.offset + table.nbytes]
    ):
        inside = 0 < index < len(sections) and sections[index].at >= 0
        names.append(_text(elf, strings + name))
        places.append(sections[index].at + value if inside else None)
    for section in sections:
        if section.kind != _RELOCATIONS or sections[section.target].at < 0:
            continue
        rows = elf[section.offset : section.offset + section.nbytes]
        for offset, info, addend in iter_unpack("<QQq", rows):
            place = places[info >> 32]
            if place is None:
                raise ImageError(f"{names[info >> 32] or 'a section'} is needed from outside")
            at = sections[section.target].at + offset
            _RELOCATE[machine](image, at, info & 0xFFFFFFFF, place + addend)
    entry = places[names.index(symbol)]
    assert entry is not None, f"{symbol} is not defined"
    return bytes(image), entry


def _relocate_x86_64(image: bytearray, at: int, kind: int, value: int) -> None:
    if kind in (2, 4):  # PC32, PLT32
        pack_into("<i", image, at, value - at)
    elif kind == 24:  # PC64
        pack_into("<q", image, at, value - at)
    else:
        raise ImageError(f"x86-64 relocation {kind} is not known")


def _relocate_aarch64(image: bytearray, at: int, kind: int, value: int) -> None:
    distance = value - at
    if kind in (260, 261):  # PREL64, PREL32
        pack_into("<q" if kind == 260 else "<i", image, at, distance)
        return
    (word,) = unpack_from("<I", image, at)
    if kind in (274, 275):  # ADR_PREL_LO21, ADR_PREL_PG_HI21
        n = distance if kind == 274 else value // PAGE - at // PAGE
        word |= (n & 3) << 29 | (n >> 2 & 0x7FFFF) << 5
    elif kind in _LOW_BITS:  # the offset within a page, in units of the access
        word |= (value % PAGE >> _LOW_BITS[kind]) << 10
    elif kind in (282, 283):  # JUMP26, CALL26
        word |= distance >> 2 & 0x3FFFFFF
    elif kind == 280:  # CONDBR19
        word |= (distance >> 2 & 0x7FFFF) << 5
    elif kind == 279:  # TSTBR14
        word |= (distance >> 2 & 0x3FFF) << 5
    else:
        raise ImageError(f"AArch64 relocation {kind} is not known")
    pack_into("<I", image, at, word)


_LOW_BITS = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}  # ADD and LDST8 ... LDST128
_RELOCATE = {62: _relocate_x86_64, 183: _relocate_aarch64}


# --- running --------------------------------------------------------------------------------------
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
