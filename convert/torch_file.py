"""Files of `torch.save`, without PyTorch: a zip of `data.pkl` and storages, or the stream of old.

    NAME/data.pkl   a pickle (`torch_pickle.py`); its tensors name storages
    NAME/byteorder  "little"
    NAME/data/KEY   the elements of a storage, never compressed

Before PyTorch 1.6: five pickles in a row (magic, version, system, the object, the keys), and then for
each key a count, i64, and the elements.  Nothing is unpacked: members are read where they lie.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError, shown
from edgellama.gguf.cursor import Part

from .checkpoint import SourceTensor
from .stored import ELEMENTS, StoredTensor
from .torch_pickle import PickledTensor, Storage, load

MAX_PICKLE_NBYTES = 1 << 25
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER_NBYTES = 30

Places = Callable[[Storage], tuple[int, int]]
"""Where the bytes of a storage begin, and how many there are."""


def read_torch(path: Path) -> dict[str, SourceTensor]:
    """Return the tensors of a file of `torch.save`.

    Raises: ModelFileError; UnsupportedModelError when it asks for more than tensors.
    """
    part = Part(path)
    magic = _bytes(part, 0, min(part.size, 4), "the magic")
    if magic[:2] == b"PK":
        content, place = _open_zip(part)
    elif magic[:1] == b"\x80":
        content, place = _open_stream(part)
    else:
        raise ModelFileError(f"{path.name} begins with {magic!r}; torch.save writes PK or a pickle")
    tensors: dict[str, SourceTensor] = {}
    for name, value in _state_dict(path, content).items():
        if isinstance(value, PickledTensor):
            tensors[name] = _tensor(part, name, value, place)
    return tensors


def _bytes(part: Part, at: int, nbytes: int, what: str) -> bytes:
    if at < 0 or nbytes > part.size - at:
        raise ModelFileError(f"{part.path.name}: {what} reaches past the end; the file is cut off")
    out = np.empty(nbytes, np.uint8)
    part.read(out, at, what)
    return out.tobytes()


def _state_dict(path: Path, content: Any) -> dict[str, Any]:
    """The dict of tensors: the content, or what training scripts keep beside their optimizer."""
    places = (
        [content, *(content.get(k) for k in ("state_dict", "model"))]
        if isinstance(content, dict)
        else []
    )
    for place in places:
        if isinstance(place, dict) and any(isinstance(v, PickledTensor) for v in place.values()):
            if not all(isinstance(name, str) for name in place):
                raise ModelFileError(f"{path.name}: a tensor has no name")
            return place
    raise ModelFileError(f"{path.name} holds no dict of tensors by name, which is needed")


def _tensor(part: Part, name: str, value: PickledTensor, place: Places) -> StoredTensor:
    what = f"{part.path.name}: tensor {shown(name)}"
    if value.dtype not in ELEMENTS:
        raise ModelFileError(f"{what} has no type")
    at, nbytes = place(value.storage)
    itemsize = ELEMENTS[value.dtype].itemsize
    strided = [(s, n) for n, s in zip(value.shape, value.strides, strict=True) if n > 1]
    last = value.offset + sum((n - 1) * stride for stride, n in strided)
    if prod(value.shape) and (last + 1) * itemsize > nbytes:
        raise ModelFileError(
            f"{what} reaches element {last} of storage {shown(value.storage.key)}, "
            f"which has {nbytes // itemsize}"
        )
    span = 1
    for stride, n in sorted(strided):
        if stride < span:
            raise UnsupportedModelError(
                f"{what} has shape {list(value.shape)} and strides {list(value.strides)}: elements "
                "repeat. Save a copy of it (.contiguous())"
            )
        span += (n - 1) * stride
    at += value.offset * itemsize
    return StoredTensor(part, name, value.dtype, value.shape, at, value.strides)


# --- the zip --------------------------------------------------------------------------------------
def _open_zip(part: Part) -> tuple[Any, Places]:
    name = part.path.name
    try:
        with zipfile.ZipFile(part.path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise ModelFileError(f"{name} is no sound zip: {error}; fetch it again") from None
    members = {info.filename: info for info in infos}
    pickles = [n for n in members if n == "data.pkl" or n.endswith("/data.pkl")]
    if len(pickles) != 1 or len(members) < len(infos):
        raise ModelFileError(
            f"{name} holds {len(pickles)} files data.pkl and {len(infos) - len(members)} names twice; "
            "torch.save writes one of each"
        )
    root = pickles[0].removesuffix("data.pkl")
    if sum(info.file_size for info in infos) > part.size:
        raise ModelFileError(
            f"{name}: its members are larger than the file; it is compressed or damaged"
        )

    def content(member: str, limit: int) -> bytes:
        at, nbytes = _member(part, members[member])
        if nbytes > limit:
            raise ModelFileError(f"{name}: {member} has {nbytes} bytes; {limit} are allowed")
        return _bytes(part, at, nbytes, member)

    if root + "byteorder" in members and content(root + "byteorder", 16) != b"little":
        raise UnsupportedModelError(f"{name} was written on a big-endian machine; save it anew")

    def place(storage: Storage) -> tuple[int, int]:
        member = f"{root}data/{storage.key}"
        if member not in members:
            raise ModelFileError(
                f"{name} has no {shown(member)}, where a tensor's elements should be"
            )
        at, nbytes = _member(part, members[member])
        return at, _checked(name, storage, nbytes)

    return load(content(pickles[0], MAX_PICKLE_NBYTES), f"{name}: {pickles[0]}").value, place


def _member(part: Part, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a member's bytes begin, and how many there are."""
    what = f"{part.path.name}: {shown(info.filename)}"
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ModelFileError(f"{what} is compressed or encrypted; torch.save stores plain bytes")
    header = _bytes(part, info.header_offset, _LOCAL_HEADER_NBYTES, shown(info.filename))
    signature, n_name, n_extra = struct.unpack("<4s22xHH", header)
    at = info.header_offset + _LOCAL_HEADER_NBYTES + n_name + n_extra
    if signature != b"PK\x03\x04" or info.compress_size != info.file_size:
        raise ModelFileError(f"{what} has no sound header in the zip; fetch the file again")
    if at + info.file_size > part.size:
        raise ModelFileError(f"{what} ends past the file's {part.size} bytes; it is cut off")
    return at, info.file_size


