"""Gemma 1, 2 and 3 (text): the forward pass.

Gemma 2 adds norms after each block, a soft cap on scores and logits, and a sliding window in every
other layer; Gemma 3 trades the cap for norms of the heads of q and k, and has a window in five of six
layers, with a rope base of its own.
Source: Gemma, 2024, section 2; Gemma 2, 2024, section 2; Gemma 3 Technical Report, 2025, section 2.
"""

from __future__ import annotations

from .builder import Builder, Tensor


def forward(b: Builder) -> Tensor:
    """Token ids to logits."""
    c = b.config
    x = b.embed("token_embd", scale=c.embedding_scale)
    for layer in range(c.n_layers):
        blk = f"blk.{layer}"
        rope = c.rope_of(layer)
        h = b.rms_norm(x, f"{blk}.attn_norm")
        q, k, v = (b.linear(h, f"{blk}.attn_{part}") for part in "qkv")
        if "attn_q_norm" in c.norms:
            q = b.rms_norm(q, f"{blk}.attn_q_norm", c.head_size)
            k = b.rms_norm(k, f"{blk}.attn_k_norm", c.head_size)
        a = b.attention(
            layer, b.rope(q, c.n_heads, rope), b.rope(k, c.n_kv_heads, rope), v,
            scale=c.attention_scale, window=c.windows[layer], soft_cap=c.attn_softcap,
        )  # fmt: skip
        a = b.linear(a, f"{blk}.attn_output")
        if "post_attention_norm" in c.norms:
            a = b.rms_norm(a, f"{blk}.post_attention_norm")
        x = b.add(x, a)
        h = b.rms_norm(x, f"{blk}.ffn_norm")
        h = b.gated(b.linear(h, f"{blk}.ffn_gate"), b.linear(h, f"{blk}.ffn_up"), "gelu")
        h = b.linear(h, f"{blk}.ffn_down")
        if "post_ffw_norm" in c.norms:
            h = b.rms_norm(h, f"{blk}.post_ffw_norm")
        x = b.add(x, h)
    x = b.rms_norm(b.take(x), "output_norm")
    logits = b.linear(x, "token_embd" if c.tied else "output")
    return b.soft_cap(logits, c.final_softcap) if c.final_softcap else logits
