"""Quantization of weights: f32 rows to file blocks and back, on all threads of a team.

The kernels are in `encode_blocks.py` (blocks of 32 weights, and f16 and bf16), `encode_super.py` (blocks
of 256), `decode.py`; the search for scales in `fit.py`.  Results do not depend on how many threads there
are, nor on the CPU.  `quantize.py` is something else: activations, while a model runs.
"""

from __future__ import annotations

import numpy as np

from . import layout
from .blocks import FORMATS, BlockFormat
from .team import Team, fill_record

SCRATCH_NBYTES = 8192
"""What a team needs per thread."""

_PART = 1 << 16  # weights
_TILE = 256


def operations(format_name: str) -> tuple[str, ...]:
    """Names of the operations that the team's pack must hold for a format: encoding, and decoding.

    Raises: ValueError for a format that cannot be written, listing those that can.
    """
    if format_name not in FORMATS or format_name == "f32":
        known = ", ".join(name for name in FORMATS if name != "f32")
        raise ValueError(f"no format to encode to is called {format_name!r}; there are {known}")
    kind = "super" if FORMATS[format_name].n_weights == _TILE else "blocks"
    encoding = f"encode_{kind}.encode[{format_name}]"
    if FORMATS[format_name].n_weights == 1:
        return (encoding,)
    return encoding, f"decode.decode[{format_name}]"


def encode(
    team: Team, format_name: str, rows: np.ndarray, importance: np.ndarray | None = None
) -> np.ndarray:
    """Quantize rows, with the scales that lose least: importance * (x - decoded x)^2, summed.

    Without importance a weight counts by its size (`tile.load_weights`).  q8_0, f16 and bf16 know no
    importance; they, and q4_0 without it, are rounded as llama.cpp does, bit for bit.  A call returns
    when all rows are done: hand over as many as may take a second (0.1 GB/s of f32 at the slowest).

    Shapes: rows f32 (n, k) C-contiguous, importance f32 (k,) not negative; returns u8 (n, row bytes).
    Raises: ValueError when k is no whole number of blocks, when a number is NaN or infinite, or when a
    scale is beyond f16.
    """
    name = operations(format_name)[0]
    format_ = FORMATS[format_name]
    assert rows.dtype == np.float32, "rows are f32"
    assert rows.flags.c_contiguous, "rows are contiguous"
    n_rows, n_cols = rows.shape
    _check_columns(n_cols, format_)
    out = np.empty((n_rows, format_.row_nbytes(n_cols)), np.uint8)
    if rows.size == 0:
        return out
    weights = None if importance is None else _relative(importance, n_cols)
    failures = np.zeros(2, np.int64)
    _run(
        team, name, rows.size, _TILE,
        {"out": out.ctypes.data, "x": rows.ctypes.data, "n_weights": rows.size,
         "importance": 0 if weights is None else weights.ctypes.data, "n_cols": n_cols,
         "failures": failures.ctypes.data},
    )  # fmt: skip
    if failures[0]:
        raise ValueError("there are NaNs or infinities among the numbers to encode")
    if failures[1]:
        raise ValueError(
            f"numbers up to {np.abs(rows).max():.3g} are too large to be encoded as {format_name}; "
            "scale them down or use bf16"
        )
    return out


def dequantize(team: Team, format_name: str, blocks: np.ndarray) -> np.ndarray:
    """Decode rows: blocks u8 (n, row bytes) C-contiguous, returns f32 (n, k)."""
    name = operations(format_name)[-1]
    format_ = FORMATS[format_name]
    assert blocks.dtype == np.uint8, "blocks are bytes"
    assert blocks.flags.c_contiguous, "blocks are contiguous"
    if format_name == "f16":
        return blocks.view(np.float16).astype(np.float32)
    if format_name == "bf16":
        return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    n_rows, row_nbytes = blocks.shape
    n_cols = row_nbytes // format_.nbytes * format_.n_weights
    out = np.empty((n_rows, n_cols), np.float32)
    if out.size:
        _run(
            team, name, out.size, format_.n_weights,
            {"out": out.ctypes.data, "blocks": blocks.ctypes.data,
             "n_blocks": out.size // format_.n_weights},
        )  # fmt: skip
    return out


def squared_error(
    rows: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None = None
) -> float:
    """Sum of importance * (rows - decoded)^2 over that of importance * rows^2, in float64."""
    weights = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
    lost = total = 0.0
    for row, other in zip(rows, decoded, strict=True):  # bounded memory
        exact = row.astype(np.float64)
        lost += float(weights @ (exact - other) ** 2)
        total += float(weights @ exact**2)
    return lost / total if total else lost


def _check_columns(n_cols: int, format_: BlockFormat) -> None:
    if n_cols % format_.n_weights:
        raise ValueError(
            f"rows of {n_cols} columns; {format_.name} needs a multiple of {format_.n_weights}"
        )


def _relative(importance: np.ndarray, n_cols: int) -> np.ndarray:
    """Importance over its mean, f32 (n_cols + tile,), repeating itself past the end of a row.

    What nobody asked for still deserves the nearest value: a column weighs at least a millionth.
    """
    if importance.shape != (n_cols,):
        raise ValueError(f"importance of shape {importance.shape}; rows have {n_cols} columns")
    mean = float(importance.mean(dtype=np.float64))
    if not (np.isfinite(mean) and (importance >= 0).all()):
        raise ValueError("importance holds NaN, infinite or negative numbers")
    relative = np.maximum(importance / mean, 1e-6) if mean else np.ones(n_cols)
    return np.resize(relative.astype(np.float32), n_cols + _TILE)


def _run(team: Team, name: str, n_weights: int, unit: int, arguments: dict[str, int]) -> None:
    """Run an operation over all weights, in parts of whole units."""
    per_part = _PART // unit
    table = np.zeros((1, layout.RECORD_NBYTES // 8), np.int64)
    step = np.zeros(layout.STEP_NBYTES // 8, np.int64)
    step[layout.STEP_N_TOKENS // 8] = 1
    parts = -(-n_weights // (per_part * unit))
    fill_record(table[0], team.pack[name], arguments | {"per_part": per_part}, parts=parts)
    team.use(table)
    team.run(step, 0, 1)
