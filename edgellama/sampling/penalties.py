"""Samplers that look at the text: penalties of tokens that have been said, DRY.

Sources: Keskar et al., CTRL, 2019 (repeat penalty); the OpenAI API's reference (presence, frequency);
oobabooga's text-generation-webui PR 5677 (DRY: don't repeat yourself).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from .filters import Candidates
from .params import SamplingParams

# First token of a sequence breaker -> what may follow it to make the breaker whole.
Breakers = Mapping[int, Sequence[tuple[int, ...]]]

_LARGEST_LOG = 88.0  # of an f32
_N_TAIL = 20


def last(text: Sequence[int], n: int) -> Sequence[int]:
    """Return the last n tokens; -1 is all."""
    return text[max(len(text) - n, 0) :] if n >= 0 else text


def penalize(c: Candidates, text: Sequence[int], params: SamplingParams) -> Candidates:
    """Make what was said lately less likely: once, per token, and per time it was said."""
    repeat, frequency = params.repeat_penalty, params.frequency_penalty
    presence = params.presence_penalty
    if (repeat, frequency, presence) == (1.0, 0.0, 0.0):
        return c
    counts = Counter(last(text, params.repeat_last_n))

    def change(ids: list[int], logits: np.ndarray) -> np.ndarray:
        times = np.array([counts[i] for i in ids])
        logits = np.where(logits <= 0, logits * repeat, logits / repeat)
        return logits - (times * frequency + presence)

    return _edit(c, counts, change)


def dry(
    c: Candidates, text: Sequence[int], params: SamplingParams, breakers: Breakers
) -> Candidates:
    """Make tokens less likely that would prolong a repetition, the more the longer it is."""
    if params.dry_multiplier == 0.0 or params.dry_penalty_last_n == 0:
        return c
    allowed, log_base = params.dry_allowed_length, math.log(params.dry_base)
    most = allowed + (int(_LARGEST_LOG / log_base) if log_base > 1e-6 else 0)
    lengths = repetitions(last(text, params.dry_penalty_last_n), allowed, most, breakers)
    costs = {
        token: params.dry_multiplier * params.dry_base ** (length - allowed)
        for token, length in lengths.items()
        if () not in breakers.get(token, ())  # a breaker alone may always come
    }
    return _edit(c, costs, lambda ids, logits: logits - np.array([costs[i] for i in ids]))


def repetitions(text: Sequence[int], least: int, most: int, breakers: Breakers) -> dict[int, int]:
    """Map tokens that would prolong a repetition to its length so far, from `least` to `most`.

    A repetition is an end of the text that stands in it before; it holds no sequence breaker.
    """
    back = np.array(text[::-1], np.int64)  # the last token first
    limit = min(most, _unbroken(back, breakers))
    if len(back) <= least or limit < least:
        return {}
    lengths: dict[int, int] = {}
    at = np.arange(1, len(back))
    for n in range(limit):  # the ends of n + 1 tokens
        at = at[at + n < len(back)]
        at = at[back[at + n] == back[n]]
        if not len(at):
            break
        if n + 1 >= least:
            lengths.update(dict.fromkeys(back[at - 1].tolist(), n + 1))
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


def _edit(
    c: Candidates,
    tokens: Iterable[int],
    change: Callable[[list[int], np.ndarray], np.ndarray],
) -> Candidates:
    """Return candidates with the logits of some tokens changed, by rising id."""
    wanted = np.array(sorted(tokens), np.int64)
    if not len(wanted):
        return c
    if not np.all(c.ids[:-1] < c.ids[1:]):  # most likely first, which may no longer hold
        c = c.keep(np.argsort(c.ids))
    at = np.searchsorted(c.ids, wanted)
    at = at[c.ids[np.minimum(at, len(c.ids) - 1)] == wanted]
    logits = c.logits.copy()
    logits[at] = change(c.ids[at].tolist(), logits[at].astype(np.float64))
    return Candidates(c.ids, logits)
