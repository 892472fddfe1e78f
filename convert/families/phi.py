"""Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini: q, k and v are one matrix, and so are gate and up.

They stay so in GGUF, where the second is called `ffn_up`.
"""

from __future__ import annotations

from .hyper import Hyper
from .parts import BEFORE, embeddings, norms, projection
from .plan import TensorMap


def phi3(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan a Phi-3 or 4."""
    h.require("hidden_act", "silu", default="silu")
    for name, divisors in h.rope(longrope=True).items():
        t.put_values(name, divisors)
    h.put("rope.scaling.original_context_length", h.original_context())
    h.window()
    if "sliding_window" not in h.config:
        h.put("attention.sliding_window", 0)
    droppable = embeddings(t, h, tied=False)
    heads = h.n_heads + 2 * h.n_kv_heads
    for layer in range(h.n_layers):
        norms(t, layer, BEFORE, h.width)
        shape = (heads * h.head_size, h.width)
        projection(t, layer, "attn_qkv", "self_attn.qkv_proj", shape)
        shape = (h.width, h.n_heads * h.head_size)
        projection(t, layer, "attn_output", "self_attn.o_proj", shape)
        projection(t, layer, "ffn_up", "mlp.gate_up_proj", (2 * h.ffn_width, h.width))
        projection(t, layer, "ffn_down", "mlp.down_proj", (h.width, h.ffn_width))
    return droppable
