"""From logits to a token.

`Sampler` edits the row of logits (bias, processors), passes the candidates through the samplers in
their order (`chain.py`: `filters.py`, `penalties.py`) and draws.  Names and ranges: `params.py`.
A greedy sampler loads none of the others.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellama.errors import EdgeLlamaError, UsageError

from .params import SamplingParams, bias_by_id, check_count, file_params, read_params

if TYPE_CHECKING:
    from random import Random

    from .filters import Candidates
    from .mirostat import Mirostat
    from .penalties import Breakers

__all__ = [
    "LogitsProcessor",
    "Sampler",
    "SamplingParams",
    "bias_by_id",
    "check_count",
    "file_params",
    "read_params",
]

# Called with all token ids so far and the logits f32 (V,) of the next, which it changes in place; if
# it returns a row, that replaces them.  An `accept(token)` it has is told of every token drawn.
LogitsProcessor = Callable[[Sequence[int], np.ndarray], "np.ndarray | None"]

_WITH_MIROSTAT = ("penalties", "dry", "temperature")  # which has its own way of cutting


class Sampler:
    """Draws tokens; the same seed, text and logits give the same tokens.

    `options` are those of SamplingParams, `text` the tokens that precede (a prompt), `breakers` the
    tokens of `dry_sequence_breakers`.  Raises: UsageError naming the option that is out of range.
    """

    params: SamplingParams
    text: list[int]
    breakers: Breakers

    def __init__(
        self,
        *,
        seed: int | None = None,
        text: Sequence[int] = (),
        breakers: Breakers | None = None,
        processors: Sequence[LogitsProcessor] = (),
        **options: Any,
    ) -> None:
        if seed is not None:
            check_count("seed", seed)
        p = self.params = read_params(options)
        self.text = list(text)
        self.breakers = breakers or {}
        self._processors = list(processors)
        self._bias_ids = np.array(list(p.logit_bias), np.int64)
        self._bias = np.array(list(p.logit_bias.values()), np.float32)
        self._seed = int.from_bytes(os.urandom(16), "little") if seed is None else int(seed)
        self._random: Random | None = None
        self._mirostat: Mirostat | None = None
        self._ids = np.empty(0, np.int64)  # of the whole vocabulary
        self._steps = [n for n in p.samplers if not p.mirostat or n in _WITH_MIROSTAT]
        is_plain = {
            "penalties": (p.repeat_penalty, p.presence_penalty, p.frequency_penalty) == (1, 0, 0),
            "dry": p.dry_multiplier == 0,
            "typ_p": p.typical_p == 1,
            "xtc": p.xtc_probability == 0,
            "temperature": p.temperature == 0 and p.dynatemp_range == 0,
        }
        self._is_greedy = "temperature" in self._steps and all(
            is_plain.get(name, True) for name in self._steps
        )

    def random(self) -> float:
        """Return the next random number of [0, 1); the stream is the same on every machine."""
        if self._random is None:
            from random import Random

            self._random = Random(self._seed)
        return self._random.random()

    def fork(self) -> Sampler:
        """Return a sampler that will draw the same from here on, but for processors: it has none.

        It is for guesses, of which those need not hear.
        """
        twin = copy.copy(self)
        twin.text = list(self.text)
        twin._random = copy.copy(self._random)
        twin._mirostat = copy.copy(self._mirostat)
        twin._processors = []
        return twin

    def sample(self, logits: np.ndarray) -> int:
        """Draw a token from logits f32 (V,), which stay as they are; it joins the text.

        Raises: EdgeLlamaError when the logits are not numbers, UsageError when none is left.
        """
        row = self._edit(logits)
        token = int(np.argmax(row)) if self._is_greedy else self._draw(row)
        self.text.append(token)
        for processor in self._processors:
            accept = getattr(processor, "accept", None)
            if accept is not None:
                accept(token)
        return token

    def candidates(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids that may be drawn and their probabilities f64, most likely first."""
        from .filters import softmax

        c = self._cut(self._edit(logits))
        order = np.lexsort((c.ids, -c.logits))
        return c.ids[order], softmax(c.logits)[order]

    def _edit(self, logits: np.ndarray) -> np.ndarray:
        """Apply the bias and the processors to a copy."""
        best = logits[np.argmax(logits)]  # the first NaN, if there is one
        if not np.isfinite(best):
            raise EdgeLlamaError(
                "the model computed no finite logits; its weights are probably damaged "
                "(check the file with `edgellama verify`)"
            )
        if not len(self._bias) and not self._processors:
            return logits
        row = logits.copy()
        if len(self._bias):
            if self._bias_ids.max() >= len(row):
                raise UsageError(
                    f"logit_bias has token {self._bias_ids.max()}; ids are 0 to {len(row) - 1}"
                )
            row[self._bias_ids] += self._bias
        for processor in self._processors:
            edited = processor(self.text, row)
            if edited is not None:
                row[:] = edited
        if not np.isfinite(row[np.argmax(row)]):
            raise UsageError(
                "no token can follow: logit_bias or a logits processor bans them all, or gave logits "
                "that are no numbers"
            )
        return row

    def _cut(self, row: np.ndarray) -> Candidates:
        """Pass the whole vocabulary through the samplers."""
        from .chain import STEPS
        from .filters import Candidates

        if len(self._ids) != len(row):
            self._ids = np.arange(len(row))
        c = Candidates(self._ids, row)
        for name in self._steps:
            c = STEPS[name](self, c)
        if self.params.mirostat:
            if self._mirostat is None:
                from .mirostat import Mirostat

                p = self.params
                self._mirostat = Mirostat(p.mirostat, p.mirostat_tau, p.mirostat_eta)
            c = self._mirostat.cut(c, len(row))
        return c

    def _draw(self, row: np.ndarray) -> int:
        from .filters import softmax

        c = self._cut(row)
        if len(c.ids) == 1:
            at = 0  # nothing is drawn
        else:
            p = softmax(c.logits)
            share = np.cumsum(p)
            point = min(self.random() * share[-1], np.nextafter(share[-1], 0.0))
            at = int(np.searchsorted(share, point, side="right"))
        if self._mirostat is not None:
            self._mirostat.learn(float(p[at]) if len(c.ids) > 1 else 1.0)
        return int(c.ids[at])
