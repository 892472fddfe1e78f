"""Files made of other files: split, merged, with other metadata, compared tensor by tensor.

Values that are not changed are copied as they stand, with their type.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgellama.errors import ModelFileError, UsageError, shown
from edgellama.gguf import GGUFFile, RawValue, TensorInfo, open_gguf
from edgellama.gguf.cursor import ARRAY, BOOL, SCALARS, STRING
from edgellama.gguf.new_file import check_absent
from edgellama.gguf.writer import GGUFWriter, NewTensor
from edgellama.progress import Advance, progress

_PIECE_NBYTES = 1 << 25
_LAYOUT_KEYS = ("split.no", "split.count", "split.tensors.count", "general.alignment")
"""What says how a file is laid out, and so holds for that file alone."""
KINDS = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": BOOL,
         "str": STRING, "u64": 10, "i64": 11, "f64": 12}  # fmt: skip
"""Value types of metadata by the names that users give."""


def raw_metadata(gguf: GGUFFile) -> dict[str, Any]:
    """All metadata as they stand in the file, without what says how it is laid out."""
    return {key: gguf.raw_value(key) for key in gguf.metadata if key not in _LAYOUT_KEYS}


def new_tensor(info: TensorInfo) -> NewTensor:
    """The same tensor in another file."""
    return NewTensor(info.name, info.shape, info.format)


def tensor_bytes(gguf: GGUFFile, name: str) -> Iterator[np.ndarray]:
    """Yield the bytes of a tensor, u8, in pieces."""
    info = gguf.tensors[name]
    reader = gguf.bytes_of(name)
    step = max(_PIECE_NBYTES // info.format.nbytes, 1) * info.format.nbytes
    for at in range(0, info.nbytes, step):
        out = np.empty(min(step, info.nbytes - at), np.uint8)
        reader.read_into(out, at)
        yield out


def read_rows(gguf: GGUFFile, info: TensorInfo, start: int, n: int) -> np.ndarray:
    """Return the bytes of some rows of a tensor, u8 (n, row bytes)."""
    row_nbytes = info.format.row_nbytes(info.shape[0])
    rows = np.empty((n, row_nbytes), np.uint8)
    gguf.bytes_of(info.name).read_into(rows.reshape(-1), start * row_nbytes)
    return rows


def _copy(gguf: GGUFFile, names: Iterable[str], writer: GGUFWriter, advance: Advance) -> None:
    for name in names:
        for data in tensor_bytes(gguf, name):
            writer.append(data)
            advance(data.nbytes, name)


# --- split and merge ------------------------------------------------------------------------------
def split(
    source: Path, prefix: str, *, max_nbytes: int = 0, max_tensors: int = 0, force: bool = False
) -> list[Path]:
    """Cut a file into PREFIX-00001-of-0000N.gguf, each of at most so many bytes or tensors.

    All metadata are in the first part.  Raises: UsageError, ModelFileError, OSError.
    """
    with open_gguf(source) as gguf:
        groups = _groups(list(gguf.tensors.values()), max_nbytes, max_tensors)
        paths = [
            Path(f"{prefix}-{i:05d}-of-{len(groups):05d}.gguf") for i in range(1, len(groups) + 1)
        ]
        for path in paths:
            check_absent(path, force, gguf.paths)
        done: list[Path] = []
        try:
            with progress("split", sum(t.nbytes for t in gguf.tensors.values())) as advance:
                for number, (path, group) in enumerate(zip(paths, groups, strict=True)):
                    metadata = raw_metadata(gguf) if number == 0 else {}
                    counts = struct.pack("<IH", KINDS["u16"], len(groups))
                    metadata |= {
                        "split.no": RawValue(struct.pack("<IH", KINDS["u16"], number)),
                        "split.count": RawValue(counts),
                        "split.tensors.count": RawValue(
                            struct.pack("<Ii", KINDS["i32"], len(gguf.tensors))
                        ),
                    }
                    with GGUFWriter(path, metadata, list(map(new_tensor, group)), force=force) as w:
                        _copy(gguf, [t.name for t in group], w, advance)
                    done.append(path)
        except BaseException:  # some of the parts are worth nothing
            for path in done:
                path.unlink(missing_ok=True)
            raise
    return paths


def _groups(tensors: list[TensorInfo], max_nbytes: int, max_tensors: int) -> list[list[TensorInfo]]:
    groups: list[list[TensorInfo]] = [[]]
    nbytes = 0
    for tensor in tensors:
        full = (max_nbytes and nbytes + tensor.nbytes > max_nbytes) or (
            max_tensors and len(groups[-1]) == max_tensors
        )
        if groups[-1] and full:
            groups.append([])
            nbytes = 0
        groups[-1].append(tensor)
        nbytes += tensor.nbytes
    return groups


def merge(source: Path, out: Path, *, force: bool = False) -> None:
    """Join the parts of a split file, of which `source` is the first; raises as `rewrite`."""
    rewrite(source, out, {}, (), force=force)


# --- metadata -------------------------------------------------------------------------------------
def rewrite(
    source: Path, out: Path, changes: Mapping[str, Any], removed: Iterable[str], *,
    force: bool = False,
) -> None:  # fmt: skip
    """Write `source` to `out`, which may be the same, with some metadata changed, added or removed.

    Raises: UsageError for a key to remove that is not there, or one that is not to be set;
    ModelFileError; OSError.
    """
    for key in _LAYOUT_KEYS:
        if key in changes:
            raise UsageError(f"{key} follows from how the file is written and cannot be set")
    with open_gguf(source) as gguf:
        check_absent(out, force, gguf.paths if len(gguf.paths) > 1 else ())
        metadata = raw_metadata(gguf)
        for key in removed:
            if key not in metadata:
                raise UsageError(f"{source.name} has no key {key!r} to remove")
            del metadata[key]
        tensors = list(map(new_tensor, gguf.tensors.values()))
        with (
            GGUFWriter(out, metadata | dict(changes), tensors, force=force) as writer,
            progress("write", sum(t.nbytes for t in tensors)) as advance,
        ):
            _copy(gguf, gguf.tensors, writer, advance)
            gguf.close()  # Windows replaces no file that is open


def parse_value(text: str, kind: str = "", old: RawValue | None = None) -> Any:
    """Return a value that a user typed: of type `kind`, else of the old value's type, else guessed.

    Raises: UsageError when the text is no value of that type.
    """
    if not kind and old is not None:
        number = int.from_bytes(old.data[:4], "little")
        kind = next((name for name, k in KINDS.items() if k == number), "")
        if number == ARRAY:
            raise UsageError("the key holds an array, which can be removed but not set")
    if not kind:
        return _guess(text)
    if kind not in KINDS:
        raise UsageError(f"{kind!r} is no value type; types: {', '.join(KINDS)}")
    if kind == "str":
        return text
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        code = SCALARS[KINDS[kind]][0]
        value = float(text) if kind[0] == "f" else int(text, 0)
        return RawValue(struct.pack("<I", KINDS[kind]) + struct.pack(code, value))
    except (ValueError, KeyError, OverflowError, struct.error):
        raise UsageError(f"{shown(text)} is no {kind}; name another type with --type") from None


def _guess(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


# --- comparison -----------------------------------------------------------------------------------
class Difference(NamedTuple):
    """One thing in which two files differ: a metadata key or a tensor, and how."""

    name: str
    what: str


Decode = Callable[[str, np.ndarray], np.ndarray]


def differences(one: GGUFFile, other: GGUFFile, decode: Decode) -> Iterator[Difference]:
    """Yield what differs; `decode(format, u8 rows)` gives the weights of tensors as f32."""
    for key in sorted(one.metadata.keys() | other.metadata.keys()):
        if key not in one.metadata or key not in other.metadata:
            yield Difference(key, f"only in {(one if key in one.metadata else other).path.name}")
        elif one.raw_value(key) != other.raw_value(key):
            yield Difference(key, f"{_brief(one.metadata[key])} -> {_brief(other.metadata[key])}")
    for name in sorted(one.tensors.keys() | other.tensors.keys()):
        if name not in one.tensors or name not in other.tensors:
            yield Difference(name, f"only in {(one if name in one.tensors else other).path.name}")
            continue
        a, b = one.tensors[name], other.tensors[name]
        if a.shape != b.shape:
            yield Difference(name, f"shape {list(a.shape)} -> {list(b.shape)}")
            continue
        what = f"{a.type_name} -> {b.type_name}" if a.format is not b.format else ""
        error = _relative_error(one, other, name, decode)
        if error or what:
            yield Difference(name, f"{what or a.type_name}, relative RMS difference {error:.3g}")


def _brief(value: Any) -> str:
    if isinstance(value, np.ndarray | list):
        return f"an array of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _relative_error(one: GGUFFile, other: GGUFFile, name: str, decode: Decode) -> float:
    """sqrt(sum (a - b)^2 / sum a^2) over the weights of a tensor, a few rows at a time."""
    infos = (one.tensors[name], other.tensors[name])
    for info in infos:
        if not info.format.packed:
            raise ModelFileError(f"{name} is of type {info.type_name}, which is not decoded")
    n_cols, n_rows = infos[0].shape[0], prod(infos[0].shape[1:])
    step = max(1, _PIECE_NBYTES // (4 * max(n_cols, 1)))
    error = total = 0.0
    for start in range(0, n_rows if n_cols else 0, step):
        n = min(step, n_rows - start)
        a, b = (read_rows(gguf, i, start, n) for gguf, i in zip((one, other), infos, strict=True))
        x = decode(infos[0].type_name, a).astype(np.float64)
        total += float(np.square(x).sum())
        if infos[0].format is not infos[1].format or (a != b).any():
            error += float(np.square(x - decode(infos[1].type_name, b)).sum())
    return float(np.sqrt(error / total)) if total else float(error > 0)