def _itemsize(dtype: str) -> int:
    return ELEMENTS[dtype].itemsize if dtype else 1


def _checked(name: str, storage: Storage, nbytes: int) -> int:
    """Bytes of a storage as the pickle has it, which must be there."""
    needed = storage.n_elements * _itemsize(storage.dtype)
    if needed > nbytes:
        raise ModelFileError(
            f"{name}: storage {shown(storage.key)} needs {needed} bytes; the file has {nbytes} of it"
        )
    return needed


# --- the stream -----------------------------------------------------------------------------------
def _open_stream(part: Part) -> tuple[Any, Places]:
    name = part.path.name
    data = _bytes(part, 0, min(part.size, MAX_PICKLE_NBYTES), "the pickles")
    magic = load(data, name)
    if magic.value != _LEGACY_MAGIC:
        raise UnsupportedModelError(
            f"{name} is a bare pickle, not a file of torch.save; save the model as safetensors"
        )
    version = load(data, name, magic.end)
    system = load(data, name, version.end).value
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnsupportedModelError(
            f"{name} was not written on a little-endian machine; save it anew"
        )
    content = load(data, name, load(data, name, version.end).end)
    keys, at, _ = load(data, name, content.end)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ModelFileError(f"{name} has no list of its storages")
    starts: dict[str, tuple[int, int]] = {}
    for key in keys:
        n = struct.unpack("<q", _bytes(part, at, 8, f"storage {shown(key)}"))[0]
        if key not in content.storages:
            raise ModelFileError(f"{name}: storage {shown(key)} belongs to no tensor")
        nbytes = n * _itemsize(content.storages[key])
        if n < 0 or nbytes > part.size - at - 8:
            raise ModelFileError(f"{name}: storage {shown(key)} claims {n} elements; it is cut off")
        starts[key] = (at + 8, nbytes)
        at += 8 + nbytes

    def place(storage: Storage) -> tuple[int, int]:
        if storage.key not in starts:
            raise ModelFileError(f"{name} has no storage {shown(storage.key)}")
        start, nbytes = starts[storage.key]
        return start, _checked(name, storage, nbytes)

    return content.value, place
