"""StableLM 3B and StableLM 2: norms with a bias, and rope on a part of each head.

The 12B has one norm for both blocks of a layer, and a norm for each head of q and k.
"""

from __future__ import annotations

from .hyper import Hyper
from .parts import BEFORE, attention, embeddings, feed_forward
from .plan import TensorMap, stacked


def stablelm(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan a StableLM."""
    h.no_window()
    h.require("hidden_act", "silu", default="silu")
    is_parallel = h.flag("use_parallel_residual", False)
    h.put("use_parallel_residual", is_parallel)
    for name, divisors in h.rope(fraction=0.25).items():
        t.put_values(name, divisors)
    droppable = embeddings(t, h, tied=False)
    t.put("output_norm.bias", t.get("norm.bias", (h.width,)))
    for layer in range(h.n_layers):
        for name in ("attn_norm",) if is_parallel else ("attn_norm", "ffn_norm"):
            for kind in ("weight", "bias"):
                rows = t.get(f"layers.{layer}.{BEFORE[name]}.{kind}", (h.width,))
                t.put(f"blk.{layer}.{name}.{kind}", rows)
        if h.flag("qk_layernorm", False):
            for part, n_heads in (("q", h.n_heads), ("k", h.n_kv_heads)):
                norms = f"layers.{layer}.self_attn.{part}_layernorm.norms"
                heads = [t.get(f"{norms}.{i}.weight", (h.head_size,)) for i in range(n_heads)]
                t.put(f"blk.{layer}.attn_{part}_norm.weight", stacked(heads))
        attention(t, h, layer, biases="qkv" if h.flag("use_qkv_bias", False) else "")
        feed_forward(t, h, layer)
    return droppable
