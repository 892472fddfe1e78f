"""Beam search: keeps the likeliest texts of every length.

A beam that splits is a new sequence, which takes the full pages of its text from the cache and
evaluates the rest, at most a page.  Source: Sutskever et al., Sequence to sequence learning, 2014;
Wu et al., Google's neural machine translation system, 2016 (length penalty).
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from edgellama.generation import Completion, Timings, TokenLogprob
from edgellama.runtime.engine import Engine
from edgellama.runtime.kvcache import Sequence
from edgellama.sampling.filters import largest
from edgellama.tokenizer import Tokenizer


class Beam(NamedTuple):
    """A text after the prompt; an end of generation counts, and is not among `tokens`."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    is_ended: bool = False

    @property
    def logprob(self) -> float:
        """Log probability of the whole."""
        return sum(self.logprobs)

    def score(self, length_penalty: float) -> float:
        """Log probability, set against the length."""
        return self.logprob / max(len(self.logprobs), 1) ** length_penalty


def search(
    engine: Engine,
    tokenizer: Tokenizer,
    ids: list[int],
    n_beams: int,
    max_tokens: int,
    length_penalty: float,
) -> list[Completion]:
    """Return up to `n_beams` continuations of a prompt, the best first.

    The search is over when that many have ended and no beam is better than they are, or at
    `max_tokens`.
    """
    timings = Timings(prompt_n=len(ids))
    beams, ended = [Beam()], list[Beam]()
    sequences: list[Sequence] = []

    def best_first(found: list[Beam]) -> list[Beam]:
        return sorted(found, key=lambda beam: -beam.score(length_penalty))[:n_beams]

    start = time.perf_counter()
    try:
        for n in range(max_tokens):
            texts = [[*ids, *beam.tokens] for beam in beams]
            sequences = _place(engine, sequences, texts)
            rows = engine.step(
                [(s, text[len(s.tokens) :]) for s, text in zip(sequences, texts, strict=True)]
            )
            if n == 0:
                timings.prompt_s = time.perf_counter() - start
                timings.cached_n = sequences[0].n_reused
            beams, new = _grow(beams, rows, n_beams, tokenizer.eog_ids)
            ended = best_first(ended + new)
            is_full = len(ended) == n_beams
            if is_full and ended[-1].score(length_penalty) >= beams[0].score(length_penalty):
                beams = []
                break
    finally:
        for sequence in sequences:
            engine.free(sequence)
    timings.predicted_s = time.perf_counter() - start - timings.prompt_s
    return [_complete(beam, tokenizer, timings) for beam in best_first(ended + beams)]


def _place(engine: Engine, old: list[Sequence], texts: list[list[int]]) -> list[Sequence]:
    """Return a sequence for each text: the one that holds all but its last token, or a new one."""
    left = list(old)
    placed = []
    for text in texts:
        held = next((s for s in left if s.tokens == text[:-1]), None)
        if held is not None:
            left.remove(held)
        placed.append(held or engine.new_sequence())
    for sequence in left:
        engine.free(sequence)
    return placed


def _grow(
    beams: list[Beam], rows: np.ndarray, n_beams: int, ends: frozenset[int]
) -> tuple[list[Beam], list[Beam]]:
    """Return the `n_beams` likeliest texts one token longer, and those as likely that ended."""
    grown = []
    for beam, row in zip(beams, rows, strict=True):
        shifted = row.astype(np.float64) - row.max()
        shifted -= np.log(np.exp(shifted).sum())
        for token in largest(shifted, n_beams + len(ends)).tolist():
            is_ended = token in ends
            tokens = beam.tokens if is_ended else (*beam.tokens, token)
            grown.append(Beam(tokens, (*beam.logprobs, float(shifted[token])), is_ended))
    grown.sort(key=lambda beam: -beam.logprob)
    going, ended = list[Beam](), list[Beam]()
    for beam in grown:
        if len(going) == n_beams:
            break
        (ended if beam.is_ended else going).append(beam)
    return going, ended


def _complete(beam: Beam, tokenizer: Tokenizer, timings: Timings) -> Completion:
    decoder = tokenizer.stream()
    text = "".join(map(decoder.feed, beam.tokens)) + decoder.flush()
    logprobs = [
        TokenLogprob(token, tokenizer.token_bytes(token).decode(errors="replace"), logprob, [])
        for token, logprob in zip(beam.tokens, beam.logprobs, strict=False)  # but for the end's
    ]
    return Completion(
        text, list(beam.tokens), "stop" if beam.is_ended else "length", timings, logprobs
    )
