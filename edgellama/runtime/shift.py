"""Moving cached keys to other positions: what a context shift needs instead of evaluating again.

A key is stored after it was rotated by its position; turned back by a number of positions, it is that of
an earlier position, but for rounding.  Values know no position.  The records lie behind the program's own
in its table, and are written when they are first needed: most texts never are so long.

Source: Su et al., RoFormer, 2021, section 3.2.2 (rotations add up).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgellama.kernels import layout
from edgellama.kernels.compiler import Pack
from edgellama.kernels.targets import Target
from edgellama.kernels.team import fill_record
from edgellama.models.rope import RopeConfig

from .kvcache import KVCache
from .packs import load_pack
from .program import BoundProgram


class Shift:
    """Turns the keys of pages; `rotations` says how positions rotate in every layer that knows them."""

    def __init__(
        self,
        bound: BoundProgram,
        rotations: Mapping[int, RopeConfig],
        ropes: Mapping[RopeConfig, np.ndarray],
        cache: KVCache,
        kv_type: str,
    ) -> None:
        self._rows = bound.rotations
        self._rotations, self._ropes, self._cache = rotations, ropes, cache
        self._operation = f"kv.rotate[{kv_type}]"
        self._angles = {rope: np.zeros(rope.n_dims, np.float32) for rope in {*rotations.values()}}

    def load(self, pack: Pack, target: Target, head_size: int) -> None:
        """Write the records, if they are not yet.  Raises: KernelError."""
        if not len(self._rows) or self._rows[0].any():
            return
        load_pack([self._operation], target, pack)
        for row, (layer, rope) in zip(self._rows, self._rotations.items(), strict=True):
            place = self._cache.layer(layer)
            fill_record(
                row,
                pack[self._operation],
                {
                    "cache": place.pages, "cache_stride": place.stride,
                    "page_nbytes": place.page_nbytes, "head_size": head_size,
                    "n_dims": rope.n_dims, "angles": self._angles[rope].ctypes.data,
                    "neox": int(rope.kind == "neox"),
                },
                parts=self._cache.n_kv_heads,
            )  # fmt: skip

    def steps(
        self, pages: Sequence[np.ndarray], n_positions: int
    ) -> list[tuple[np.ndarray, np.ndarray, list[int]]]:
        """Set the angles; return words of a step, its page numbers and its records, for every group.

        `pages` is i32 (n,) for every group: pages whose keys are to move `n_positions` towards the start.
        """
        for rope, angles in self._angles.items():
            table = self._ropes[rope]
            angles[:] = table[n_positions] / table[0, 0]  # without the magnitude, which keys have
            angles[len(angles) // 2 :] *= -1.0
        steps = []
        for g, numbers in enumerate(pages):
            numbers = np.ascontiguousarray(numbers, np.int32)
            words = np.zeros(layout.STEP_NBYTES // 8, np.int64)
            words[layout.STEP_N_TOKENS // 8] = len(numbers)
            words[layout.STEP_IDS // 8] = numbers.ctypes.data
            words[layout.STEP_N_SPANS // 8] = 1
            layers = enumerate(self._rotations)
            records = [i for i, layer in layers if self._cache.group_of(layer) == g]
            steps.append((words, numbers, records))
        return steps
