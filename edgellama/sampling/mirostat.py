"""Mirostat: keeps the surprise of the text near a target by choosing where to cut the candidates.

Source: Basu et al., Mirostat: a neural text decoding algorithm that directly controls perplexity, 2021.
"""

from __future__ import annotations

import math

import numpy as np

from .truncation import Candidates, largest, top_k, weigh

_N_FIT = 100  # most likely tokens that Zipf's exponent is fitted to


class Mirostat:
    """The state of one answer; `version` is 1 or 2, `tau` the target in bits, `eta` the rate."""

    def __init__(self, version: int, tau: float, eta: float) -> None:
        self._cut = cut_by_rank if version == 1 else cut_by_surprise
        self._tau = tau
        self._eta = eta
        self._mu = 2 * tau

    def cut(self, c: Candidates, n_vocab: int) -> Candidates:
        """Keep the candidates that are not too surprising."""
        return self._cut(c, self._mu, n_vocab)

    def learn(self, p: float) -> None:
        """Note how probable the token was, of those that were left."""
        self._mu -= self._eta * (-float(np.log2(p)) - self._tau)


def cut_by_rank(c: Candidates, mu: float, n_vocab: int) -> Candidates:
    """Version 1: keep the k most likely, k such that a Zipf law has the surprise `mu`."""
    p = weigh(c.logits).each[largest(c.logits, _N_FIT)].astype(np.float64)
    p = p[p > 0.0]
    if len(p) < 2:
        return top_k(c, 1)
    rank = np.arange(1, len(p))
    t, b = np.log((rank + 1) / rank), np.log(p[:-1] / p[1:])
    s = float(np.dot(t, b) / np.dot(t, t))
    excess = s - 1
    with np.errstate(all="ignore"):
        scale = excess / (1 - np.float64(n_vocab) ** -excess) if excess else 1 / np.log(n_vocab)
        k = np.float64(scale * 2.0**mu) ** (1 / np.float64(s))
    return top_k(c, max(int(k), 1)) if k < len(c.ids) else c


def cut_by_surprise(c: Candidates, mu: float, n_vocab: int) -> Candidates:
    """Version 2: keep those whose surprise is at most `mu` bits, or the best."""
    weights = weigh(c.logits)
    most = mu * math.log(2.0) - math.log(weights.total)  # nats below the best
    return c.keep(weights.distance >= min(-most, 0.0))
