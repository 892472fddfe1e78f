"""SmolLM3: the forward pass.

Llama's, but every fourth layer does not know positions (NoPE).
Source: Bakouch et al., SmolLM3, 2025; Yang et al., RoPE to NoPE and Back Again, 2025, section 3.
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
        q, k, v = (b.linear(h, f"{blk}.attn_{part}") for part in "qkv")
        if (layer + 1) % 4 != 0:
            q, k = b.rope(q, c.n_heads, c.rope), b.rope(k, c.n_kv_heads, c.rope)
        a = b.attention(layer, q, k, v, scale=c.attention_scale, window=c.windows[layer])
        x = b.add(x, b.linear(a, f"{blk}.attn_output"))
        h = b.rms_norm(x, f"{blk}.ffn_norm")
        h = b.gated(b.linear(h, f"{blk}.ffn_gate"), b.linear(h, f"{blk}.ffn_up"), "silu")
        x = b.add(x, b.linear(h, f"{blk}.ffn_down"))
    x = b.rms_norm(b.take(x), "output_norm")
    return b.linear(x, "token_embd" if c.tied else "output")
