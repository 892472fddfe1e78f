"""OLMo 2 and 3: norms after each block, and of all heads of q and of k together."""

from __future__ import annotations

from .hyper import Hyper
from .parts import AFTER, HEADS, attention, embeddings, feed_forward, norms
from .plan import TensorMap


def olmo2(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan an OLMo 2."""
    h.no_window()
    return _plan(h, t)


def olmo3(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan an OLMo 3: every fourth layer sees all positions, and only it has scaled rope."""
    h.window(global_every=4)
    droppable = _plan(h, t, base=5e5)
    h.put("rope.freq_base_swa", h.number("rope_local_base_freq", h.rope_base))
    return droppable


def _plan(h: Hyper, t: TensorMap, base: float = 1e4) -> tuple[str, ...]:
    h.require("hidden_act", "silu", default="silu")
    for name, divisors in h.rope(base).items():
        t.put_values(name, divisors)
    biases = "qkvo" if h.flag("attention_bias", False) else ""
    droppable = embeddings(t, h, tied=False)
    for layer in range(h.n_layers):
        norms(t, layer, AFTER, h.width)
        norms(t, layer, {"attn_q_norm": HEADS["attn_q_norm"]}, h.n_heads * h.head_size)
        norms(t, layer, {"attn_k_norm": HEADS["attn_k_norm"]}, h.n_kv_heads * h.head_size)
        attention(t, h, layer, biases=biases)
        feed_forward(t, h, layer)
    return droppable
