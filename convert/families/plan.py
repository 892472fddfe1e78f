"""What a converted model will hold: metadata, and tensors that are read from a checkpoint row by row.

A `TensorMap` hands out the tensors of a checkpoint as `Rows`, checks their shapes, and keeps count: at
the end every one of them has been used or was named as one to leave out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError, shown

Read = Callable[[int, int], np.ndarray]
"""(start, stop) -> f32 (stop - start, ...): some rows of a tensor."""


class SourceTensor(Protocol):
    """A tensor of a checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop`, f32."""


class Checkpoint(Protocol):
    """A published model."""

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds, or params.json."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Tensors by name."""


class PlannedTensor(NamedTuple):
    """A tensor of the GGUF file: `shape` as NumPy has it (rows, columns), `sources` as they are read."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    read: Read


class Plan(NamedTuple):
    """A GGUF file without its tokenizer; `metadata` is without `general.architecture`."""

    architecture: str
    metadata: dict[str, Any]
    tensors: list[PlannedTensor]


class Rows(NamedTuple):
    """Rows on their way from a checkpoint; each method returns them changed."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    read: Read

    def plus(self, x: float) -> Rows:
        """Add `x` to every number."""
        return self._replace(read=lambda start, stop: self.read(start, stop) + np.float32(x))

    def heads(self, order: Sequence[int], head_size: int) -> Rows:
        """Take only some heads, in this order; only heads that are asked for are read."""

        def read(start: int, stop: int) -> np.ndarray:
            parts = []
            while start < stop:
                head, row = divmod(start, head_size)
                n = min(head_size - row, stop - start)
                at = order[head] * head_size + row
                parts.append(self.read(at, at + n))
                start += n
            return np.concatenate(parts) if parts else self.read(0, 0)

        return self._replace(shape=(len(order) * head_size, *self.shape[1:]), read=read)

    def interleaved(self, head_size: int) -> Rows:
        """Reorder the rows of each head from rope on halves to rope on neighbours; reads whole heads.

        Row i of the first half becomes row 2 i, row i of the second half row 2 i + 1.
        """

        def read(start: int, stop: int) -> np.ndarray:
            first = start // head_size * head_size
            rows = self.read(first, min(-(-stop // head_size) * head_size, self.shape[0]))
            halves = rows.reshape(
                -1, 2, head_size // 2, *rows.shape[1:]
            )  # (heads, half, pair, ...)
            rows = halves.swapaxes(1, 2).reshape(rows.shape)
            return np.ascontiguousarray(rows[start - first : stop - first])

        return self._replace(read=read)


def stacked(parts: Sequence[Rows]) -> Rows:
    """Return vectors (n,) as the rows of a matrix (parts, n)."""
    (n,) = parts[0].shape

    def read(start: int, stop: int) -> np.ndarray:
        rows = [part.read(0, n) for part in parts[start:stop]]
        return np.stack(rows) if rows else np.zeros((0, n), np.float32)

    return Rows(tuple(s for part in parts for s in part.sources), (len(parts), n), read)


class TensorMap:
    """The tensors of a checkpoint on one side, those of the GGUF file on the other."""

    def __init__(self, tensors: Mapping[str, SourceTensor], prefixes: Sequence[str]) -> None:
        """`prefixes`: what may stand before the names of the language model, the likeliest first."""
        self._tensors = tensors
        self._unused = set(tensors)
        self.planned: list[PlannedTensor] = []
        found = (p for p in prefixes if any(n.startswith(p + "layers.0.") for n in tensors))
        self.prefix = next(found, prefixes[0])

    def get(self, name: str, shape: tuple[int, ...]) -> Rows:
        """Return a tensor, which must be there in this shape; `name` is without the prefix.

        Raises: ModelFileError.
        """
        return self.get_as(self.prefix + name, shape)

    def get_as(self, name: str, shape: tuple[int, ...]) -> Rows:
        """Return a tensor whose name has no prefix."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"tensor {name} is missing from the checkpoint")
        if tuple(tensor.shape) != shape:
            raise ModelFileError(
                f"tensor {name} has shape {list(tensor.shape)}; config.json needs {list(shape)}"
            )
        self._unused.discard(name)
        return Rows((name,), shape, tensor.read)

    def put(self, name: str, rows: Rows) -> None:
        """Plan a tensor of the GGUF file."""
        self.planned.append(PlannedTensor(name, rows.shape, rows.sources, rows.read))

    def put_values(self, name: str, values: np.ndarray) -> None:
        """Plan a tensor f32 (n,) that follows from config.json."""
        values = np.asarray(values, np.float32)
        self.put(name, Rows((), values.shape, lambda start, stop: values[start:stop]))

    def finish(self, droppable: Sequence[str]) -> list[PlannedTensor]:
        """Return what was planned once every tensor was used or matches a pattern of `droppable`.

        Raises: UnsupportedModelError naming a tensor that nobody used.
        """
        pattern = re.compile("|".join(droppable))
        unused = sorted(name for name in self._unused if not pattern.fullmatch(name))
        if unused:
            raise UnsupportedModelError(
                f"{len(unused)} tensors have no place in a model of this kind, the first being "
                f"{shown(unused[0])}; leaving them out would change every answer"
            )
        return self.planned
