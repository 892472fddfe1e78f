"""The arrays of a step, which kernels read: token ids, positions, page tables, wanted rows."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from edgellama.kernels import layout

from .kvcache import Sequence


class StepArrays:
    """What one step of up to `n_batch` tokens evaluates; `words` is what launches take."""

    def __init__(self, n_batch: int) -> None:
        self.words = np.zeros(layout.STEP_NBYTES // 8, np.int64)
        self._ids = np.zeros(n_batch, np.int32)
        self._positions = np.zeros(n_batch, np.int32)
        self._tables = np.zeros(n_batch, np.int64)
        self._out_rows = np.zeros(n_batch, np.int32)
        for field, array in (
            (layout.STEP_IDS, self._ids),
            (layout.STEP_POSITIONS, self._positions),
            (layout.STEP_TABLES, self._tables),
            (layout.STEP_OUT_ROWS, self._out_rows),
        ):
            self.words[field // 8] = array.ctypes.data

    def fill(self, rows: SequenceOf[int], batch: SequenceOf[tuple[Sequence, int]]) -> None:
        """Describe a step: embedding rows of all its tokens, and how many each sequence appends.

        Pages for them have been reserved.
        """
        n = len(rows)
        self._ids[:n] = rows
        at = 0
        for sequence, n_tokens in batch:
            start = len(sequence.tokens)
            self._positions[at : at + n_tokens] = np.arange(start, start + n_tokens)
            self._tables[at : at + n_tokens] = sequence.address
            at += n_tokens
        self.words[layout.STEP_N_TOKENS // 8] = n
        self.words[layout.STEP_N_OUT // 8] = 0
        n_spans = int(self._positions[:n].max()) // layout.SPAN + 1
        few = n <= layout.SPLIT_TOKENS and n * n_spans <= layout.SPLIT_ROWS
        self.words[layout.STEP_N_SPANS // 8] = n_spans if few else 1

    def want(self, tokens: SequenceOf[int]) -> None:
        """Name the tokens of the step whose logits the head is to compute."""
        self._out_rows[: len(tokens)] = tokens
        self.words[layout.STEP_N_OUT // 8] = len(tokens)

    @property
    def n_tokens(self) -> int:
        """Tokens of the step."""
        return int(self.words[layout.STEP_N_TOKENS // 8])

    @property
    def n_out(self) -> int:
        """Tokens whose logits are wanted."""
        return int(self.words[layout.STEP_N_OUT // 8])

    @property
    def depth(self) -> int:
        """Positions that the furthest token sees."""
        return int(self._positions[: self.n_tokens].max()) + 1
