"""The samplers by their names: what a step of the chain does with the candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import dry, penalties, truncation
from .truncation import Candidates

if TYPE_CHECKING:
    from .sampler import Sampler


def _xtc(s: Sampler, c: Candidates) -> Candidates:
    o = s.options
    if o.xtc_probability <= 0.0:  # nothing is drawn
        return c
    return truncation.xtc(c, o.xtc_probability, o.xtc_threshold, s.random(), o.min_keep)


STEPS: dict[str, Callable[[Sampler, Candidates], Candidates]] = {
    "penalties": lambda s, c: penalties.penalize(c, s.history, s.options),
    "dry": lambda s, c: dry.penalize(c, s.history, s.options, s.breakers),
    "top_n_sigma": lambda s, c: truncation.top_n_sigma(c, s.options.top_n_sigma),
    "top_k": lambda s, c: truncation.top_k(c, s.options.top_k),
    "typ_p": lambda s, c: truncation.typical_p(c, s.options.typical_p, s.options.min_keep),
    "top_p": lambda s, c: truncation.top_p(c, s.options.top_p, s.options.min_keep),
    "min_p": lambda s, c: truncation.min_p(c, s.options.min_p, s.options.min_keep),
    "xtc": _xtc,
    "temperature": lambda s, c: truncation.temperature(
        c, s.options.temperature, s.options.dynatemp_range, s.options.dynatemp_exponent
    ),
}
