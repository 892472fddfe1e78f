"""Files beside each other: a name that stays inside its folder, JSON with limits, an index of shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, shown
from edgellama.gguf.cursor import Part

from .checkpoint import SourceTensor

MAX_JSON_NBYTES = 1 << 26  # parsed, it may take twenty times as much


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file of `folder`.

    A link must stay in the folder too, or in the store of blobs that Hugging Face's cache keeps
    beside its snapshots.  Raises: ModelFileError.
    """
    if not name or name != Path(name).name or set(name) & set("/\\:\0") or name in (".", ".."):
        raise ModelFileError(
            f"{shown(name)} is named in {folder}; only plain names inside it are read"
        )
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve(strict=True)
    except (OSError, RuntimeError):  # missing, or links in a circle
        raise ModelFileError(f"{folder} has no {name}; it is needed to convert the model") from None
    stores = [p.parent / "blobs" for p in list(home.parents)[:2] if p.name == "snapshots"]
    if real.parent not in (home, *stores):
        raise ModelFileError(f"{path} is a link to a file outside its folder; put the file there")
    return path


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Return a JSON object: UTF-8, no key twice, no NaN, not too deep.  Raises: ModelFileError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {shown(key)} appears twice")
            found[key] = value
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise ModelFileError(f"{where} is no JSON to be read: it is nested too deep") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are among them
        raise ModelFileError(f"{where} is not sound JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{where} holds {shown(value)}; a JSON object is needed")
    return value


def read_file(path: Path) -> bytes:
    """Return all of a file that is not large.  Raises: ModelFileError."""
    part = Part(path)
    if part.size > MAX_JSON_NBYTES:
        raise ModelFileError(f"{path.name} has {part.size} bytes; {MAX_JSON_NBYTES} are allowed")
    data = np.empty(part.size, np.uint8)
    part.read(data, 0, "its end")
    return data.tobytes()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.  Raises: ModelFileError."""
    return parse_json(read_file(path), path.name)


def read_index(
    path: Path, read: Callable[[Path], dict[str, SourceTensor]]
) -> dict[str, SourceTensor]:
    """Return the tensors of every shard that an index (`weight_map`: tensor to file) names.

    Raises: ModelFileError when a shard is missing or outside the folder, or when what it holds is
    not what the index says.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(
            f"{path.name} has no weight_map, which says in what file a tensor lies"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ModelFileError(
                f"{path.name} puts {shown(name)} in {shown(file)}; a name is needed"
            )
    tensors: dict[str, SourceTensor] = {}
    home: dict[str, str] = {}
    for file in sorted(set(weight_map.values())):
        for name, tensor in read(inside(path.parent, file)).items():
            if name in tensors:
                raise ModelFileError(f"tensor {shown(name)} is in {home[name]} and in {file} too")
            tensors[name], home[name] = tensor, file
    for name, file in weight_map.items():
        if home.get(name) != file:
            seen = f"it is in {home[name]}" if name in home else "it is not there"
            raise ModelFileError(f"{path.name} puts {shown(name)} in {file}, but {seen}")
    return tensors
