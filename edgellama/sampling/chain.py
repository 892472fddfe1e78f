"""The samplers by their names: what a step of the chain does with the candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import filters, penalties
from .filters import Candidates

if TYPE_CHECKING:
    from . import Sampler

STEPS: dict[str, Callable[[Sampler, Candidates], Candidates]] = {
    "penalties": lambda s, c: penalties.penalize(c, s.text, s.params),
    "dry": lambda s, c: penalties.dry(c, s.text, s.params, s.breakers),
    "top_n_sigma": lambda s, c: filters.top_n_sigma(c, s.params.top_n_sigma),
    "top_k": lambda s, c: filters.top_k(c, s.params.top_k),
    "typ_p": lambda s, c: filters.typical_p(c, s.params.typical_p),
    "top_p": lambda s, c: filters.top_p(c, s.params.top_p),
    "min_p": lambda s, c: filters.min_p(c, s.params.min_p),
    "xtc": lambda s, c: _xtc(s, c),
    "temperature": lambda s, c: filters.temperature(
        c, s.params.temperature, s.params.dynatemp_range, s.params.dynatemp_exponent
    ),
}


def _xtc(s: Sampler, c: Candidates) -> Candidates:
    p = s.params
    if p.xtc_probability <= 0.0:  # nothing is drawn
        return c
    return filters.xtc(c, p.xtc_probability, p.xtc_threshold, s.random())
