"""Speculative decoding: cheap guesses of the next tokens, checked by the model several in one step.

A step of 8 tokens costs 2.4 steps of one, so guesses that are often right are a gain.  The sampler
draws every token from the same logits and in the same order as without guesses, and a guess counts
only if it is the token drawn: as logits do not depend on how many tokens a step has, the text is the
same to the last token, greedy or sampled.  `Lookup` guesses from the text itself, `DraftModel` from
a smaller model.

Source: Leviathan et al., Fast inference from transformers via speculative decoding, 2023; Saxena,
Prompt lookup decoding, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from collections.abc import Sequence as SequenceOf
from itertools import takewhile
from typing import Protocol

import numpy as np

from edgellama.errors import ContextOverflowError, UsageError
from edgellama.runtime.engine import Engine
from edgellama.runtime.kvcache import Sequence
from edgellama.sampling import Sampler

N_MOST = 15  # a step of 16 tokens takes 3.7 steps of one, of 32 tokens 6.5
_COST = 0.25  # of one more token in a step, in steps of one token: 0.15 to 0.35 measured
_N_VISITED = 64  # rows of logits at a time: 64 MB of V = 262144
_N_GRAMS = {3: 0.7, 2: 0.5}  # with the share of right guesses to begin with


def check_same_vocabulary(name: str, tokens: list[str], draft: str, others: list[str]) -> None:
    """Check that a draft model's token ids mean what the model's mean.

    Raises: UsageError naming the difference.
    """
    if len(tokens) != len(others):
        seen = f"{draft} has {len(others)} tokens, {name} {len(tokens)}"
    elif tokens != others:
        i = next(i for i, pair in enumerate(zip(tokens, others, strict=True)) if len({*pair}) > 1)
        seen = f"token {i} is {others[i]!r} in {draft}, {tokens[i]!r} in {name}"
    else:
        return
    raise UsageError(f"a draft model needs the vocabulary of the model: {seen}")


class Pace:
    """How many tokens are worth guessing, from how many of the last ones were right.

    With a share `rate` of right ones, the n-th token of a guess counts with probability rate ** n,
    and is worth it while that exceeds its cost.
    """

    def __init__(self, rate: float, cost: float = _COST) -> None:
        self._rate = rate
        self._cost = cost

    def choose(self) -> int:
        """Return how many tokens to guess now: 0 to N_MOST."""
        if self._rate < self._cost:
            self._rate *= 1.02  # in a while, one more try
            return 0
        n = math.log(self._cost) / math.log(min(self._rate, 0.999))
        return min(int(n + 1e-9), N_MOST)

    def learn(self, n_drafted: int, n_accepted: int) -> None:
        """Note how a guess went; what follows its first wrong token says nothing."""
        n_seen = min(n_accepted + 1, n_drafted)
        self._rate = (8 * self._rate + n_accepted) / (8 + n_seen)


class Drafter(Protocol):
    """Whoever guesses; every answer has one of its own.  Nothing is worth guessing from an end on."""

    def propose(self, text: SequenceOf[int], n_most: int, sampler: Sampler) -> list[int]:
        """Guess up to `n_most` tokens that follow a text, which has grown since the last time."""

    def learn(self, n_drafted: int, n_accepted: int) -> None:
        """Note how the last guess went."""

    def close(self) -> None:
        """Free what was held for the answer."""


class Lookup:
    """Guesses that what followed the same last tokens before will follow them again.

    The index says for every n-gram what place came after its latest occurrence; the end of the text
    is not in it, for nothing has come after that yet.
    """

    def __init__(self, ends: Container[int] = ()) -> None:
        self._ends = ends
        self._after: dict[tuple[int, ...], int] = {}
        self._n_indexed = 0
        self._paces = {n: Pace(rate) for n, rate in _N_GRAMS.items()}
        self._used = self._paces[2]

    def propose(self, text: SequenceOf[int], n_most: int, sampler: Sampler) -> list[int]:
        """Guess up to `n_most` tokens, by the longest n-gram that was seen before."""
        if len(text) < self._n_indexed:  # its middle was dropped
            self._after.clear()
            self._n_indexed = 0
        for end in range(max(self._n_indexed, 2), len(text)):
            for n in _N_GRAMS:
                if n <= end:
                    self._after[tuple(text[end - n : end])] = end
        self._n_indexed = len(text)
        for n in _N_GRAMS:
            at = self._after.get(tuple(text[-n:])) if n <= len(text) else None
            if at is not None:
                self._used = self._paces[n]
                period = len(text) - at  # past its end, the text is taken to repeat itself
                n_tokens = min(self._used.choose(), n_most)
                guess = (text[at + i % period] for i in range(n_tokens))
                return list(takewhile(lambda token: token not in self._ends, guess))
        return []

    def learn(self, n_drafted: int, n_accepted: int) -> None:
        """Note how the last guess went, for n-grams of that length."""
        self._used.learn(n_drafted, n_accepted)

    def close(self) -> None:
        """There is nothing to free."""


class DraftModel:
    """Guesses what a smaller model of the same vocabulary would say.

    It draws with a fork of the answer's sampler, random stream and all: where the two models agree,
    so do the draws.
    """

    def __init__(self, engine: Engine, cost: float, ends: Container[int] = ()) -> None:
        self._engine = engine
        self._sequence = engine.new_sequence()
        self._ends = ends
        self._n_known = 0  # this many tokens of the sequence are the text's
        self._pace = Pace(0.8, min(_COST + cost, 0.5))  # who asks for a draft gets one

    def propose(self, text: SequenceOf[int], n_most: int, sampler: Sampler) -> list[int]:
        """Guess up to `n_most` tokens, one step of the draft model for each."""
        n_tokens = min(self._pace.choose(), n_most, self._engine.n_ctx + 1 - len(text))
        if n_tokens <= 0:
            return []
        said = self._sequence.tokens
        if len(text) < self._n_known:  # its middle was dropped
            self._n_known = 0
        n = min(self._n_known, len(said))
        while n < min(len(said), len(text) - 1) and said[n] == text[n]:
            n += 1
        self._engine.truncate(self._sequence, n)
        self._n_known = len(text)
        sampler = sampler.fork()
        new, draft = list(text[n:]), list[int]()
        while len(draft) < n_tokens:
            token = sampler.sample(self._engine.evaluate(self._sequence, new))
            if token in self._ends:
                break
            sampler.accept(token)
            draft.append(token)
            new = [token]
        return draft

    def learn(self, n_drafted: int, n_accepted: int) -> None:
        """Note how the last guess went."""
        self._pace.learn(n_drafted, n_accepted)

    def close(self) -> None:
        """Forget the text."""
        self._engine.free(self._sequence)


def evaluate_prompt(
    engine: Engine,
    sequence: Sequence,
    ids: SequenceOf[int],
    visit: Callable[[int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Evaluate a prompt and return the logits f32 (V,) after it.

    `visit(first, rows)` sees those after every token: rows f32 (n, V), from token `first` on. Then
    nothing is taken from the cache.
    """
    if visit is None:
        return engine.evaluate(sequence, ids)
    for first in range(0, len(ids), _N_VISITED):
        rows = engine.evaluate_each(sequence, ids[first : first + _N_VISITED])
        visit(first, rows)
    return rows[-1]


