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
_N_ROWS, _N_COLUMNS = 64, 8  # most rows, and least columns for each of the k largest
_N_FIRST = 256
_N_BLOCK = 512
_N_FEW = (
    4096  # in f64; temporaries of 2 MB would be taken from the system anew at every token: 3 ms
)


class Candidates(NamedTuple):
    """Tokens that may still be drawn."""

    ids: np.ndarray  # i32 (n,), rising
    logits: np.ndarray  # f32 or f64 (n,)

    def keep(self, at: np.ndarray) -> Candidates:
        """Return those at these rising places, or of this mask."""
        return Candidates(self.ids[at], self.logits[at])


class Weights(NamedTuple):
    """What candidates weigh against the best: exp f32 (n,) of the distance f32 (n,) of their logits.

    In f32, as 262144 take 0.3 ms, in f64 3 ms; sums are f64.
    """

    each: np.ndarray
    distance: np.ndarray
    total: float

    def logprob(self, at: int) -> float:
        """Natural log of a candidate's probability."""
        return float(self.distance[at]) - math.log(self.total)


def weigh(logits: np.ndarray) -> Weights:
    """Weights of logits (n,): probabilities are `each / total`."""
    distance = (logits - logits.max()).astype(np.float32, copy=False)
    each = np.exp(distance)
    return Weights(each, distance, float(each.sum(dtype=np.float64)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities f64 (n,) of logits (n,)."""
    weights = weigh(logits)
    return weights.each / np.float64(weights.total)


def pick(weights: np.ndarray, chance: float) -> int:
    """Return the place where the running sum of weights f32 (n,) passes `chance` times their sum.

    `chance` is of [0, 1).  Sums of blocks come first: a running sum of 262144 takes 3 ms.
    """
    block_sums = np.add.reduceat(weights, np.arange(0, len(weights), _N_BLOCK), dtype=np.float64)
    ends = np.cumsum(block_sums)
    point = min(chance * ends[-1], np.nextafter(ends[-1], 0.0))
    block = int(np.searchsorted(ends, point, side="right"))
    weights = weights[block * _N_BLOCK : (block + 1) * _N_BLOCK]
    sums = np.cumsum(weights, dtype=np.float64)
    at = int(np.searchsorted(sums, point - (ends[block] - block_sums[block]), side="right"))
    # Rounding may lead past the end of the block, whose last weights may be 0.
    return block * _N_BLOCK + min(at, int(np.flatnonzero(weights)[-1]))


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Return the places of the k largest values, largest first; equal ones in their order.

    The k-th largest of the maxima of many columns is at most the k-th largest of all, and is found in
    a twentieth of the time: k = 40 of V = 262144 take 0.2 ms.
    """
    n = len(values)
    if k >= n:
        return np.argsort(-values, kind="stable")
    n_rows = max(min(n // (_N_COLUMNS * k), _N_ROWS), 1)
    pool = values[: n // n_rows * n_rows].reshape(n_rows, -1).max(axis=0)
    edge = np.partition(pool, len(pool) - k)[len(pool) - k]
    at = np.flatnonzero(values >= edge)
    return at[np.argsort(-values[at], kind="stable")[:k]]


def top_k(c: Candidates, k: int) -> Candidates:
    """Keep the k most likely; 0 is off."""
    return c.keep(np.sort(largest(c.logits, k))) if 0 < k < len(c.ids) else c


def top_p(c: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """Keep the fewest most likely whose probabilities sum to p."""
    if p >= 1.0:
        return c
    order, share = _summing_to(weigh(c.logits), c.logits, p, min_keep)
    n = int(np.searchsorted(share, p - _SLACK)) + 1
    return c.keep(np.sort(order[: max(n, min_keep)]))


def min_p(c: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """Keep those at least p times as likely as the best."""
    if p <= 0.0:
        return c
    least = float(c.logits.max()) + min(math.log(p), 0.0)
    at = np.flatnonzero(c.logits >= least)
    return c.keep(at if len(at) >= min_keep else np.sort(largest(c.logits, min_keep)))


def typical_p(c: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """Keep those whose surprise is nearest the expected one, until their probabilities exceed p."""
    if p >= 1.0:
        return c
    weights = weigh(c.logits)
    usual = weights.distance  # in place: how much less, or more, surprising than expected
    usual += _entropy(weights) - math.log(weights.total)
    np.negative(np.abs(usual, out=usual), out=usual)
    order, share = _summing_to(weights, usual, p + 2 * _SLACK, min_keep)
    n = int(np.searchsorted(share, p + _SLACK, side="right")) + 1
    return c.keep(np.sort(order[: max(n, min_keep)]))


def top_n_sigma(c: Candidates, n: float) -> Candidates:
    """Keep logits within n standard deviations of the largest."""
    if n <= 0.0:
        return c
    known = c.logits[c.logits > -np.inf]
    away = known - known.mean()
    sigma = math.sqrt(float(np.dot(away, away)) / len(away))
    return c.keep(c.logits >= float(c.logits.max()) - n * sigma)


def xtc(
    c: Candidates, probability: float, threshold: float, chance: float, min_keep: int = 0
) -> Candidates:
    """Exclude top choices: of all that reach the threshold, only the least likely stays.

    `chance` is a random number of [0, 1); nothing happens unless it is below `probability`.
    """
    if chance >= probability or threshold > 0.5 or len(c.ids) < 2:
        return c
    weights = weigh(c.logits)
    above = np.flatnonzero(weights.each >= threshold * weights.total)
    if len(above) < 2 or len(c.ids) - len(above) + 1 < min_keep:
        return c
    least = above[len(above) - 1 - np.argmin(c.logits[above][::-1])]  # the last of equal ones
    kept = np.ones(len(c.ids), bool)
    kept[above] = False
    kept[least] = True
    return c.keep(kept)


def temperature(c: Candidates, t: float, spread: float = 0.0, exponent: float = 1.0) -> Candidates:
    """Divide logits by t; with a spread, by t - spread where they are sure to t + spread where not."""
    if spread > 0.0:
        n = int(np.count_nonzero(c.logits > -np.inf))
        if n > 1:
            low, high = max(0.0, t - spread), t + spread
            unsureness = _entropy(weigh(c.logits)) / math.log(n)
            t = low + (high - low) * max(unsureness, 0.0) ** exponent
    if t < _LEAST_TEMPERATURE:
        return c.keep(np.argmax(c.logits, keepdims=True))
    logits = c.logits if len(c.ids) > _N_FEW else c.logits.astype(np.float64)
    return Candidates(c.ids, logits / t)


def _entropy(weights: Weights) -> float:
    """Expected surprise, in nats."""
    each, distance, _ = weights
    if distance.min() == -np.inf:
        each, distance = each[each > 0], distance[each > 0]
    return math.log(weights.total) - float(np.dot(each, distance)) / weights.total


def _summing_to(
    weights: Weights, keys: np.ndarray, target: float, min_keep: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return places by falling key, as many as sum to the target at least, and the running sums.

    Few of a large vocabulary are needed as a rule: to sort V = 262144 takes 37 ms.
    """
    n = max(_N_FIRST, min_keep)
    while True:
        order = largest(keys, n)
        share = np.cumsum(weights.each[order], dtype=np.float64) / weights.total
        if n >= len(keys) or share[-1] >= target:
            return order, share
        n *= 16
