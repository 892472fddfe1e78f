"""Llama 1-3.2, TinyLlama, SmolLM2, Mistral, InternLM2, Phi-3: the forward pass.

Mistral and Phi-3 see a sliding window; Phi-3 rotates a part of each head where its file says so.
Source: Touvron et al., LLaMA, 2023, section 2.2; Jiang et al., Mistral 7B, 2023, section 2; Cai et
al., InternLM2, 2024, section 2.2; Abdin et al., Phi-3, 2024, section 2.
"""

from __future__ import annotations

from .builder import Builder, Tensor


def forward(b: Builder) -> Tensor:
    """Token ids to logits."""
    c = b.config
    x = b.embed("token_embd")
    for layer in range(c.n_layers):
        blk = f"blk.{layer}"
        h = b.rms_norm(x, f"{blk}.attn_norm")
        q = b.rope(b.linear(h, f"{blk}.attn_q"), c.n_heads, c.rope)
        k = b.rope(b.linear(h, f"{blk}.attn_k"), c.n_kv_heads, c.rope)
        v = b.linear(h, f"{blk}.attn_v")
        a = b.attention(layer, q, k, v, scale=c.attention_scale, window=c.windows[layer])
        x = b.add(x, b.linear(a, f"{blk}.attn_output"))
        h = b.rms_norm(x, f"{blk}.ffn_norm")
        h = b.gated(b.linear(h, f"{blk}.ffn_gate"), b.linear(h, f"{blk}.ffn_up"), "silu")
        x = b.add(x, b.linear(h, f"{blk}.ffn_down"))
    x = b.rms_norm(b.take(x), "output_norm")
    return b.linear(x, "token_embd" if c.tied else "output")
