"""Tensors that most families have under the same names."""

from __future__ import annotations

from collections.abc import Mapping

from .hyper import Hyper
from .plan import Rows, TensorMap

BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
AROUND = AFTER | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
"""GGUF names of norms and Hugging Face's: before a block, after it, around it; of heads."""

NEVER_USED = (r".*\.rotary_emb\.inv_freq", r".*\.masked_bias", r".*\.attn\.bias")
"""Tensors of old checkpoints that are no weights."""


def embeddings(t: TensorMap, h: Hyper, *, tied: bool, add_to_norm: float = 0.0) -> tuple[str, ...]:
    """Plan the embedding, the last norm and the head; return patterns of what may be left out.

    `tied` is what `tie_word_embeddings` means when it is missing.
    """
    t.put("token_embd.weight", t.get("embed_tokens.weight", (h.n_vocab, h.width)))
    t.put("output_norm.weight", t.get("norm.weight", (h.width,)).plus(add_to_norm))
    if h.flag("tie_word_embeddings", tied):
        return (*NEVER_USED, r"(.*\.)?lm_head\.weight")
    before = "language_model." if t.prefix == "language_model.model." else ""
    t.put("output.weight", t.get_as(f"{before}lm_head.weight", (h.n_vocab, h.width)))
    return NEVER_USED


def norms(t: TensorMap, layer: int, names: Mapping[str, str], size: int, add: float = 0.0) -> None:
    """Plan norms (size,) of a layer, with `add` added to their weights."""
    for name, source in names.items():
        rows = t.get(f"layers.{layer}.{source}.weight", (size,))
        t.put(f"blk.{layer}.{name}.weight", rows.plus(add))


def projection(
    t: TensorMap, layer: int, name: str, source: str, shape: tuple[int, int], *,
    bias: bool = False, interleaved: int = 0,
) -> None:  # fmt: skip
    """Plan a matrix and its bias; heads of `interleaved` rows are made fit for rope on neighbours."""
    for kind, size in (("weight", shape), ("bias", shape[:1])) if bias else (("weight", shape),):
        rows: Rows = t.get(f"layers.{layer}.{source}.{kind}", size)
        t.put(f"blk.{layer}.{name}.{kind}", rows.interleaved(interleaved) if interleaved else rows)


def attention(
    t: TensorMap, h: Hyper, layer: int, *, biases: str = "", interleaved: bool = False
) -> None:
    """Plan q, k, v and o; `biases` names those that have one, as in "qkvo"."""
    for part, heads in (("q", h.n_heads), ("k", h.n_kv_heads), ("v", h.n_kv_heads)):
        projection(
            t, layer, f"attn_{part}", f"self_attn.{part}_proj", (heads * h.head_size, h.width),
            bias=part in biases, interleaved=h.head_size if interleaved and part != "v" else 0,
        )  # fmt: skip
    shape = (h.width, h.n_heads * h.head_size)
    projection(t, layer, "attn_output", "self_attn.o_proj", shape, bias="o" in biases)


def feed_forward(t: TensorMap, h: Hyper, layer: int, *, bias: bool = False) -> None:
    """Plan gate, up and down."""
    projection(t, layer, "ffn_gate", "mlp.gate_proj", (h.ffn_width, h.width), bias=bias)
    projection(t, layer, "ffn_up", "mlp.up_proj", (h.ffn_width, h.width), bias=bias)
    projection(t, layer, "ffn_down", "mlp.down_proj", (h.width, h.ffn_width), bias=bias)
