"""Samplers that need nothing but the candidates: each returns those that are left.

One that is off returns what it was given.  Equal logits stand in the order of their ids, always.
`min_keep` is the least that is left of as many.

Sources: Fan et al., 2018 (top-k); Holtzman et al., 2020 (top-p); Nguyen et al., 2024 (min-p);
Meister et al., 2023 (locally typical); Tang et al., 2024 (top-n-sigma); oobabooga's
text-generation-webui PR 6335 (XTC); llama.cpp PR 4972 (dynamic temperature).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

_SLACK = 1e-6  # rounding of f32 logits must not cost top-p one token more
_LEAST_TEMPERATURE = 1e-9  # f32 logits lie further apart than that: only the best is left
_N_ROWS = 64
_N_FIRST = 256


class Candidates(NamedTuple):
    """Tokens that may still be drawn: by rising id, or most likely first."""

    ids: np.ndarray  # i64 (n,)
    logits: np.ndarray  # f32 or f64 (n,)

    def keep(self, at: np.ndarray | slice) -> Candidates:
        """Return those at these places, or of this mask."""
        return Candidates(self.ids[at], self.logits[at])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities f64 (n,) of logits (n,)."""
    p = logits.astype(np.float64)
    p -= p.max()
    np.exp(p, out=p)
    p /= p.sum()
    return p


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Return the places of the k largest values, largest first; equal ones in their order.

    The k-th largest of the maxima of k or more columns is at most the k-th largest of all, and is
    found in a twentieth of the time: 0.1 ms of V = 262144.
    """
    n = len(values)
    if k >= n:
        return np.argsort(-values, kind="stable")
    pool = values
    if k <= n // _N_ROWS:
        pool = values[: n // _N_ROWS * _N_ROWS].reshape(_N_ROWS, -1).max(axis=0)
    edge = np.partition(pool, len(pool) - k)[len(pool) - k]
    at = np.flatnonzero(values >= edge)
    return at[np.argsort(-values[at], kind="stable")[:k]]


def top_k(c: Candidates, k: int) -> Candidates:
    """Keep the k most likely; 0 is off."""
    return c.keep(largest(c.logits, k)) if 0 < k < len(c.ids) else c


def top_p(c: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """Keep the fewest most likely whose probabilities sum to p."""
    if p >= 1.0:
        return c
    order, share = _summing_to(softmax(c.logits), c.logits, p, min_keep)
    n = int(np.searchsorted(share, p - _SLACK)) + 1
    return c.keep(order[: max(n, min_keep)])


def min_p(c: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """Keep those at least p times as likely as the best."""
    if p <= 0.0:
        return c
    least = float(c.logits.max()) + min(math.log(p), 0.0)
    at = np.flatnonzero(c.logits.astype(np.float64) >= least)
    return c.keep(at if len(at) >= min_keep else largest(c.logits, min_keep))


def typical_p(c: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """Keep those whose surprise is nearest the expected one, until their probabilities exceed p."""
    if p >= 1.0:
        return c
    shares = softmax(c.logits)
    with np.errstate(divide="ignore"):
        surprise = -np.log(shares)
    distance = np.abs(surprise - _entropy(shares))
    order, share = _summing_to(shares, -distance, p + 2 * _SLACK, min_keep)
    n = int(np.searchsorted(share, p + _SLACK, side="right")) + 1
    return c.keep(np.sort(order[: max(n, min_keep)]))  # as they stood


def top_n_sigma(c: Candidates, n: float) -> Candidates:
    """Keep logits within n standard deviations of the largest."""
    if n <= 0.0:
        return c
    logits = c.logits.astype(np.float64)
    return c.keep(logits >= logits.max() - n * logits[logits > -np.inf].std())


def xtc(
    c: Candidates, probability: float, threshold: float, chance: float, min_keep: int = 0
) -> Candidates:
    """Exclude top choices: of all that reach the threshold, only the least likely stays.

    `chance` is a random number of [0, 1); nothing happens unless it is below `probability`.
    """
    if chance >= probability or threshold > 0.5 or len(c.ids) < 2:
        return c
    above = np.flatnonzero(softmax(c.logits) >= threshold)
    if len(above) < 2 or len(c.ids) - len(above) + 1 < min_keep:
        return c
    least = above[len(above) - 1 - np.argmin(c.logits[above][::-1])]  # the last of equal ones
    kept = np.ones(len(c.ids), bool)
    kept[above] = False
    kept[least] = True
    return c.keep(kept)


def temperature(c: Candidates, t: float, spread: float = 0.0, exponent: float = 1.0) -> Candidates:
    """Divide logits by t; with a spread, by t - spread where they are sure to t + spread where not."""
    if spread > 0.0 and len(c.ids) > 1:
        low, high = max(0.0, t - spread), t + spread
        entropy = _entropy(softmax(c.logits)) / math.log(len(c.ids))
        t = low + (high - low) * max(entropy, 0.0) ** exponent
    if t < _LEAST_TEMPERATURE:
        best = int(np.argmax(c.logits))
        return c.keep(slice(best, best + 1))
    return Candidates(c.ids, c.logits.astype(np.float64) / t)


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0.0]
    return -float(np.dot(p, np.log(p)))


def _summing_to(
    p: np.ndarray, keys: np.ndarray, target: float, min_keep: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return places by falling key, as many as sum to the target at least, and the running sums.

    Few of a large vocabulary are needed as a rule: to sort V = 262144 takes 37 ms.
    """
    n = max(_N_FIRST, min_keep)
    while True:
        order = largest(keys, n)
        share = np.cumsum(p[order])
        if n >= len(p) or share[-1] >= target:
            return order, share
        n *= 16
