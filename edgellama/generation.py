"""Answers as they grow: tokens are drawn, decoded, checked for stop strings, and given probabilities.

`stream` yields one answer piece by piece, `answer_together` makes several that share their prompt,
one step for all of them.  What the user calls is in `llm.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from edgellama.errors import ContextOverflowError
from edgellama.runtime.engine import Engine
from edgellama.sampling import Sampler
from edgellama.speculate import Steps, evaluate_prompt
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


class TokenLogprob(NamedTuple):
    """The model's own log probability of a token, before samplers; `top` are the likeliest then."""

    token: int
    text: str
    logprob: float
    top: list[TokenLogprob]


class Delta(NamedTuple):
    """A piece of an answer as it streams; the last one has a finish_reason.

    `logprobs` has an entry for each of `tokens`, if asked for; `prompt_logprobs`, of the last one,
    for each token of the prompt (None for the first).
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    timings: Timings | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


class Completion(NamedTuple):
    """A whole answer; finish_reason is "stop" or "length"."""

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


class Logprobs:
    """Looks up log probabilities in logits, with those of the `n_top` likeliest tokens."""

    def __init__(self, tokenizer: Tokenizer, n_top: int = 0) -> None:
        self._tokenizer = tokenizer
        self._n_top = n_top
        self.of_prompt: list[TokenLogprob | None] | None = None

    def __call__(self, logits: np.ndarray, token: int) -> TokenLogprob:
        """Return what the logits f32 (V,) say of a token."""
        from edgellama.sampling.filters import largest

        shifted = logits - logits.max()
        log_total = float(np.log(np.exp(shifted).sum(dtype=np.float64)))

        def entry(token: int, top: list[TokenLogprob]) -> TokenLogprob:
            text = self._tokenizer.token_bytes(token).decode(errors="replace")
            return TokenLogprob(token, text, float(shifted[token]) - log_total, top)

        top = largest(logits, self._n_top).tolist() if self._n_top else []
        return entry(token, [entry(other, []) for other in top])

    def visitor(self, ids: Sequence[int]) -> Callable[[int, np.ndarray], None]:
        """Return what `Steps.begin` calls with the rows of a prompt; fills `of_prompt`."""
        known: list[TokenLogprob | None] = [None]
        self.of_prompt = known

        def visit(first: int, rows: np.ndarray) -> None:
            following = ids[first + 1 : first + 1 + len(rows)]
            known.extend(self(row, token) for row, token in zip(rows, following, strict=False))

        return visit


class Answer:
    """One answer: its sampler, its tokens so far, and why it ended."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampler: Sampler,
        stops: StopStrings,
        max_tokens: int,
        logprobs: Logprobs | None = None,
    ) -> None:
        self.sampler = sampler
        self.max_tokens = max_tokens
        self.tokens: list[int] = []
        self.finish_reason = None if max_tokens else "length"
        self._ends = tokenizer.eog_ids
        self._decoder = tokenizer.stream()
        self._stops = stops
        self._logprobs = logprobs

    def take(self, logits: np.ndarray) -> Delta | None:
        """Draw the next token from logits f32 (V,); None at an end of generation."""
        token = self.sampler.sample(logits)
        if token in self._ends:
            self.finish_reason = "stop"
            return None
        self.tokens.append(token)
        text = self._stops.feed(self._decoder.feed(token))
        if self._stops.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_tokens:
            self.finish_reason = "length"
        return Delta(text, [token], [self._logprobs(logits, token)] if self._logprobs else None)

    def rest(self) -> str:
        """Return the text that was held back, at the end."""
        if self._stops.stopped:
            return ""
        return self._stops.feed(self._decoder.flush()) + self._stops.flush()


