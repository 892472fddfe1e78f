"""From logits to a token: temperature, top-k, top-p, min-p, in llama.cpp's default order.

Sources: Fan et al., 2018 (top-k); Holtzman et al., 2020 (top-p); Nguyen et al., 2024 (min-p).
"""

from __future__ import annotations

import math
import os
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np

from edgellama.errors import EdgeLlamaError, UsageError

_SLACK = 1e-6  # rounding of f32 logits must not cost top-p one token more


class Sampler:
    """Draws tokens; the same seed and the same logits give the same tokens.

    Raises: UsageError naming the parameter that is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        seed: int | None = None,
    ) -> None:
        for name, value, low, high in (
            ("temperature", temperature, 0.0, 100.0),
            ("top_p", top_p, 0.0, 1.0),
            ("min_p", min_p, 0.0, 1.0),
        ):
            if not isinstance(value, Real) or not math.isfinite(value):
                raise UsageError(f"{name} is {value!r}; a number is needed")
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; it must be between {low:g} and {high:g}")
        if not _is_count(top_k):
            raise UsageError(f"top_k is {top_k!r}; it must be a whole number, 0 (off) or more")
        if seed is not None and not _is_count(seed):
            raise UsageError(f"seed is {seed!r}; it must be a whole number, 0 or more")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self._seed = int.from_bytes(os.urandom(16), "little") if seed is None else seed

    @cached_property
    def _random(self) -> np.random.Generator:
        """Made when something is drawn: importing numpy.random takes 20 ms."""
        return np.random.default_rng(self._seed)

    def candidates(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids that are left and their probabilities f64, most likely first.

        Equal logits stand in the order of their ids. What min-p will drop is never sorted: at
        V = 262144 without top-k that is the difference between 37 ms and 2.4 ms.
        """
        ids = _largest(logits, self.top_k) if 0 < self.top_k < len(logits) else None
        values = (logits if ids is None else logits[ids]).astype(np.float64)
        values -= values.max()
        p = np.exp(values)
        total = p.sum()
        if self.min_p > 0.0:
            kept = np.flatnonzero(p >= self.min_p)  # the largest is exp(0) = 1
            ids, values, p = (kept if ids is None else ids[kept]), values[kept], p[kept]
        order = np.argsort(-values, kind="stable")
        ids, values = (order if ids is None else ids[order]), values[order]
        if self.top_p < 1.0:
            share = np.cumsum(p[order]) / total
            n = int(np.searchsorted(share, self.top_p - _SLACK)) + 1
            ids, values = ids[:n], values[:n]
        with np.errstate(over="ignore"):  # a temperature next to nothing
            p = np.exp(values / self.temperature)
        return ids, p / p.sum()

    def accept(self, token: int) -> None:
        """Note the token that the answer goes on with: the one drawn, or another."""

    def sample(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> int:
        """Draw a token from logits f32 (V,), of those that `allowed` bool (V,) leaves.

        Raises: EdgeLlamaError when the logits are not numbers.
        """
        if allowed is not None:
            logits = np.where(allowed, logits, np.float32(-np.inf))
        best = int(np.argmax(logits))  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise EdgeLlamaError(
                "the model computed no finite logits; its weights are probably damaged "
                "(check the file with `edgellama verify`)"
            )
        if self.temperature == 0.0:
            return best
        ids, p = self.candidates(logits)
        point = self._random.random() * p.sum()
        return int(ids[min(int(np.searchsorted(np.cumsum(p), point, side="right")), len(ids) - 1)])


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _largest(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest logits, rising; of equal ones at the edge, the lowest ids."""
    edge = np.partition(logits, len(logits) - k)[len(logits) - k]
    ids = np.flatnonzero(logits >= edge)
    if len(ids) > k:
        at_edge = ids[logits[ids] == edge]
        ids = np.setdiff1d(ids, at_edge[len(at_edge) - (len(ids) - k) :], assume_unique=True)
    return ids
