"""From logits to a token: temperature, top-k, top-p, min-p, in llama.cpp's default order.

Sources: Fan et al., 2018 (top-k); Holtzman et al., 2020 (top-p); Nguyen et al., 2024 (min-p).
"""

from __future__ import annotations

import math

import numpy as np

from edgellama.errors import EdgeLlamaError, UsageError


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
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UsageError(f"{name} is {value!r}; a number is needed")
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; it must be between {low:g} and {high:g}")
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
            raise UsageError(f"top_k is {top_k!r}; it must be 0 (off) or more")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise UsageError(f"seed is {seed!r}; it must be 0 or more")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self._random = np.random.default_rng(seed)

    def candidates(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids that are left and their probabilities f64, most likely first."""
        k = self.top_k
        if 0 < k < len(logits):
            ids = np.argpartition(logits, len(logits) - k)[len(logits) - k :]
        else:
            ids = np.arange(len(logits))
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        values = logits[ids].astype(np.float64)
        p = _softmax(values)
        if self.top_p < 1.0:
            n = int(np.searchsorted(np.cumsum(p), self.top_p)) + 1
            ids, values, p = ids[:n], values[:n], _softmax(values[:n])
        if self.min_p > 0.0:
            n = max(1, int(np.count_nonzero(p >= self.min_p * p[0])))
            ids, values = ids[:n], values[:n]
        return ids, _softmax(values / self.temperature)

    def sample(self, logits: np.ndarray) -> int:
        """Draw a token from logits f32 (V,).

        Raises: EdgeLlamaError when the logits are not numbers.
        """
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


def _softmax(values: np.ndarray) -> np.ndarray:
    p = np.exp(values - values[0])  # sorted: the first is the largest
    return p / p.sum()