class Steps:
    """The model's logits after each token of an answer, computed ahead where a drafter guesses right.

    A caller draws a token from the logits and asks for those after it; it does not see the guesses.
    When the context is full and `n_keep` is given, the text goes on without the older half of what
    follows its first `n_keep` tokens (`Engine.shift`).
    """

    def __init__(
        self,
        engine: Engine,
        sampler: Sampler,
        drafter: Drafter | None = None,
        n_keep: int | None = None,
    ) -> None:
        self._n_keep = n_keep
        self._engine = engine
        self._sampler = sampler
        self._drafter = drafter
        self._sequence = engine.new_sequence()
        self.text: list[int] = []
        self._draft: list[int] = []
        self._rows = np.empty((0, 0), np.float32)  # (1 + n_drafted, V): the last step's
        self._row = 0
        self.n_cached = 0
        self.n_drafted = 0
        self.n_accepted = 0

    def begin(
        self, ids: SequenceOf[int], visit: Callable[[int, np.ndarray], None] | None = None
    ) -> np.ndarray:
        """Return the logits f32 (V,) after a prompt; see `evaluate_prompt`."""
        self.text += ids
        logits = evaluate_prompt(self._engine, self._sequence, ids, visit)
        self.n_cached = self._sequence.n_reused
        return logits

    def follow(self, token: int, n_more: int) -> np.ndarray:
        """Return the logits f32 (V,) after one more token; at most `n_more` are asked for later."""
        self.text.append(token)
        if self._drafter is None:
            self._make_room()
            return self._engine.evaluate(self._sequence, [token])
        if self._row < len(self._draft) and token == self._draft[self._row]:
            self._row += 1
            self.n_accepted += 1
            return self._rows[self._row]
        if self._draft:
            self._drafter.learn(len(self._draft), self._row)
            self._engine.truncate(self._sequence, len(self.text) - 1)
        self._draft = []
        self._row = 0
        self._make_room()
        n_more = min(n_more, self._engine.n_ctx - len(self.text))
        try:
            draft = self._drafter.propose(self.text, n_more, self._sampler) if n_more else []
            if draft:
                self._rows = self._engine.evaluate_each(self._sequence, [token, *draft])
                self._draft = draft
                self.n_drafted += len(draft)
                return self._rows[0]
        except ContextOverflowError:
            pass  # other sequences fill the cache; one token may still fit
        return self._engine.evaluate(self._sequence, [token])

    def _make_room(self) -> None:
        if self._n_keep is not None and len(self.text) > self._engine.n_ctx:
            self._engine.shift(self._sequence, self._n_keep)
            self.text[:-1] = self._sequence.tokens

    def close(self) -> None:
        """Forget the text."""
        self._engine.free(self._sequence)
        if self._drafter is not None:
            self._drafter.close()
