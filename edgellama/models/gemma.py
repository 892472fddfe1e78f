"""Gemma 3 (text): the forward pass.

Norms stand before and after each block; layers alternate between a sliding window with a local rope
base and global attention.  Source: Gemma 3 Technical Report, 2025, section 2.
"""

from __future__ import annotations

from .builder import Builder, Tensor


def forward(b: Builder) -> Tensor:
    """Token ids to logits."""
    c = b.config
    x = b.embed("token_embd", scale=c.embedding_scale)
    for layer in range(c.n_layers):
        blk = f"blk.{layer}"
        is_global = c.sliding_window == 0 or (layer + 1) % c.window_pattern == 0
        rope = c.rope if is_global else c.rope_local or c.rope
        h = b.rms_norm(x, f"{blk}.attn_norm")
        q = b.rms_norm(b.linear(h, f"{blk}.attn_q"), f"{blk}.attn_q_norm", c.head_size)
        k = b.rms_norm(b.linear(h, f"{blk}.attn_k"), f"{blk}.attn_k_norm", c.head_size)
        v = b.linear(h, f"{blk}.attn_v")
        a = b.attention(
            layer, b.rope(q, c.n_heads, rope), b.rope(k, c.n_kv_heads, rope), v,
            scale=c.attention_scale, window=0 if is_global else c.sliding_window,
            soft_cap=c.attn_softcap,
        )  # fmt: skip
        a = b.rms_norm(b.linear(a, f"{blk}.attn_output"), f"{blk}.post_attention_norm")
        x = b.add(x, a)
        h = b.rms_norm(x, f"{blk}.ffn_norm")
        h = b.gated(b.linear(h, f"{blk}.ffn_gate"), b.linear(h, f"{blk}.ffn_up"), "gelu")
        h = b.rms_norm(b.linear(h, f"{blk}.ffn_down"), f"{blk}.post_ffw_norm")
        x = b.add(x, h)
    x = b.rms_norm(b.take(x), "output_norm")
    logits = b.linear(x, "token_embd" if c.tied else "output")
    return b.soft_cap(logits, c.final_softcap) if c.final_softcap else logits
