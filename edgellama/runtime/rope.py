"""Tables of cosines and sines for rotary position embedding, with every scaling that files ask for.

Sources: Su et al., RoFormer, 2021; Chen et al., Position Interpolation, 2023 (linear); Peng et al.,
YaRN, 2023, section 3; Ding et al., LongRoPE, 2024, section 3, whose divisors (Phi-3's) depend on
whether the context is longer than the original one; Llama 3.1 comes as divisors in `rope_freqs.weight`.
"""

from __future__ import annotations

import math

import numpy as np

from edgellama.gguf import GGUFFile
from edgellama.models.rope import RopeConfig


def rope_table(rope: RopeConfig, gguf: GGUFFile, n_ctx: int) -> np.ndarray:
    """Return f32 (n_ctx, n_dims): per position n_dims/2 cosines, then n_dims/2 sines."""
    half = rope.n_dims // 2
    frequencies = rope.freq_base ** (-2.0 * np.arange(half) / rope.n_dims)
    factors = rope.freq_factors_long if rope.is_long(n_ctx) else rope.freq_factors
    if factors:
        frequencies = frequencies / gguf.data(factors).view(np.float32).astype(np.float64)
    magnitude = rope.attn_factor
    if rope.scaling == "linear":
        frequencies = frequencies / rope.factor
    elif rope.scaling == "yarn":
        frequencies, magnitude = _yarn(rope, frequencies)
    angles = np.arange(n_ctx)[:, None] * frequencies
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * magnitude
    return table.astype(np.float32)


def _yarn(rope: RopeConfig, frequencies: np.ndarray) -> tuple[np.ndarray, float]:
    """Interpolate slow dimensions, keep fast ones, and blend in between."""

    def dimension(n_rotations: float) -> float:
        turns = rope.original_context / (n_rotations * 2 * math.pi)
        return rope.n_dims * math.log(turns) / (2 * math.log(rope.freq_base))

    low = max(0.0, math.floor(dimension(rope.beta_fast)))
    high = min(rope.n_dims - 1.0, math.ceil(dimension(rope.beta_slow)))
    ramp = (np.arange(len(frequencies)) - low) / max(0.001, high - low)
    keep = (1.0 - np.clip(ramp, 0.0, 1.0)) * rope.ext_factor
    scaled = frequencies / rope.factor
    usual = 1.0 + 0.1 * math.log(rope.factor) if rope.ext_factor else 1.0
    magnitude = rope.attn_factor * (rope.yarn_attn_factor or usual)
    return scaled * (1.0 - keep) + frequencies * keep, magnitude
