"""How positions rotate: read from metadata and checked.  The angles are in `runtime/rope.py`."""

from __future__ import annotations

import math
from typing import NamedTuple

from edgellama.errors import ModelFileError, UnsupportedModelError, shown
from edgellama.gguf import GGUFFile

from .architectures import Architecture
from .keys import INT32_MAX, Keys

_BASES = (2.0, 1e12)  # of the angles: above 1, whose logarithm yarn divides by
_FACTORS = (1e-6, 1e6)


class RopeConfig(NamedTuple):
    """How positions rotate: which dimensions pair up, at which frequencies."""

    kind: str  # "norm": neighbours, "neox": halves
    n_dims: int
    freq_base: float
    scaling: str = "none"  # or linear, yarn, longrope
    factor: float = 1.0
    original_context: int = 0
    ext_factor: float = 1.0
    attn_factor: float = 1.0  # multiplies cosine and sine
    yarn_attn_factor: float = 0.0  # in place of yarn's own, 1 + 0.1 ln(factor)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    freq_factors: str = ""  # tensor of divisors
    freq_factors_long: str = ""  # those of a context longer than the original

    def is_long(self, n_ctx: int) -> bool:
        """Say whether a context takes the divisors for long ones."""
        return bool(self.freq_factors_long) and n_ctx > self.original_context


def read_rope(
    gguf: GGUFFile, k: Keys, arch: Architecture, head_size: int
) -> tuple[RopeConfig, RopeConfig | None]:
    """Read how positions rotate, and how in layers with a window where that differs.

    Raises: ModelFileError, UnsupportedModelError.
    """
    n_dims = k.integer("rope.dimension_count", 2, head_size, head_size)
    if n_dims % 2:
        raise ModelFileError(
            f"{k.file}: {k.arch}.rope.dimension_count is {n_dims}; it must be even"
        )
    base = k.number("rope.freq_base", *_BASES, 10000.0)
    scaling = gguf.metadata.get(f"{k.arch}.rope.scaling.type", "none")
    factor = k.number("rope.scale_linear", *_FACTORS, 1.0)
    factor = k.number("rope.scaling.factor", *_FACTORS, factor)
    if not isinstance(scaling, str) or scaling not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModelError(
            f"{k.file}: {k.arch}.rope.scaling.type is {shown(scaling)}; none, linear, yarn and "
            "longrope are known"
        )
    if scaling == "none" and factor != 1.0:
        scaling = "linear"
    yarn_attn_factor = "rope.scaling.yarn_attn_factor"
    factors = _divisors(gguf, "rope_freqs.weight", n_dims)
    long = _divisors(gguf, "rope_factors_long.weight", n_dims)
    short = _divisors(gguf, "rope_factors_short.weight", n_dims)
    if scaling == "longrope" or long or short:
        if not (long and short) or factors or scaling not in ("none", "longrope"):
            raise ModelFileError(
                f"{k.file}: longrope needs rope_factors_long.weight and rope_factors_short.weight, "
                "and no other scaling"
            )
        scaling, factors = "longrope", short
    rope = RopeConfig(
        kind=arch.rope_kind,
        n_dims=n_dims,
        freq_base=base,
        scaling=scaling,
        factor=factor,
        original_context=k.integer(
            "rope.scaling.original_context_length", 1, INT32_MAX,
            k.integer("context_length", 1, INT32_MAX),
        ),
        ext_factor=k.number("rope.scaling.yarn_ext_factor", 0.0, 1.0, 1.0),
        attn_factor=k.number("rope.scaling.attn_factor", *_FACTORS, 1.0),
        yarn_attn_factor=(
            k.number(yarn_attn_factor, *_FACTORS) if k.has(yarn_attn_factor) else 0.0
        ),
        beta_fast=k.number("rope.scaling.yarn_beta_fast", *_FACTORS, 32.0),
        beta_slow=k.number("rope.scaling.yarn_beta_slow", *_FACTORS, 1.0),
        freq_factors=factors,
        freq_factors_long=long,
    )  # fmt: skip
    if not arch.local_rope:
        return rope, None
    local_base = k.number("rope.freq_base_swa", *_BASES, base)
    return rope, RopeConfig(arch.rope_kind, n_dims, local_base)


def _divisors(gguf: GGUFFile, name: str, n_dims: int) -> str:
    """Return the name of a tensor that divides the frequencies, checked, or "" without it."""
    info = gguf.tensors.get(name)
    if info is None:
        return ""
    if info.type_name != "f32" or info.shape != (n_dims // 2,):
        raise ModelFileError(
            f"{gguf.path.name}: {name} is {info.type_name} {list(info.shape)}; "
            f"f32 [{n_dims // 2}] is needed"
        )
    divisors = gguf.data(name).view("<f4")
    if not all(math.isfinite(d) and d > 0 for d in divisors.tolist()):
        raise ModelFileError(f"{gguf.path.name}: {name} holds a divisor that is not above 0")
    return name
