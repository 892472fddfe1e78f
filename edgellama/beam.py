"""Beam search: keeps the likeliest texts of every length.

Every step grows all beams at once; where one splits, its sequence is forked.
Source: Sutskever et al., Sequence to sequence learning, 2014;
Wu et al., Google's neural machine translation system, 2016 (length penalty).
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from edgellama.generation import Completion, Timings
from edgellama.logprobs import TokenLogprob
from edgellama.runtime.engine import Engine
from edgellama.runtime.kvcache import Sequence
from edgellama.sampling.truncation import largest, weigh
from edgellama.stopping import StopStrings
from edgellama.tokenizer import Tokenizer


class Beam(NamedTuple):
    """A text after the prompt; an end of generation counts, and is not among `tokens`."""

    parent: int = 0  # which beam of the step before it grew from
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0  # of the log probabilities
    is_ended: bool = False

    def score(self, length_penalty: float) -> float:
        """Log probability, set against the length."""
        return self.total / max(len(self.logprobs), 1) ** length_penalty


class Beams:
    """A search for the `width` best texts; one ends at an end of generation or a stop string."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        width: int,
        length_penalty: float,
        stop: str | SequenceOf[str] = (),
        logprobs: bool = False,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._width = width
        self._length_penalty = length_penalty
        self._stop = stop
        self._logprobs = logprobs
        StopStrings(stop)  # an error comes before the search

    def search(self, ids: list[int], max_tokens: int) -> list[Completion]:
        """Return up to `width` continuations of a prompt, the best first.

        The search is over when that many have ended and no beam is better than they are, or at
        `max_tokens`.
        """
        engine = self._engine
        timings = Timings(prompt_n=len(ids))
        beams, ended = [Beam()], list[Beam]()
        sequences = [engine.new_sequence()]
        start = time.perf_counter()
        try:
            for n in range(max_tokens):
                if n == 0:
                    rows = engine.step([(sequences[0], ids)])
                    timings.prompt_s = time.perf_counter() - start
                    timings.cached_n = sequences[0].n_reused
                else:
                    sequences = self._forks(sequences, beams)
                    batch = zip(sequences, beams, strict=True)
                    rows = engine.step([(s, beam.tokens[-1:]) for s, beam in batch])
                beams, new = self._grow(beams, rows)
                ended = self._best(ended + new)
                is_full = len(ended) == self._width
                if not beams or (is_full and self._score(ended[-1]) >= self._score(beams[0])):
                    beams = []
                    break
        finally:
            for sequence in sequences:
                engine.free(sequence)
        timings.predicted_s = time.perf_counter() - start - timings.prompt_s
        return [self._complete(beam, timings) for beam in self._best(ended + beams)]

    def _score(self, beam: Beam) -> float:
        return beam.score(self._length_penalty)

    def _best(self, beams: list[Beam]) -> list[Beam]:
        return sorted(beams, key=self._score, reverse=True)[: self._width]

    def _forks(self, old: list[Sequence], beams: list[Beam]) -> list[Sequence]:
        """Return a sequence of each beam's text but for its last token, and free the old ones."""
        new = [self._engine.fork(old[beam.parent]) for beam in beams]
        for sequence in old:
            self._engine.free(sequence)
        return new

    def _grow(self, beams: list[Beam], rows: np.ndarray) -> tuple[list[Beam], list[Beam]]:
        """Return the `width` likeliest texts one token longer, and those as likely that ended."""
        ends = self._tokenizer.eog_ids
        grown = []
        for i, (beam, row) in enumerate(zip(beams, rows, strict=True)):
            weights = weigh(row)
            for token in largest(row, self._width + len(ends)).tolist():
                logprob = weights.logprob(token)
                is_end = token in ends
                tokens = beam.tokens if is_end else (*beam.tokens, token)
                grown.append(
                    Beam(i, tokens, (*beam.logprobs, logprob), beam.total + logprob, is_end)
                )
        grown.sort(key=lambda beam: beam.total, reverse=True)
        going, ended = list[Beam](), list[Beam]()
        for beam in grown:
            if len(going) == self._width:
                break
            if not beam.is_ended and self._stop and self._text(beam)[1]:
                beam = beam._replace(is_ended=True)
            (ended if beam.is_ended else going).append(beam)
        return going, ended

    def _text(self, beam: Beam) -> tuple[str, bool]:
        """Return the text of a beam, and whether a stop string ended it."""
        decoder, stops = self._tokenizer.stream(), StopStrings(self._stop)
        text = "".join(map(decoder.feed, beam.tokens)) + decoder.flush()
        text = stops.feed(text)
        return text + stops.flush(), stops.stopped

    def _complete(self, beam: Beam, timings: Timings) -> Completion:
        logprobs = None
        if self._logprobs:
            logprobs = [
                TokenLogprob(token, self._tokenizer.token_bytes(token), logprob, [])
                for token, logprob in zip(beam.tokens, beam.logprobs, strict=False)  # but the end's
            ]
        return Completion(
            self._text(beam)[0],
            list(beam.tokens),
            "stop" if beam.is_ended else "length",
            replace(timings, predicted_n=len(beam.tokens)),
            logprobs,
        )
