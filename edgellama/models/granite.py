"""Granite 3: the forward pass.

Llama's with four multipliers: of embeddings, of scores, of what is added to the residual, of logits.
Source: Granite 3.0 Language Models, 2024, section 3.
"""

from __future__ import annotations

from .builder import Builder, Tensor


def forward(b: Builder) -> Tensor:
    """Token ids to logits."""
    c = b.config
    x = b.embed("token_embd", scale=c.embedding_scale)
    for layer in range(c.n_layers):
        blk = f"blk.{layer}"
        h = b.rms_norm(x, f"{blk}.attn_norm")
        q = b.rope(b.linear(h, f"{blk}.attn_q"), c.n_heads, c.rope)
        k = b.rope(b.linear(h, f"{blk}.attn_k"), c.n_kv_heads, c.rope)
        v = b.linear(h, f"{blk}.attn_v")
        a = b.attention(layer, q, k, v, scale=c.attention_scale, window=c.windows[layer])
        x = b.add(x, b.linear(a, f"{blk}.attn_output"), scale=c.residual_scale)
        h = b.rms_norm(x, f"{blk}.ffn_norm")
        h = b.gated(b.linear(h, f"{blk}.ffn_gate"), b.linear(h, f"{blk}.ffn_up"), "silu")
        x = b.add(x, b.linear(h, f"{blk}.ffn_down"), scale=c.residual_scale)
    x = b.rms_norm(b.take(x), "output_norm")
    return b.scale(b.linear(x, "token_embd" if c.tied else "output"), c.logit_scale)
