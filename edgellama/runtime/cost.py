"""What a step costs before it runs: bytes read, and multiply-adds by the form of their activations.

Bytes are those of packed weights and of the KV pages a step looks at; activations stay in the caches.
Multiply-adds are those the model asks for, not those a kernel spends on padding.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from edgellama.gguf import GGUFFile
from edgellama.kernels.blocks import FORMATS, padded
from edgellama.kernels.layout import PAGE, kv_page_nbytes
from edgellama.models.config import ModelConfig

from .lowering import compile_program
from .program import Record, Weight

FORMS = ("f32", "i16", "i8")
"""Forms of activations, from slow to fast."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes read, and multiply-adds by the form of their activations."""

    nbytes: float = 0
    macs: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FORMS, 0.0))

    @property
    def n_macs(self) -> float:
        """Multiply-adds of all forms."""
        return sum(self.macs.values())

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.nbytes + other.nbytes, {f: self.macs[f] + other.macs[f] for f in FORMS})

    def times(self, n: int) -> Cost:
        """The cost of doing it `n` times."""
        return Cost(self.nbytes * n, {f: self.macs[f] * n for f in FORMS})


class CostModel:
    """Counts for one model and one type of KV cache."""

    def __init__(self, gguf: GGUFFile, config: ModelConfig, kv_type: str) -> None:
        self._config = config
        self._tensors = gguf.tensors
        self._page_nbytes = kv_page_nbytes(kv_type, config.head_size)
        self.program = compile_program(config, gguf.tensors, kv_type)
        attends = [r for r in self.program.records if r.operation.startswith("attention.attend")]
        self._windows = Counter(_window(record) for record in attends)
        self._without_attention = cache(self._count_without_attention)

    def record(self, record: Record, first: int, n_tokens: int, n_out: int = 1) -> Cost:
        """The cost of one operation in a step of positions [first, first + n_tokens)."""
        if record.operation.startswith("attention.attend"):
            return self._attend(_window(record), first, n_tokens)
        n = n_out if record.of_out_rows else n_tokens
        nbytes = 0
        macs = record.n_macs * n
        form = "f32"
        for argument in record.arguments.values():
            if not isinstance(argument, Weight):
                continue
            info = self._tensors[argument.name]
            if len(info.shape) == 1:
                nbytes += 4 * padded(info.shape[0])
                continue
            n_cols, n_rows = info.shape
            format_ = FORMATS[info.type_name]
            form = format_.activation
            if record.operation.startswith("matmul.embed"):  # a row lies among seven others
                nbytes += n * format_.group_nbytes(n_cols)
            else:
                nbytes += format_.packed_nbytes(n_rows, n_cols)
        return Cost(nbytes, Cost().macs | {form: macs})

    def step(self, first: int, n_tokens: int, n_out: int = 1) -> Cost:
        """The cost of a step of positions [first, first + n_tokens)."""
        total: Cost = self._without_attention(n_tokens, n_out)
        for window, n_layers in self._windows.items():
            total = total + self._attend(window, first, n_tokens).times(n_layers)
        return total

    def steps(self, first: int, n_prompt: int, n_gen: int, n_batch: int) -> list[Cost]:
        """The steps that evaluate a prompt behind `first` positions and then single tokens."""
        out = []
        for start in range(0, n_prompt, n_batch):
            n = min(n_batch, n_prompt - start)
            out.append(self.step(first + start, n, int(start + n == n_prompt)))
        out += [self.step(first + n_prompt + i, 1) for i in range(n_gen)]
        return out

    def _count_without_attention(self, n_tokens: int, n_out: int) -> Cost:
        total = Cost()
        records = self.program.records
        for record in records if n_out else records[: self.program.head_first]:
            if not record.operation.startswith("attention.attend"):
                total = total + self.record(record, 0, n_tokens, n_out)
        return total

    def _attend(self, window: int, first: int, n_tokens: int) -> Cost:
        c = self._config
        seen = np.arange(first + 1, first + n_tokens + 1)
        oldest = max(0, first + 1 - window) if window else 0
        n_pages = -(-(first + n_tokens) // PAGE) - oldest // PAGE
        visible = int(np.minimum(seen, window).sum() if window else seen.sum())
        macs = 2 * c.n_heads * c.head_size * visible
        return Cost(n_pages * self._page_nbytes * c.n_kv_heads, Cost().macs | {"f32": macs})


def _window(record: Record) -> int:
    window = record.arguments["window"]
    assert isinstance(window, int), "the window of attention is a constant of the program"
    return window
