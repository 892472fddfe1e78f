"""What a sampler can be told: names, defaults and ranges.

Names are those of llama.cpp's server, defaults those of llama.cpp (common/common.h); a model file may
carry defaults of its own (`file_options`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from edgellama.errors import ModelFileError, UsageError

SAMPLERS = (
    "penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature",
)  # fmt: skip
_ALIASES = {"typical_p": "typ_p", "typical": "typ_p", "temp": "temperature"}


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn.

    Raises: UsageError naming the option that is out of range.
    """

    temperature: float = 0.8  # 0 is greedy
    top_k: int = 40  # 0 is off
    top_p: float = 0.95  # 1 is off
    min_p: float = 0.05  # 0 is off
    typical_p: float = 1.0  # 1 is off
    top_n_sigma: float = -1.0  # 0 or less is off
    min_keep: int = 0  # least candidates that top-p, min-p, typical and XTC leave
    xtc_probability: float = 0.0  # 0 is off
    xtc_threshold: float = 0.1  # over 0.5 is off
    dynatemp_range: float = 0.0  # 0 is off
    dynatemp_exponent: float = 1.0
    repeat_last_n: int = 64  # tokens that penalties look back; 0 is off, -1 all
    repeat_penalty: float = 1.0  # 1 is off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0  # 0 is off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64  # 0 is off, -1 all
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    mirostat: int = 0  # 1, 2, or 0: off
    mirostat_tau: float = 5.0  # target, in bits
    mirostat_eta: float = 0.1  # learning rate
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # of tokens; -inf, False: banned
    samplers: Sequence[str] = SAMPLERS  # in this order

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            is_count = isinstance(getattr(SamplingOptions, name), int)
            (check_count if is_count else check_number)(name, getattr(self, name), low, high)
        for name, read in _READERS.items():
            object.__setattr__(self, name, read(getattr(self, name)))


# Least and most of each number; whole numbers where the default is one.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100), "top_k": (0, 2**31 - 1), "top_p": (0, 1), "min_p": (0, 1),
    "typical_p": (0, 1), "top_n_sigma": (-1, 1000), "min_keep": (0, 2**31 - 1), "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1), "dynatemp_range": (0, 100), "dynatemp_exponent": (0, 100),
    "repeat_last_n": (-1, 2**31 - 1), "repeat_penalty": (0.01, 100), "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100), "dry_multiplier": (0, 1000), "dry_base": (1, 100),
    "dry_allowed_length": (1, 2**31 - 1), "dry_penalty_last_n": (-1, 2**31 - 1), "mirostat": (0, 2),
    "mirostat_tau": (0, 100), "mirostat_eta": (0, 100),
}  # fmt: skip

# Names of `general.sampling.*` in a file.
_FILE_NAMES = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "xtc_probability": "xtc_probability", "xtc_threshold": "xtc_threshold",
    "penalty_last_n": "repeat_last_n", "penalty_repeat": "repeat_penalty", "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau", "mirostat_eta": "mirostat_eta", "sequence": "samplers",
}  # fmt: skip


def read_options(options: Mapping[str, Any]) -> SamplingOptions:
    """Make options by name; None is as if left out.

    Raises: UsageError naming the option that is unknown or out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in OPTION_NAMES:
            raise UsageError(f"there is no option {name!r}; options are {', '.join(OPTION_NAMES)}")
    return SamplingOptions(**given)


def file_options(metadata: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a file sets and the user has not.

    Raises: ModelFileError naming the key whose value cannot be used.
    """
    out: dict[str, Any] = {}
    for key, name in _FILE_NAMES.items():
        value = metadata.get(f"general.sampling.{key}")
        if value is None or given.get(name) is not None:
            continue
        if name == "top_k" and isinstance(value, Integral) and value < 0:
            value = 0  # also a way to say off
        try:
            read_options({name: value})
        except UsageError as error:
            raise ModelFileError(
                f"general.sampling.{key} of the file cannot be used: {error}; give one yourself"
            ) from None
        out[name] = value
    return out


def check_count(name: str, value: Any, low: float = 0, high: float = math.inf) -> None:
    """Check a whole number.

    Raises: UsageError naming it and its range.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        raise UsageError(f"{name} is {value!r}; it must be a whole number{_range(low, high)}")


def check_flag(name: str, value: Any) -> None:
    """Check a choice of True and False.

    Raises: UsageError naming it.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}; it must be True or False")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Check a finite number.

    Raises: UsageError naming it and its range.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"{name} is {value!r}; it must be a number{_range(low, high)}")
    if not low <= float(value) <= high:
        raise UsageError(f"{name} is {value}; it must be{_range(low, high)}")


def _range(low: float, high: float) -> str:
    if math.isfinite(high):
        return f" between {low} and {high}"
    return f" {low} or more" if math.isfinite(low) else ""


def _read_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise UsageError(f"logit_bias is {bias!r}; a dict of tokens and numbers is needed")
    out = {}
    for token, value in bias.items():
        check_count("a token of logit_bias", token)
        if value is False:
            value = -math.inf
        if not isinstance(value, Real) or not value < math.inf or value is True:
            raise UsageError(
                f"logit_bias of token {token} is {value!r}; a number, or False to ban it, is needed"
            )
        out[int(token)] = float(value)
    return out


def _read_samplers(value: Any) -> tuple[str, ...]:
    if not isinstance(value, Iterable):
        raise UsageError(f"samplers is {value!r}; names are needed: {';'.join(SAMPLERS)}")
    out = []
    for name in value.split(";") if isinstance(value, str) else value:
        known = str(name).strip().replace("-", "_")
        known = _ALIASES.get(known, known)
        if known not in SAMPLERS:
            raise UsageError(f"no sampler is called {name!r}; samplers are {';'.join(SAMPLERS)}")
        out.append(known)
    return tuple(out)


def _read_breakers(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    breakers = tuple(value) if isinstance(value, Iterable) else (value,)
    if any(not isinstance(text, str) or not text for text in breakers):
        raise UsageError(
            f"dry_sequence_breakers is {value!r}; texts of at least one character are needed"
        )
    return breakers


OPTION_NAMES = tuple(f.name for f in fields(SamplingOptions))
_READERS: dict[str, Callable[[Any], Any]] = {
    "samplers": _read_samplers,
    "dry_sequence_breakers": _read_breakers,
    "logit_bias": _read_bias,
}
