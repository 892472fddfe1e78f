"""InternLM 2 and 2.5: q, k and v are one matrix of groups, each the query heads of a KV head, k and v.

They are taken apart, and rows of q and k reordered as for Llama.
"""

from __future__ import annotations

from .hyper import Hyper
from .parts import NEVER_USED, norms, projection
from .plan import TensorMap


def internlm2(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan an InternLM 2."""
    h.no_window()
    h.require("hidden_act", "silu", default="silu")
    h.require("bias", False, default=False)
    for name, divisors in h.rope().items():
        t.put_values(name, divisors)
    t.put("token_embd.weight", t.get("tok_embeddings.weight", (h.n_vocab, h.width)))
    t.put("output_norm.weight", t.get("norm.weight", (h.width,)))
    if not h.flag("tie_word_embeddings", False):
        t.put("output.weight", t.get_as("output.weight", (h.n_vocab, h.width)))
    n_group = h.n_heads // h.n_kv_heads
    groups = [[g * (n_group + 2) + i for i in range(n_group + 2)] for g in range(h.n_kv_heads)]
    for layer in range(h.n_layers):
        norms(t, layer, {"attn_norm": "attention_norm", "ffn_norm": "ffn_norm"}, h.width)
        shape = ((h.n_heads + 2 * h.n_kv_heads) * h.head_size, h.width)
        wqkv = t.get(f"layers.{layer}.attention.wqkv.weight", shape)
        q = wqkv.heads([head for group in groups for head in group[:-2]], h.head_size)
        k = wqkv.heads([group[-2] for group in groups], h.head_size)
        v = wqkv.heads([group[-1] for group in groups], h.head_size)
        t.put(f"blk.{layer}.attn_q.weight", q.interleaved(h.head_size))
        t.put(f"blk.{layer}.attn_k.weight", k.interleaved(h.head_size))
        t.put(f"blk.{layer}.attn_v.weight", v)
        shape = (h.width, h.n_heads * h.head_size)
        projection(t, layer, "attn_output", "attention.wo", shape)
        projection(t, layer, "ffn_gate", "feed_forward.w1", (h.ffn_width, h.width))
        projection(t, layer, "ffn_up", "feed_forward.w3", (h.ffn_width, h.width))
        projection(t, layer, "ffn_down", "feed_forward.w2", (h.width, h.ffn_width))
    return NEVER_USED
