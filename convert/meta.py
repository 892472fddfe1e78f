"""Meta's shards: `consolidated.00.pth`, `.01.pth` ... hold a slice of every matrix each.

Matrices are cut by rows where a layer widens and by columns where it narrows again; Llama 1 and 2 cut
the embedding by columns, Llama 3 by rows.  Norms are in every shard.
Source: `llama/model.py` of meta-llama/llama and meta-llama/llama3.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError, shown

from .checkpoint import SourceTensor

_LAYER = r"layers\.\d+\."
_CUTS: tuple[tuple[str, int | None], ...] = (  # pattern of names, axis
    (_LAYER + r"attention\.w[qkv]\.weight", 0),
    (_LAYER + r"feed_forward\.w[13]\.weight", 0),
    (r"output\.weight", 0),
    (_LAYER + r"attention\.wo\.weight", 1),
    (_LAYER + r"feed_forward\.w2\.weight", 1),
    (r"norm\.weight|" + _LAYER + r"(attention|ffn)_norm\.weight|rope\.freqs", None),
)


class JoinedTensor(SourceTensor):
    """Tensors side by side along an axis, 0 or 1."""

    def __init__(self, parts: list[SourceTensor], axis: int) -> None:
        first = parts[0]
        self.parts, self.axis = parts, axis
        self.name, self.dtype = first.name, first.dtype
        shape = list(first.shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        self.shape = tuple(shape)
        self.nbytes = sum(part.nbytes for part in parts)

    def _read(self, start: int, stop: int) -> np.ndarray:
        if self.axis == 1:
            return np.concatenate([part.read(start, stop) for part in self.parts], axis=1)
        rows, first = [], 0
        for part in self.parts:
            a, b = max(start - first, 0), min(stop - first, part.n_rows)
            if a < b:
                rows.append(part.read(a, b))
            first += part.n_rows
        return np.concatenate(rows)


def read_meta(
    path: Path, config: dict[str, Any], read: Callable[[Path], dict[str, SourceTensor]]
) -> dict[str, SourceTensor]:
    """Return the tensors of `path`, or if it is consolidated.00.pth those of all shards, joined.

    `config` is params.json.  Raises: ModelFileError when a shard is missing or does not fit.
    """
    paths = [path]
    if path.name == "consolidated.00.pth":
        paths = sorted(path.parent.glob("consolidated.[0-9][0-9].pth"))
    names = [f"consolidated.{i:02d}.pth" for i in range(len(paths))]
    if len(paths) > 1 and names != [p.name for p in paths]:
        missing = next(name for name in names if not (path.parent / name).exists())
        raise ModelFileError(f"{path.parent} has no {missing}; all shards are needed")
    shards = [read(p) for p in paths]
    if len(shards) == 1:
        return shards[0]
    for shard, shard_path in zip(shards, paths, strict=True):
        if odd := set(shard) ^ set(shards[0]):
            raise ModelFileError(
                f"{shard_path.name} and {path.name} are not of one model: only one has {shown(min(odd))}"
            )
    return {name: _join([shard[name] for shard in shards], config, path) for name in shards[0]}


def _join(parts: list[SourceTensor], config: dict[str, Any], path: Path) -> SourceTensor:
    name, shape = parts[0].name, parts[0].shape
    if name == "tok_embeddings.weight":
        axis: int | None = 0 if shape[-1:] == (config.get("dim"),) else 1
    else:
        axes = [axis for pattern, axis in _CUTS if re.fullmatch(pattern, name)]
        if not axes:
            raise UnsupportedModelError(
                f"{path.name}: how the shards of {shown(name)} are joined is not known; "
                "use the model's safetensors"
            )
        axis = axes[0]
    if any(part.shape != shape or part.dtype != parts[0].dtype for part in parts):
        raise ModelFileError(
            f"{path.name}: {shown(name)} has another shape or type in another shard"
        )
    if axis is None:
        return parts[0]
    if len(shape) != 2:
        raise ModelFileError(
            f"{path.name}: {shown(name)} has shape {list(shape)}; a matrix is needed"
        )
    return JoinedTensor(parts, axis)