def stream(
    new_steps: Callable[[], Steps],
    ids: list[int],
    answer: Answer,
    of_prompt: Logprobs | None = None,
) -> Iterator[Delta]:
    """Answer a prompt piece by piece; `of_prompt` collects the prompt's log probabilities.

    Nothing is held before the first piece is asked for.
    """
    timings = Timings(prompt_n=len(ids))
    steps = new_steps()
    try:
        start = time.perf_counter()
        logits = steps.begin(ids, of_prompt.visitor(ids) if of_prompt else None)
        timings.cached_n = steps.n_cached
        timings.prompt_s = time.perf_counter() - start
        start = time.perf_counter()
        while answer.finish_reason is None:
            delta = answer.take(logits)
            if delta is None:
                break
            timings.predicted_n += 1
            timings.predicted_s = time.perf_counter() - start
            yield delta
            if answer.finish_reason is None:
                n_more = answer.max_tokens - timings.predicted_n - 1
                logits = steps.follow(delta.tokens[0], n_more)
        timings.drafted_n, timings.accepted_n = steps.n_drafted, steps.n_accepted
        yield _last_delta(answer, timings, of_prompt)
    finally:
        steps.close()


def answer_together(
    engine: Engine, ids: list[int], answers: list[Answer], of_prompt: Logprobs | None = None
) -> list[Completion]:
    """Answer a prompt several times at once; every step takes a token of each answer.

    The prompt is evaluated once: sequences share the pages that it fills.  When the cache is full,
    the last answer waits until another is done.
    """
    timings = Timings(prompt_n=len(ids))
    deltas: dict[Answer, list[Delta]] = {answer: [] for answer in answers}
    live = {answers[0]: engine.new_sequence()}
    try:
        start = time.perf_counter()
        visit = of_prompt.visitor(ids) if of_prompt else None
        logits = evaluate_prompt(engine, live[answers[0]], ids, visit)
        timings.cached_n = live[answers[0]].n_reused
        timings.prompt_s = time.perf_counter() - start
        start = time.perf_counter()

        def take(answer: Answer, logits: np.ndarray) -> None:
            delta = None if answer.finish_reason else answer.take(logits)
            if delta is not None:
                deltas[answer].append(delta)
            if answer.finish_reason is not None:
                own = replace(timings, predicted_n=len(answer.tokens))
                own.predicted_s = time.perf_counter() - start
                deltas[answer].append(_last_delta(answer, own, of_prompt))
                if answer in live:
                    engine.free(live.pop(answer))

        for answer in answers:
            take(answer, logits)
        waiting = deque(a for a in answers if a.finish_reason is None and a not in live)
        n_most = len(answers)
        while waiting or live:
            while waiting and len(live) < n_most:
                live[waiting.popleft()] = engine.new_sequence()
            batch = [(s, [*ids, *a.tokens][len(s.tokens) :]) for a, s in live.items()]
            try:
                rows = engine.step(batch)
            except ContextOverflowError:
                if len(live) == 1:
                    raise
                answer, sequence = live.popitem()
                engine.free(sequence)
                waiting.appendleft(answer)
                n_most = len(live)
                continue
            for answer, row in zip(list(live), rows, strict=True):
                take(answer, row)
    finally:
        for sequence in live.values():
            engine.free(sequence)
    return [collect(iter(deltas[answer])) for answer in answers]


def collect(deltas: Iterator[Delta]) -> Completion:
    """Join the pieces of an answer."""
    text, tokens, logprobs = "", list[int](), list[TokenLogprob]()
    for delta in deltas:
        text += delta.text
        tokens += delta.tokens
        logprobs += delta.logprobs or []
    assert delta.finish_reason is not None
    assert delta.timings is not None
    return Completion(
        text, tokens, delta.finish_reason, delta.timings, logprobs or None, delta.prompt_logprobs
    )


def _last_delta(answer: Answer, timings: Timings, of_prompt: Logprobs | None) -> Delta:
    return Delta(
        answer.rest(),
        [],
        None,
        answer.finish_reason,
        timings,
        of_prompt.of_prompt if of_prompt else None,
    )
