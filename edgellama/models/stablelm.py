"""StableLM 2: the forward pass.

Norms subtract the mean, and a part of each head is rotated.  The 12B normalises the heads of q and k,
and its two blocks read the same input (it has no `ffn_norm`).
Source: Bellagente et al., Stable LM 2 1.6B Technical Report, 2024, section 2.1; the model card of
Stable LM 2 12B.
"""

from __future__ import annotations

from .builder import Builder, Tensor


def forward(b: Builder) -> Tensor:
    """Token ids to logits."""
    c = b.config
    x = b.embed("token_embd")
    for layer in range(c.n_layers):
        blk = f"blk.{layer}"
        h = b.layer_norm(x, f"{blk}.attn_norm")
        q, k, v = (b.linear(h, f"{blk}.attn_{part}") for part in "qkv")
        if "attn_q_norm" in c.norms:
            q = b.layer_norm(q, f"{blk}.attn_q_norm", c.head_size)
            k = b.layer_norm(k, f"{blk}.attn_k_norm", c.head_size)
        q, k = b.rope(q, c.n_heads, c.rope), b.rope(k, c.n_kv_heads, c.rope)
        a = b.attention(layer, q, k, v, scale=c.attention_scale, window=c.windows[layer])
        x = b.add(x, b.linear(a, f"{blk}.attn_output"))
        if "ffn_norm" in c.norms:
            h = b.layer_norm(x, f"{blk}.ffn_norm")
        h = b.gated(b.linear(h, f"{blk}.ffn_gate"), b.linear(h, f"{blk}.ffn_up"), "silu")
        x = b.add(x, b.linear(h, f"{blk}.ffn_down"))
    x = b.layer_norm(b.take(x), "output_norm")
    return b.linear(x, "token_embd" if c.tied else "output")
