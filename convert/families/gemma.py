"""Gemma 1, 2 and 3 (text): norms multiply by 1 + weight, which becomes the weight.

Of a Gemma 3 that also sees, the language model is taken.
"""

from __future__ import annotations

import math

from .hyper import Hyper
from .parts import AROUND, BEFORE, HEADS, attention, embeddings, feed_forward, norms
from .plan import TensorMap

# What published configurations of Gemma 3 leave out.  Source: Gemma3TextConfig.
GEMMA3_DEFAULTS = {
    "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}  # fmt: skip
_SIGHT = (r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*")


def gemma(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan a Gemma 1; "gelu" in its configuration always meant the tanh form."""
    h.no_window()
    key = "hidden_activation" if "hidden_activation" in h.config else "hidden_act"
    h.require(key, "gelu_pytorch_tanh", "gelu", default="gelu_pytorch_tanh")
    return _plan(h, t, BEFORE)


def gemma2(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan a Gemma 2."""
    h.require("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    h.put("attn_logit_softcapping", h.number("attn_logit_softcapping"))
    h.put("final_logit_softcapping", h.number("final_logit_softcapping"))
    h.window(global_every=2)
    _score_scale(h)
    return _plan(h, t, AROUND)


def gemma3(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan a Gemma 3."""
    h.require("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    h.require("attn_logit_softcapping", None, default=None)
    h.require("use_bidirectional_attention", False, default=False)
    if "final_logit_softcapping" in h.config:
        h.put("final_logit_softcapping", h.number("final_logit_softcapping"))
    h.window(global_every=6)
    _score_scale(h)
    for layer in range(h.n_layers):
        norms(t, layer, HEADS, h.head_size, add=1.0)
    droppable = _plan(h, t, AROUND, base=1e6)
    h.put("rope.freq_base_swa", h.number("rope_local_base_freq", 10000.0))
    return (*droppable, *_SIGHT)


def _score_scale(h: Hyper) -> None:
    """Scores are divided by the root of this number, which is the head size unless the file says so."""
    scalar = h.number("query_pre_attn_scalar", 256)
    if scalar != h.head_size:
        h.put("attention.scale", 1.0 / math.sqrt(scalar))


def _plan(h: Hyper, t: TensorMap, names: dict[str, str], *, base: float = 1e4) -> tuple[str, ...]:
    for name, divisors in h.rope(base).items():
        t.put_values(name, divisors)
    biases = "qkvo" if h.flag("attention_bias", False) else ""
    droppable = embeddings(t, h, tied=True, add_to_norm=1.0)
    for layer in range(h.n_layers):
        norms(t, layer, names, h.width, add=1.0)
        attention(t, h, layer, biases=biases)
        feed_forward(t, h, layer)
    return droppable
