"""Tensors to a GGUF file, a few rows at a time: read, quantize on all cores, write.

While one piece is quantized the next is read and the ones before it are written; memory holds a few
pieces, whatever the size of the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgellama.errors import ModelFileError
from edgellama.gguf.writer import GGUFWriter, NewTensor
from edgellama.kernels.blocks import BlockFormat
from edgellama.progress import progress

from .encoder import Encoder

PIECE_NBYTES = 1 << 25
"""Bytes of f32 rows that are worked on at a time."""
_AHEAD = 2  # pieces that wait to be written
_SYNC_NBYTES = 1 << 26  # left to the end, it would take as long as half the encoding


class Source(NamedTuple):
    """A tensor to be written: what it is, and how to get its rows."""

    tensor: NewTensor  # in the format of its source
    read: Callable[[int, int], np.ndarray]
    """Rows start to stop: f32 (n, n_cols), or u8 (n, row bytes) in the tensor's format."""


class TensorReport(NamedTuple):
    """What became of a tensor; errors are those of its weights, or None where it was copied."""

    name: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    nbytes: int
    mean_square: float | None = None  # of the weights
    squared_error: float | None = None  # mean, weighted by importance where there is some


def write_model(
    path: Path,
    metadata: Mapping[str, Any],
    sources: Sequence[Source],
    formats: Sequence[BlockFormat],
    encoder: Encoder,
    *,
    importance: Mapping[str, np.ndarray] | None = None,
    measure: bool = False,
    force: bool = False,
) -> list[TensorReport]:
    """Write all tensors in the given formats; `measure` decodes them again to find the errors.

    Raises: ModelFileError for weights that are not finite; UsageError and OSError as `GGUFWriter`.
    """
    targets = [s.tensor._replace(format=f) for s, f in zip(sources, formats, strict=True)]
    encoder.prepare({s.tensor.format.name for s in sources} | {t.format.name for t in targets})
    reports = []
    with (
        GGUFWriter(path, metadata, targets, force=force) as writer,
        progress("convert", sum(t.nbytes for t in targets)) as advance,
        _Behind(writer) as out,
    ):
        for source, target in zip(sources, targets, strict=True):
            advance(0, target.name)
            weights = (importance or {}).get(target.name)
            squares = _Squares()
            for data in _pieces(source, target.format, encoder, weights, squares, measure):
                out.append(data)
                advance(data.nbytes, target.name)
            reports.append(
                TensorReport(
                    name=target.name,
                    shape=target.shape,
                    source_type=source.tensor.format.name,
                    type=target.format.name,
                    nbytes=target.nbytes,
                    mean_square=squares.mean(squares.weights),
                    squared_error=squares.mean(squares.errors),
                )
            )
    return reports


class _Behind:
    """Appends to a file in a thread of its own, and puts it on the disk on the way.

    What is appended waits where the disk is slow, and errors are raised then, or at the end.
    """

    def __init__(self, writer: GGUFWriter) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, "write")
        self._waiting: deque[Future[None]] = deque()
        self._unsynced = 0

    def __enter__(self) -> _Behind:
        return self

    def append(self, data: np.ndarray) -> None:
        """Write the next bytes, as `GGUFWriter.append` does."""
        self._wait(_AHEAD)
        self._waiting.append(self._thread.submit(self._append, data))

    def _append(self, data: np.ndarray) -> None:
        self._writer.append(data)
        self._unsynced += data.nbytes
        if self._unsynced >= _SYNC_NBYTES:
            self._writer.sync()
            self._unsynced = 0

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait(0)
        finally:
            self._thread.shutdown(cancel_futures=True)


class _Squares:
    """Sums over the pieces of a tensor."""

    def __init__(self) -> None:
        self.n = 0.0
        self.weights = self.errors = 0.0

    def add(self, rows: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None) -> None:
        share = np.ones(rows.shape[1], np.float32) if importance is None else importance
        self.n += rows.shape[0] * float(share.sum())
        self.weights += float(np.dot(np.square(rows).sum(0, dtype=np.float64), share))
        self.errors += float(np.dot(np.square(rows - decoded).sum(0, dtype=np.float64), share))

    def mean(self, total: float) -> float | None:
        return total / self.n if self.n else None


def _pieces(
    source: Source, target: BlockFormat, encoder: Encoder, importance: np.ndarray | None,
    squares: _Squares, measure: bool,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Yield the bytes of a tensor in its new format."""
    tensor = source.tensor
    n_cols, n_rows = tensor.shape[0], prod(tensor.shape[1:])
    if not n_cols:
        return
    step = max(1, PIECE_NBYTES // (4 * n_cols))
    with ThreadPoolExecutor(1, "read") as reader:
        coming = reader.submit(source.read, 0, min(step, n_rows))
        for start in range(0, n_rows, step):
            rows = coming.result()
            stop = start + len(rows)
            if stop < n_rows:
                coming = reader.submit(source.read, stop, min(stop + step, n_rows))
            if rows.dtype == np.uint8 and target is tensor.format:
                yield rows
                continue
            if rows.dtype == np.uint8:
                rows = encoder.decode(tensor.format.name, rows)
            try:
                data = encoder.encode(target.name, rows, importance)
            except ValueError as error:
                raise ModelFileError(
                    f"{tensor.name}, rows {start} to {stop}, cannot be written: {error}"
                ) from None
            if measure and target.name != "f32":
                squares.add(rows, encoder.decode(target.name, data), importance)
            yield data
