"""From steps to an answer: draw a token, note it, turn it into text, look for an end.

`Answer` is one answer as it grows, `stream` yields it piece by piece, `answer_together` makes several
of one prompt at once, `answer_all` answers many prompts, some at a time.  What a token is drawn by is in
`sampling/`, what the model says next in `speculate.py`, which asks the engine; `llm.py` puts these
together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from edgellama.errors import ContextOverflowError
from edgellama.logprobs import Logprobs, PromptLogprobs, TokenLogprob
from edgellama.runtime.engine import Engine
from edgellama.runtime.kvcache import Sequence
from edgellama.sampling import Sampler
from edgellama.speculate import Steps, evaluate_prompt
from edgellama.stopping import StopStrings
from edgellama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgellama.chat import ToolCall


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
    """A piece of an answer as it streams; the last one has a finish_reason.

    `logprobs` has an entry for each of `tokens`, if asked for; `prompt_logprobs`, of the last one,
    for each token of the prompt (None for the first).  In a chat, `text` is what is neither reasoning
    nor a tool call; a call comes when it is complete.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    timings: Timings | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] | None = None


class Completion(NamedTuple):
    """A whole answer; finish_reason is "stop", "length", or in a chat "tool_calls"."""

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] | None = None

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message, to be added to the chat's."""
        from edgellama.chat.messages import assistant_message

        return assistant_message(self.text, self.reasoning, self.tool_calls or [])


class Constraint(Protocol):
    """What an answer has to look like; every answer has one of its own."""

    def mask(self) -> np.ndarray:
        """Return which tokens may come next, bool (V,); ends are among them where it may end."""

    def accept(self, token: int) -> None:
        """Note the token that came."""


