"""Penalties of tokens that have been said: once, and for each time.

Sources: Keskar et al., CTRL, 2019 (repeat penalty); the OpenAI API's reference (presence, frequency).
"""

from __future__ import annotations

import numpy as np

from .history import History
from .options import SamplingOptions
from .truncation import Candidates


def penalize(c: Candidates, text: History, options: SamplingOptions) -> Candidates:
    """Divide logits of what was said lately (multiply negative ones), and take off per occurrence."""
    repeat, frequency = options.repeat_penalty, options.frequency_penalty
    presence = options.presence_penalty
    if (repeat, frequency, presence) == (1.0, 0.0, 0.0):
        return c
    said, times = np.unique(text.last(options.repeat_last_n), return_counts=True)
    at, of_said = places(c, said)
    logits = c.logits[at].astype(np.float64)
    logits = np.where(logits <= 0, logits * repeat, logits / repeat)
    logits -= times[of_said] * frequency + presence
    return replaced(c, at, logits)


def places(c: Candidates, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find candidates by rising ids i64 (m,): their places, and which of the `ids` these are."""
    ids = ids.astype(c.ids.dtype)  # or all candidates would be converted
    at = np.searchsorted(c.ids, ids)
    found = np.flatnonzero(c.ids[np.minimum(at, len(c.ids) - 1)] == ids)
    return at[found], found


def replaced(c: Candidates, at: np.ndarray, logits: np.ndarray) -> Candidates:
    """Return the candidates with other logits at some places."""
    new = c.logits.copy()
    new[at] = logits
    return Candidates(c.ids, new)
