"""Llama and Mistral as they were first published: params.json, and Meta's names of tensors.

Rope is on neighbours already.  params.json does not say all: what it leaves out is known by what it says.
Source: `llama/model.py` of meta-llama/llama and llama3, `one_file_ref.py` of mistral-inference, and
`export.py` of karpathy/llama2.c, whose header has the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellama.errors import ModelFileError, UnsupportedModelError, shown

from .hyper import Hyper
from .parts import norms, projection
from .plan import TensorMap

_KNOWN = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "multiple_of",
    "ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor",
    "vocab_size", "sliding_window", "max_seq_len", "shared_classifier", "max_batch_size",
}  # fmt: skip


def translated(given: Mapping[str, Any], n_vocab: int) -> dict[str, Any]:
    """Return params.json as the config.json of the same Llama; `n_vocab`: rows of the embedding.

    Raises: ModelFileError, UnsupportedModelError for a setting that is not known.
    """
    p = {key: value for key, value in given.items() if value is not None}
    unknown = sorted(set(p) - _KNOWN)
    if unknown:
        raise UnsupportedModelError(f"params.json: {shown(unknown[0])} is no known setting")
    for key in ("dim", "n_layers", "n_heads"):
        if not isinstance(p.get(key), int):
            raise ModelFileError(f"params.json: {key} is {shown(p.get(key))}; an integer is needed")
    config: dict[str, Any] = {
        "model_type": "mistral" if "sliding_window" in p else "llama",
        "hidden_size": p["dim"],
        "num_hidden_layers": p["n_layers"],
        "num_attention_heads": p["n_heads"],
        "num_key_value_heads": p.get("n_kv_heads", p["n_heads"]),
        "intermediate_size": p.get("hidden_dim") or _ffn_width(p),
        "vocab_size": n_vocab,
        "rms_norm_eps": p.get("norm_eps", 1e-5),
        "rope_theta": p.get("rope_theta", 10000.0),
        "max_position_embeddings": p.get("max_seq_len") or _context_length(p),
        "sliding_window": p.get("sliding_window"),
        "tie_word_embeddings": p.get("shared_classifier", False),
    }
    if "head_dim" in p:
        config["head_dim"] = p["head_dim"]
    if p.get("use_scaled_rope"):
        small = p["n_layers"] in (16, 28)  # Llama 3.2
        config["rope_scaling"] = {
            "rope_type": "llama3", "factor": p.get("rope_scaling_factor", 32.0 if small else 8.0),
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
    return config


def _ffn_width(p: Mapping[str, Any]) -> int:
    """Two thirds of 4 D, times a factor, rounded up."""
    multiple = p.get("multiple_of", 256)
    if not isinstance(multiple, int) or multiple < 1:
        raise ModelFileError(f"params.json: multiple_of is {shown(multiple)}; it must be above 0")
    factor = p.get("ffn_dim_multiplier", 1.0)
    if not isinstance(factor, int | float) or not 0 < factor < 100:
        raise ModelFileError(f"params.json: ffn_dim_multiplier is {shown(factor)}")
    width = int(factor * int(2 * 4 * p["dim"] / 3))
    return -(-width // multiple) * multiple


def _context_length(p: Mapping[str, Any]) -> int:
    """Of the releases: Llama 3.1, Code Llama, Llama 3, Mistral, Llama 2, Llama 1."""
    if p.get("use_scaled_rope"):
        return 131072
    if p.get("rope_theta", 10000.0) > 10000.0:
        return 16384 if p["rope_theta"] == 1e6 else 8192
    if "head_dim" in p:
        return 32768
    return 4096 if p.get("norm_eps") == 1e-5 else 2048


def meta(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan a Llama or Mistral under Meta's names."""
    h.window()
    for name, divisors in h.rope().items():
        t.put_values(name, divisors)
    t.put("token_embd.weight", t.get("tok_embeddings.weight", (h.n_vocab, h.width)))
    t.put("output_norm.weight", t.get("norm.weight", (h.width,)))
    if not h.flag("tie_word_embeddings", False):
        t.put("output.weight", t.get("output.weight", (h.n_vocab, h.width)))
    q, kv = h.n_heads * h.head_size, h.n_kv_heads * h.head_size
    for layer in range(h.n_layers):
        norms(t, layer, {"attn_norm": "attention_norm", "ffn_norm": "ffn_norm"}, h.width)
        for part, n_rows in (("q", q), ("k", kv), ("v", kv)):
            projection(t, layer, f"attn_{part}", f"attention.w{part}", (n_rows, h.width))
        projection(t, layer, "attn_output", "attention.wo", (h.width, q))
        projection(t, layer, "ffn_gate", "feed_forward.w1", (h.ffn_width, h.width))
        projection(t, layer, "ffn_up", "feed_forward.w3", (h.ffn_width, h.width))
        projection(t, layer, "ffn_down", "feed_forward.w2", (h.width, h.ffn_width))
    return (r"rope\.freqs",)
