"""DRY, "don't repeat yourself": the longer a repetition, the less likely the token that prolongs it.

Source: oobabooga's text-generation-webui PR 5677.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from .history import History
from .options import SamplingOptions
from .penalties import places, replaced
from .truncation import Candidates

# First token of a sequence breaker -> what may follow it to make the breaker whole.
Breakers = Mapping[int, Sequence[tuple[int, ...]]]

_LARGEST_LOG = 88.0  # of an f32
_N_TAIL = 20


def penalize(
    c: Candidates, text: History, options: SamplingOptions, breakers: Breakers
) -> Candidates:
    """Take multiplier * base ** (length - allowed) off tokens that would prolong a repetition."""
    if options.dry_multiplier == 0.0 or options.dry_penalty_last_n == 0:
        return c
    allowed, log_base = options.dry_allowed_length, math.log(options.dry_base)
    most = allowed + (int(_LARGEST_LOG / log_base) if log_base > 1e-6 else 0)
    ids, lengths = repetitions(text.last(options.dry_penalty_last_n), allowed, most, breakers)
    # A breaker alone may always come.
    may_come = np.array([() in breakers.get(token, ()) for token in ids.tolist()], bool)
    ids, lengths = ids[~may_come], lengths[~may_come]
    if not len(ids):
        return c
    at, of_ids = places(c, ids)
    costs = options.dry_multiplier * options.dry_base ** (lengths[of_ids] - float(allowed))
    return replaced(c, at, c.logits[at] - costs)


def repetitions(
    text: np.ndarray, least: int, most: int, breakers: Breakers
) -> tuple[np.ndarray, np.ndarray]:
    """Find tokens that would prolong a repetition, and its length so far, from `least` to `most`.

    A repetition is an end of the text, i64 (n,), that stands in it before; it holds no sequence
    breaker.  Returns rising ids and their lengths, both i64 (m,).
    """
    none = np.empty(0, np.int64)
    back = text[::-1]  # the last token first
    limit = min(most, _unbroken(back[: most + _N_TAIL + 1], breakers))
    if limit < least:
        return none, none
    lengths = common_ends(back, limit)
    at = np.flatnonzero(lengths >= least)
    if not len(at):
        return none, none
    ids, lengths = back[at], lengths[at]  # back[at] comes after the repetition, which begins at + 1
    order = np.lexsort((lengths, ids))
    is_longest = np.append(ids[order][1:] != ids[order][:-1], True)
    return ids[order][is_longest], lengths[order][is_longest]


def common_ends(back: np.ndarray, limit: int) -> np.ndarray:
    """How long back[i + 1:] agrees with back, i64 (n - 1,); it is counted up to `limit`.

    Every round looks only at places that have agreed so far.  In usual text those are few: 1 ms of
    131072 tokens, where Python's Z-algorithm takes 25 ms; the worst, one token over and over, 70 ms.
    """
    lengths = np.zeros(max(len(back) - 1, 0), np.int64)
    at = np.flatnonzero(back[1:] == back[:1])
    for n in range(1, limit + 1):
        lengths[at] = n
        if n == limit or not len(at):
            break
        at = at[: np.searchsorted(at, len(lengths) - n)]
        at = at[back[at + n + 1] == back[n]]
    return lengths


def _unbroken(back: np.ndarray, breakers: Breakers) -> int:
    """How many of the last tokens hold no sequence breaker."""
    tokens = back.tolist()
    for i, token in enumerate(tokens):
        fits = [
            len(tail)
            for tail in breakers.get(token, ())
            if len(tail) <= i and tuple(tokens[i - len(tail) : i][::-1]) == tail
        ]
        if fits:
            return i - max(fits)
    return len(tokens)


def find_breakers(
    texts: Iterable[str], pieces: Sequence[bytes], encode: Callable[[str], list[int]]
) -> dict[int, list[tuple[int, ...]]]:
    """Find the tokens that hold a text, or begin it and need others to complete it."""
    found: dict[int, list[tuple[int, ...]]] = {}

    def note(token: int, tail: tuple[int, ...]) -> None:
        tails = found.setdefault(token, [])
        if tail not in tails:
            tails.append(tail)

    for text in texts:
        whole = text.encode()
        for token, piece in enumerate(pieces):
            if whole in piece:
                note(token, ())
        for n in range(1, len(text)):
            head, tail = text[:n].encode(), tuple(encode(text[n:])[:_N_TAIL])
            for token, piece in enumerate(pieces):
                if piece.endswith(head) and whole not in piece:
                    note(token, tail)
    return found
