"""From an ELF object to a flat image: bytes that run at any page-aligned address.

`flatten` lays out the sections of a relocatable object and resolves every reference, all of which lie
inside it. So a process that only runs kernels needs no linker and no LLVM, which would cost 60-100 ms
and 47 MB at every start; `image.py` loads what comes out.

Source: the ELF-64 object file format; System V ABI supplements for x86-64 and AArch64 (relocations).
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import iter_unpack, pack_into, unpack_from

from .image import PAGE

_ALLOCATED, _WRITABLE = 2, 1  # section flags
_SYMBOLS, _RELOCATIONS, _NO_BITS = 2, 4, 8  # section types


class LinkError(ValueError):
    """An object asks for something from outside, or for a relocation that is not known."""


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

    Raises: LinkError naming the symbol from outside or the relocation that cannot be resolved.
    """
    (machine,) = unpack_from("<H", elf, 18)
    sections = _sections(elf)
    end = 0
    for section in sections:
        if not section.flags & _ALLOCATED or section.name.startswith(".eh_frame"):
            continue
        if section.flags & _WRITABLE and section.nbytes:
            raise LinkError(f"section {section.name} is writable; kernels keep no state")
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
                raise LinkError(f"{names[info >> 32] or 'a section'} is needed from outside")
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
        raise LinkError(f"x86-64 relocation {kind} is not known")


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
        raise LinkError(f"AArch64 relocation {kind} is not known")
    pack_into("<I", image, at, word)


_LOW_BITS = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}  # ADD and LDST8 ... LDST128
_RELOCATE = {62: _relocate_x86_64, 183: _relocate_aarch64}
