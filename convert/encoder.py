"""The quantizer kernels on a team of threads: loaded, or built, when a format is first asked for."""

from __future__ import annotations

import numpy as np

from edgellama.cpu import n_usable_cores
from edgellama.kernels import encode, targets, team
from edgellama.runtime.packs import load_pack


class Encoder:
    """Encodes f32 rows to blocks and decodes them; use it in a `with`."""

    def __init__(self, n_threads: int | None = None) -> None:
        self._pack = load_pack(team.NAMES, targets.detect())
        self._team = team.Team(self._pack, n_threads or n_usable_cores(), encode.SCRATCH_NBYTES)
        self._ready = {"f32"}

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._team.close()

    def prepare(self, format_names: set[str]) -> None:
        """Load the kernels of formats, all at once where they must be built.

        Raises: KernelError.
        """
        if missing := format_names - self._ready:
            operations = {name for kind in sorted(missing) for name in encode.operations(kind)}
            load_pack(sorted(operations), targets.detect(), self._pack)
            self._ready |= missing

    def encode(
        self, format_name: str, rows: np.ndarray, importance: np.ndarray | None = None
    ) -> np.ndarray:
        """Return f32 rows as blocks; see `kernels.encode.encode`."""
        if format_name == "f32":
            if not np.isfinite(rows).all():
                raise ValueError("there are NaNs or infinities among the numbers to encode")
            return rows.view(np.uint8)
        self.prepare({format_name})
        return encode.encode(self._team, format_name, rows, importance)

    def decode(self, format_name: str, blocks: np.ndarray) -> np.ndarray:
        """Return the rows of u8 blocks (n, row bytes) as f32."""
        if format_name == "f32":
            return blocks.view(np.float32)
        self.prepare({format_name})
        return encode.dequantize(self._team, format_name, blocks)
