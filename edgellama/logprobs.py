"""Log probabilities of tokens: what the model itself says, before bias, samplers and grammar.

That is what llama.cpp's server reports, and what the OpenAI API means by `logprobs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgellama.tokenizer import Tokenizer


class TokenLogprob(NamedTuple):
    """The natural log of a token's probability; `top` are the likeliest tokens there, best first."""

    token: int
    piece: bytes
    logprob: float
    top: list[TokenLogprob]

    @property
    def text(self) -> str:
        """The token as text; a part of a character is U+FFFD."""
        return self.piece.decode(errors="replace")


class Logprobs:
    """Looks up log probabilities in logits, with those of the `n_top` likeliest tokens."""

    def __init__(self, tokenizer: Tokenizer, n_top: int = 0) -> None:
        self._tokenizer = tokenizer
        self._n_top = n_top

    def __call__(self, logits: np.ndarray, token: int) -> TokenLogprob:
        """Return what the logits f32 (V,) say of a token."""
        from edgellama.sampling.truncation import largest, weigh

        weights = weigh(logits)

        def entry(token: int, top: list[TokenLogprob]) -> TokenLogprob:
            return TokenLogprob(
                token, self._tokenizer.token_bytes(token), weights.logprob(token), top
            )

        top = largest(logits, self._n_top).tolist() if self._n_top else []
        return entry(token, [entry(other, []) for other in top])


class PromptLogprobs:
    """Collects the log probabilities of a prompt's tokens; None of the first."""

    def __init__(self, lookup: Logprobs, ids: Sequence[int]) -> None:
        self._lookup = lookup
        self._ids = ids
        self.found: list[TokenLogprob | None] = [None]

    def visit(self, first: int, rows: np.ndarray) -> None:
        """See logits f32 (n, V), the first of them those after token `first`."""
        following = self._ids[first + 1 : first + 1 + len(rows)]
        self.found += [
            self._lookup(row, token) for row, token in zip(rows, following, strict=False)
        ]
