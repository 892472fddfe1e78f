"""Calling single operations of a pack, without an engine."""

from __future__ import annotations

import numpy as np

from edgellama.kernels import team
from edgellama.kernels.blocks import FORMATS
from edgellama.kernels.compiler import Pack


def pack_rows(pack: Pack, format_name: str, raw: np.ndarray, n_cols: int) -> np.ndarray:
    """Pack rows u8 (n_rows, row bytes); a little room behind them is for what kernels look ahead."""
    format_ = FORMATS[format_name]
    packed = np.zeros(format_.packed_nbytes(len(raw), n_cols) + 8192, np.uint8)
    failures = np.zeros(2, np.int64)
    team.call_here(
        pack, f"repack.repack[{format_name}]",
        {"out": packed.ctypes.data, "group_nbytes": format_.group_nbytes(n_cols),
         "raw": raw.ctypes.data, "n_rows": len(raw), "n_blocks": n_cols // format_.n_weights,
         "per_part": len(raw), "file": 0, "read": 0, "failures": failures.ctypes.data},
    )  # fmt: skip
    assert not failures.any()
    return packed
