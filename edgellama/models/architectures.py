"""What differs between the architectures that run here, beside the forward pass: a row for each.

Names of architectures are those of `general.architecture`; norms have the names of their tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

_BLOCK = {"attn_norm": "width", "ffn_norm": "width"}
_AFTER = {"post_attention_norm": "width", "post_ffw_norm": "width"}
_PER_HEAD = {"attn_q_norm": "head", "attn_k_norm": "head"}
_ALL_HEADS = {"attn_q_norm": "q", "attn_k_norm": "k"}


class Architecture(NamedTuple):
    """One architecture; what most have in common is the default."""

    rope_kind: str  # "norm": pairs of neighbours, "neox": of halves
    norms: Mapping[str, str] = _BLOCK  # of a layer; weights: the width, a head, all heads of q or k
    optional: tuple[str, ...] = ()  # norms that may be missing
    eps: str = "attention.layer_norm_rms_epsilon"
    norm_biases: bool = False
    global_every: int = 0  # every so many layers one sees all positions, where others have a window
    local_rope: bool = False  # layers with a window rotate by a base of their own, unscaled
    stacked_ffn: bool = False  # `ffn_up` holds gate and up
    soft_caps: bool = False
    embedding_by_width: bool = False  # embeddings are multiplied with the root of the width
    multipliers: bool = False  # Granite's four
    layers_scaled_by_width: int = 0  # scores of the model of so many layers: 1 / sqrt(D / H)
    defaults: Mapping[str, float] = {}  # for keys that a file lacks


ARCHITECTURES = {
    "llama": Architecture("norm"),
    "internlm2": Architecture("norm"),
    "phi3": Architecture("neox", stacked_ffn=True),
    "qwen2": Architecture("neox"),
    "qwen3": Architecture("neox", _BLOCK | _PER_HEAD),
    "smollm3": Architecture("norm"),
    "granite": Architecture("norm", multipliers=True),
    "olmo2": Architecture("neox", _AFTER | _ALL_HEADS, global_every=4, local_rope=True),
    "stablelm": Architecture(
        "neox", _BLOCK | _ALL_HEADS, optional=("ffn_norm", "attn_q_norm", "attn_k_norm"),
        eps="attention.layer_norm_epsilon", norm_biases=True,
    ),
    "gemma": Architecture("neox", embedding_by_width=True),
    "gemma2": Architecture(
        "neox", _BLOCK | _AFTER, embedding_by_width=True, soft_caps=True, global_every=2,
        layers_scaled_by_width=46,
        defaults={
            "attention.sliding_window": 4096, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": Architecture(
        "neox", _BLOCK | _AFTER | _PER_HEAD, embedding_by_width=True, soft_caps=True,
        global_every=6, local_rope=True, layers_scaled_by_width=62,
        defaults={"rope.freq_base_swa": 10000.0},
    ),
}  # fmt: skip
