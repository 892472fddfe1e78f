"""The sampler of one answer: edits the logits, passes the candidates through the chain, draws.

A greedy sampler needs an argmax, and imports nothing else of this folder.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellama.errors import EdgeLlamaError, UsageError

from .history import History
from .options import SamplingOptions, check_count

if TYPE_CHECKING:
    from random import Random

    from .dry import Breakers
    from .mirostat import Mirostat
    from .truncation import Candidates

# Called with all token ids so far, i64 (n,), and the logits of the next, f32 (V,), which it changes
# in place or replaces by the row that it returns.  Both arrays are good until it returns.  An
# `accept(token)` that it has is told of every token that the answer goes on with.
LogitsProcessor = Callable[[np.ndarray, np.ndarray], Any]

_WITH_MIROSTAT = ("penalties", "dry", "temperature")  # which has its own way of cutting


class Sampler:
    """Draws tokens; the same seed, text and logits give the same tokens.

    `text` are the tokens that precede (a prompt), `breakers` the tokens of `dry_sequence_breakers`.
    Raises: UsageError when the seed is out of range.
    """

    def __init__(
        self,
        options: SamplingOptions | None = None,
        *,
        seed: int | None = None,
        text: Sequence[int] = (),
        breakers: Breakers | None = None,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        if seed is not None:
            check_count("seed", seed)
        o = self.options = options or SamplingOptions()
        self.history = History(text)
        self.breakers = breakers or {}
        self._processors = list(processors)
        self._bias_ids = np.array(list(o.logit_bias), np.int64)
        self._bias = np.array(list(o.logit_bias.values()), np.float32)
        self._seed = int.from_bytes(os.urandom(16), "little") if seed is None else int(seed)
        self._random: Random | None = None
        self._mirostat: Mirostat | None = None
        self._ids = np.empty(0, np.int32)  # of the whole vocabulary
        self._steps = [name for name in o.samplers if not o.mirostat or name in _WITH_MIROSTAT]
        # What is off, or leaves the best token the best, is left out of a greedy sampler.
        is_idle = {
            "penalties": (o.repeat_penalty, o.presence_penalty, o.frequency_penalty) == (1, 0, 0),
            "dry": o.dry_multiplier == 0,
            "typ_p": o.typical_p == 1,
            "xtc": o.xtc_probability == 0,
            "temperature": o.temperature == 0 and o.dynatemp_range == 0,
        }
        self._is_greedy = "temperature" in self._steps and all(
            is_idle.get(name, True) for name in self._steps
        )

    def random(self) -> float:
        """Return the next random number of [0, 1); the stream is the same on every machine."""
        if self._random is None:
            from random import Random  # a tenth of the time that numpy.random takes

            self._random = Random(self._seed)
        return self._random.random()

    def fork(self) -> Sampler:
        """Return a sampler that will draw the same from here on, without processors.

        It is for guesses, of which processors need not hear.
        """
        twin = copy.copy(self)
        twin.history = self.history.copy()
        twin._random = copy.copy(self._random)
        twin._mirostat = copy.copy(self._mirostat)
        twin._processors = []
        return twin

    def sample(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> int:
        """Draw a token from logits f32 (V,), of those that `allowed` bool (V,) leaves.

        The logits stay as they are.
        Raises: EdgeLlamaError when the logits are not numbers, UsageError when no token is left.
        """
        row, best = self._edit(logits, allowed)
        return best if self._is_greedy else self._draw(row, allowed)

    def accept(self, token: int) -> None:
        """Note the token that the answer goes on with: the one drawn, or another."""
        self.history.append(token)
        for processor in self._processors:
            accept = getattr(processor, "accept", None)
            if accept is not None:
                accept(token)

    def candidates(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids that may be drawn and their probabilities f64, most likely first."""
        from .truncation import softmax

        c = self._cut(self._edit(logits, None)[0], None)
        order = np.lexsort((c.ids, -c.logits))
        return c.ids[order], softmax(c.logits)[order]

    def _edit(self, logits: np.ndarray, allowed: np.ndarray | None) -> tuple[np.ndarray, int]:
        """Apply the bias, the processors and the mask to a copy; return it and its best token."""
        best = int(np.argmax(logits))  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise EdgeLlamaError(
                "the model computed no finite logits; its weights are probably damaged "
                "(check the file with `edgellama verify`)"
            )
        if not len(self._bias) and not self._processors and allowed is None:
            return logits, best
        row = logits.copy() if len(self._bias) or self._processors else logits
        if len(self._bias):
            if self._bias_ids.max() >= len(row):
                raise UsageError(
                    f"logit_bias has token {self._bias_ids.max()}; ids are 0 to {len(row) - 1}"
                )
            row[self._bias_ids] += self._bias
        for processor in self._processors:
            edited = processor(self.history.ids, row)
            if edited is not None:
                row[:] = edited
        if allowed is not None:
            row = np.where(allowed, row, np.float32(-np.inf))
        best = int(np.argmax(row))
        if not np.isfinite(row[best]):
            raise UsageError(
                "no token can follow: logit_bias, ignore_eos, a logits processor and the grammar ban "
                "them all, or a processor gave logits that are no numbers"
            )
        return row, best

    def _cut(self, row: np.ndarray, allowed: np.ndarray | None) -> Candidates:
        """Pass the whole vocabulary, or what a narrow mask leaves of it, through the samplers."""
        from .chain import STEPS
        from .truncation import Candidates

        if len(self._ids) != len(row):
            self._ids = np.arange(len(row), dtype=np.int32)
        c = Candidates(self._ids, row)
        if allowed is not None and np.count_nonzero(allowed) < len(row) // 8:
            c = c.keep(np.flatnonzero(allowed))
        for name in self._steps:
            c = STEPS[name](self, c)
        if self.options.mirostat:
            if self._mirostat is None:
                from .mirostat import Mirostat

                o = self.options
                self._mirostat = Mirostat(o.mirostat, o.mirostat_tau, o.mirostat_eta)
            c = self._mirostat.cut(c, len(row))
        return c

    def _draw(self, row: np.ndarray, allowed: np.ndarray | None) -> int:
        from .truncation import pick, weigh

        c = self._cut(row, allowed)
        if len(c.ids) == 1:
            at, chance = 0, 1.0  # nothing is drawn
        else:
            weights = weigh(c.logits)
            at = pick(weights.each, self.random())
            chance = float(weights.each[at]) / weights.total
        if self._mirostat is not None:
            self._mirostat.learn(chance)
        return int(c.ids[at])