class Answer:
    """One answer as it grows, and why it ended: at most `max_tokens`, begun within `max_time_s`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampler: Sampler,
        stops: StopStrings,
        max_tokens: int,
        *,
        max_time_s: float = float("inf"),
        logprobs: Logprobs | None = None,
        constraint: Constraint | None = None,
        shown: frozenset[int] = frozenset(),
        n_keep: int | None = None,
    ) -> None:
        self.n_keep = n_keep  # first tokens that stay when the context is full; None: it ends there
        self.sampler = sampler
        self.max_tokens = max_tokens
        self.tokens: list[int] = []
        self.finish_reason = None if max_tokens else "length"
        self._max_time_s = max_time_s
        self._ends = tokenizer.eog_ids
        self._decoder = tokenizer.stream(shown)
        self._stops = stops
        self._logprobs = logprobs
        self._constraint = constraint

    def take(self, logits: np.ndarray, elapsed_s: float) -> Delta | None:
        """Draw the next token from logits f32 (V,); None at an end of generation."""
        constraint = self._constraint
        token = self.sampler.sample(logits, None if constraint is None else constraint.mask())
        if token in self._ends:
            self.finish_reason = "stop"
            return None
        self.sampler.accept(token)
        if constraint is not None:
            constraint.accept(token)
        self.tokens.append(token)
        text = self._stops.feed(self._decoder.feed(token))
        if self._stops.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_tokens or elapsed_s >= self._max_time_s:
            self.finish_reason = "length"
        return Delta(text, [token], [self._logprobs(logits, token)] if self._logprobs else None)

    def last_delta(self, timings: Timings, of_prompt: PromptLogprobs | None) -> Delta:
        """Return the text that was held back, and why the answer ended."""
        rest = ""
        if not self._stops.stopped:
            rest = self._stops.feed(self._decoder.flush()) + self._stops.flush()
        known = of_prompt.found if of_prompt else None
        return Delta(rest, [], None, self.finish_reason, timings, known)


def stream(
    new_steps: Callable[[], Steps],
    ids: list[int],
    answer: Answer,
    of_prompt: PromptLogprobs | None = None,
) -> Iterator[Delta]:
    """Answer a prompt piece by piece; nothing is held before the first piece is asked for."""
    timings = Timings(prompt_n=len(ids))
    steps = new_steps()
    try:
        begin = time.perf_counter()
        logits = steps.begin(ids, of_prompt.visit if of_prompt else None)
        timings.cached_n = steps.n_cached
        start = time.perf_counter()
        timings.prompt_s = start - begin
        while answer.finish_reason is None:
            delta = answer.take(logits, time.perf_counter() - begin)
            if delta is None:
                break
            timings.predicted_n += 1
            timings.predicted_s = time.perf_counter() - start
            yield delta
            if answer.finish_reason is None:
                n_more = answer.max_tokens - timings.predicted_n - 1
                logits = steps.follow(delta.tokens[0], n_more)
        timings.drafted_n, timings.accepted_n = steps.n_drafted, steps.n_accepted
        yield answer.last_delta(timings, of_prompt)
    finally:
        steps.close()


def answer_together(
    engine: Engine, ids: list[int], answers: list[Answer], of_prompt: PromptLogprobs | None = None
) -> list[Completion]:
    """Answer a prompt several times at once; every step takes a token of each answer.

    The prompt is evaluated once: sequences are forks that share its pages.  When the cache is full,
    the last answer waits until another is done.
    """
    timings = Timings(prompt_n=len(ids))
    deltas: dict[Answer, list[Delta]] = {answer: [] for answer in answers}
    first = engine.new_sequence()
    live = {answers[0]: first}
    try:
        begin = time.perf_counter()
        logits = evaluate_prompt(engine, first, ids, of_prompt.visit if of_prompt else None)
        timings.cached_n = first.n_reused
        live |= {answer: engine.fork(first) for answer in answers[1:]}
        start = time.perf_counter()
        timings.prompt_s = start - begin

        def take(answer: Answer, logits: np.ndarray) -> None:
            delta = None
            if answer.finish_reason is None:
                delta = answer.take(logits, time.perf_counter() - begin)
            if delta is not None:
                deltas[answer].append(delta)
            if answer.finish_reason is not None:
                own = replace(timings, predicted_n=len(answer.tokens))
                own.predicted_s = time.perf_counter() - start
                deltas[answer].append(answer.last_delta(own, of_prompt))
                engine.free(live.pop(answer))

        for answer in answers:
            take(answer, logits)
        waiting = deque[Answer]()
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
    return [collect(deltas[answer]) for answer in answers]


class Request(NamedTuple):
    """A prompt and the answer it is to get; `read` makes of its pieces what a chat shows."""

    ids: list[int]
    answer: Answer
    of_prompt: PromptLogprobs | None = None
    read: Callable[[Iterable[Delta]], Iterable[Delta]] = iter


class _Live:
    """A request that is being answered."""

    def __init__(self, index: int, request: Request, sequence: Sequence) -> None:
        self.index = index
        self.request = request
        self.sequence = sequence
        self.deltas: list[Delta] = []
        self.timings = Timings(prompt_n=len(request.ids))
        self.begin = time.perf_counter()

    def pending(self) -> list[int]:
        """What the model has not read yet."""
        return [*self.request.ids, *self.request.answer.tokens][len(self.sequence.tokens) :]

    def take(self, logits: np.ndarray) -> Completion | None:
        """Draw a token; return the answer when it has ended."""
        answer, timings = self.request.answer, self.timings
        elapsed_s = time.perf_counter() - self.begin
        if not self.deltas:
            timings.prompt_s, timings.cached_n = elapsed_s, self.sequence.n_reused
        delta = None if answer.finish_reason else answer.take(logits, elapsed_s)
        if delta is not None:
            self.deltas.append(delta)
        if answer.finish_reason is None:
            return None
        timings.predicted_n = len(answer.tokens)
        timings.predicted_s = elapsed_s - timings.prompt_s
        self.deltas.append(answer.last_delta(timings, self.request.of_prompt))
        return collect(self.request.read(self.deltas))


def answer_all(
    engine: Engine, requests: Iterable[tuple[int, Request]], n_parallel: int
) -> Iterator[tuple[int, Completion]]:
    """Answer requests, up to `n_parallel` at a time; yield each answer with its index when it is done.

    A step takes the next token of every live one, and the prompts of new ones.  When the cache is full,
    the last to come waits until another is done.
    """
    coming = (_Live(index, request, engine.new_sequence()) for index, request in requests)
    live: list[_Live] = []
    waiting: list[_Live] = []
    n_most = n_parallel
    try:
        while True:
            while len(live) < n_most:
                following = waiting.pop() if waiting else next(coming, None)
                if following is None:
                    break
                live.append(following)
            if not live:
                return
            try:
                rows = engine.step([(one.sequence, one.pending()) for one in live])
            except ContextOverflowError:
                if len(live) == 1:
                    raise
                waiting.append(live.pop())
                engine.free(waiting[-1].sequence)
                waiting[-1].sequence = engine.new_sequence()
                n_most = len(live)
                continue
            for one, row in zip(list(live), rows, strict=True):
                done = one.take(row)
                if done is not None:
                    live.remove(one)
                    engine.free(one.sequence)
                    n_most = min(n_most + 1, n_parallel)
                    yield one.index, done
    finally:
        for one in live:
            engine.free(one.sequence)


def collect(deltas: Iterable[Delta]) -> Completion:
    """Put the pieces of an answer together."""
    text, reasoning, tokens = "", "", list[int]()
    logprobs, calls = list[TokenLogprob](), list["ToolCall"]()
    for delta in deltas:
        text += delta.text
        reasoning += delta.reasoning
        tokens += delta.tokens
        logprobs += delta.logprobs or []
        calls += delta.tool_calls or []
    assert delta.finish_reason is not None
    assert delta.timings is not None
    return Completion(
        text, tokens, delta.finish_reason, delta.timings, logprobs or None, delta.prompt_logprobs,
        reasoning, calls or None,
    )  # fmt: skip
