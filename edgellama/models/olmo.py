"""OLMo 2 and 3: the forward pass.

Norms stand after each block, inside the residual; q and k are normalised over all heads at once.  OLMo
3 adds a sliding window in three of four layers.
Source: OLMo Team, 2 OLMo 2 Furious, 2025, section 2.1; Olmo 3, 2025, section 3.2.
"""

from __future__ import annotations

from .builder import Builder, Tensor


def forward(b: Builder) -> Tensor:
    """Token ids to logits."""
    c = b.config
    x = b.embed("token_embd")
    for layer in range(c.n_layers):
        blk = f"blk.{layer}"
        rope = c.rope_of(layer)
        q = b.rms_norm(b.linear(x, f"{blk}.attn_q"), f"{blk}.attn_q_norm")
        k = b.rms_norm(b.linear(x, f"{blk}.attn_k"), f"{blk}.attn_k_norm")
        v = b.linear(x, f"{blk}.attn_v")
        q, k = b.rope(q, c.n_heads, rope), b.rope(k, c.n_kv_heads, rope)
        a = b.attention(layer, q, k, v, scale=c.attention_scale, window=c.windows[layer])
        x = b.add(x, b.rms_norm(b.linear(a, f"{blk}.attn_output"), f"{blk}.post_attention_norm"))
        h = b.gated(b.linear(x, f"{blk}.ffn_gate"), b.linear(x, f"{blk}.ffn_up"), "silu")
        x = b.add(x, b.rms_norm(b.linear(h, f"{blk}.ffn_down"), f"{blk}.post_ffw_norm"))
    x = b.rms_norm(b.take(x), "output_norm")
    return b.linear(x, "token_embd" if c.tied else "output")
