"""A model as it was published: its configuration, and its tensors by name, read a few rows at a time.

`open_checkpoint` looks at what is there and picks a reader, a file of this folder for each format.
Names and configuration stay as the checkpoint has them; what they mean is not decided here.

    kind          config                  names of tensors
    huggingface   config.json             model.layers.0.self_attn.q_proj.weight
    meta          params.json             layers.0.attention.wq.weight
    llama2c       the header of the file  as meta
    gguf          the metadata            blk.0.attn_q.weight
"""

from __future__ import annotations

import fnmatch
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError
from edgellama.gguf.cursor import Part


class SourceTensor(ABC):
    """A tensor of a checkpoint: `shape` with rows first, `nbytes` as it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def n_rows(self) -> int:
        """The length of the first axis; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows `start` to `stop`, f32, C-contiguous; nothing else is read or kept.

        Shapes: (stop - start, *shape[1:]); a scalar gives ().
        Raises: ModelFileError when the file does not give them.
        """
        stop = self.n_rows if stop is None else stop
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"rows {start} to {stop} of {self.name!r}, which has {self.n_rows}")
        if start == stop:
            return np.empty((0, *self.shape[1:]), np.float32)
        return self._read(start, stop)

    @abstractmethod
    def _read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, at least one, as `read` returns them."""


class Checkpoint:
    """What a converter sees of a model; `folder` holds the files beside it (tokenizer and so on)."""

    def __init__(
        self,
        kind: str,
        config: dict[str, Any],
        tensors: Mapping[str, SourceTensor],
        folder: Path | None,
    ) -> None:
        self.kind, self.config, self.tensors, self.folder = kind, config, tensors, folder

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; a tensor that somebody still holds stays good."""
        self.tensors = {}


# What a folder may hold, best first: safetensors before pickles, whole models before parts.
_LAYOUTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "*.safetensors.index.json",
    "*.safetensors",
)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a folder of Hugging Face or Meta, a file of llama2.c, a GGUF file, or a file of tensors.

    Raises: ModelFileError, and UnsupportedModelError for a quantization that is not read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / main_file(os.listdir(path), str(path))
    head = np.zeros(4, np.uint8)
    part = Part(path)
    part.read(head[: part.size], 0, "the first bytes")
    magic = head.tobytes()
    if magic == b"GGUF":
        from .gguf_source import open_gguf_source

        return open_gguf_source(path)
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        from .safetensors import read_safetensors

        return _with_config(path, read_safetensors)
    if path.name.endswith(".bin.index.json") or magic[:2] in (b"PK", b"\x80\x02"):
        from .torch_file import read_torch

        return _with_config(path, read_torch)
    if path.suffix == ".bin":
        from .llama2c import open_llama2c

        return open_llama2c(path)
    raise ModelFileError(
        f"{path.name} begins with {magic!r}; edgellama converts folders with config.json, "
        ".safetensors, pytorch_model.bin, consolidated.00.pth, .gguf, and .bin of llama2.c"
    )


def main_file(names: Iterable[str], where: str) -> str:
    """Return which of the files of a folder is read: the weights, or the index of their shards.

    Raises: ModelFileError when there is none, or when none is the one.
    """
    names = sorted(name for name in names if not name.startswith("adapter_"))
    for pattern in _LAYOUTS:
        found = fnmatch.filter(names, pattern)
        if len(found) > 1:
            raise ModelFileError(
                f"{where} holds {len(found)} files like {found[0]} and no "
                "model.safetensors.index.json, which tells what belongs together"
            )
        if found:
            return found[0]
    raise ModelFileError(
        f"{where} holds no checkpoint; one of these is needed: {', '.join(_LAYOUTS)}"
    )


def _with_config(path: Path, read: Callable[[Path], dict[str, SourceTensor]]) -> Checkpoint:
    """Tensors of `path` together with the configuration beside it."""
    from .folder import inside, read_index, read_json
    from .meta import read_meta
    from .quantized import as_floats

    folder = path.parent
    if path.name.startswith("consolidated."):
        config = read_json(inside(folder, "params.json"))
        return Checkpoint("meta", config, read_meta(path, config, read), folder)
    config = read_json(inside(folder, "config.json"))
    tensors = read_index(path, read) if path.name.endswith(".index.json") else read(path)
    return Checkpoint("huggingface", config, as_floats(tensors, config, folder), folder)
