"""From steps to an answer: draw a token, note it, turn it into text, look for an end.

What a token is drawn by is in `sampling.py`, what the model says next in `speculate.py`, which asks the
engine; `llm.py` puts these together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from edgellama.sampling import Sampler
from edgellama.speculate import Steps
from edgellama.stopping import StopStrings
from edgellama.tokenizer import Tokenizer


@dataclass(slots=True)
class Timings:
    """How long the parts took; `cached_n` prompt tokens came from an earlier call.

    Of the answer, `drafted_n` tokens were guessed and `accepted_n` guesses were right.
    """

    prompt_n: int = 0
    prompt_s: float = 0.0
    predicted_n: int = 0
    predicted_s: float = 0.0
    cached_n: int = 0
    drafted_n: int = 0
    accepted_n: int = 0


class Delta(NamedTuple):
    """A piece of an answer as it streams; the last one has a finish_reason."""

    text: str
    tokens: list[int]
    logprobs: None = None
    finish_reason: str | None = None
    timings: Timings | None = None


class Completion(NamedTuple):
    """A whole answer; finish_reason is "stop" or "length"."""

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings
    logprobs: None = None


class Constraint(Protocol):
    """What an answer has to look like; every answer has one of its own."""

    def mask(self) -> np.ndarray:
        """Return which tokens may come next, bool (V,); ends are among them where it may end."""

    def accept(self, token: int) -> None:
        """Note the token that came."""


def generate(
    ids: Sequence[int],
    steps: Steps,
    sampler: Sampler,
    tokenizer: Tokenizer,
    stops: StopStrings,
    max_tokens: int,
    constraint: Constraint | None = None,
) -> Iterator[Delta]:
    """Continue token ids, yielding the text piece by piece; closes `steps` at the end."""
    timings = Timings(prompt_n=len(ids))
    decoder = tokenizer.stream()
    reason = "length"
    try:
        start = time.perf_counter()
        logits = steps.begin(ids)
        timings.cached_n = steps.n_cached
        timings.prompt_s = time.perf_counter() - start
        start = time.perf_counter()
        while timings.predicted_n < max_tokens:
            token = sampler.sample(logits, None if constraint is None else constraint.mask())
            if token in tokenizer.eog_ids:
                reason = "stop"
                break
            sampler.accept(token)
            if constraint is not None:
                constraint.accept(token)
            timings.predicted_n += 1
            timings.predicted_s = time.perf_counter() - start
            text = stops.feed(decoder.feed(token))
            if stops.stopped:
                reason = "stop"
                yield Delta(text, [token])
                break
            yield Delta(text, [token])
            if timings.predicted_n == max_tokens:
                break
            logits = steps.follow(token, max_tokens - timings.predicted_n - 1)
        timings.drafted_n, timings.accepted_n = steps.n_drafted, steps.n_accepted
        rest = "" if stops.stopped else stops.feed(decoder.flush()) + stops.flush()
        yield Delta(rest, [], finish_reason=reason, timings=timings)
    finally:
        steps.close()


def collect(deltas: Iterator[Delta]) -> Completion:
    """Put the pieces of an answer together."""
    text, tokens = "", []
    for delta in deltas:
        text += delta.text
        tokens += delta.tokens
    assert delta.finish_reason is not None
    assert delta.timings is not None
    return Completion(text, tokens, delta.finish_reason, delta.timings)
