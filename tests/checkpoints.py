"""Small random checkpoints of every family, under the names and with the fields that Hugging Face uses.

`CONFIGS` is the contents of config.json: real fields, small sizes.  `make_checkpoint` adds random
weights; `write_gguf` carries out a plan, with a toy vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
from make_gguf import add_metadata, bpe_vocabulary

SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 160, "vocab_size": 300, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_GEMMA = {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 48,
          "tie_word_embeddings": True, "query_pre_attn_scalar": 48}  # fmt: skip


def _longrope(n: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "short_factor": np.linspace(1.0, 1.5, n).tolist(),
        "long_factor": np.linspace(1.0, 20.0, n).tolist(),
    }  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-3.1": {"model_type": "llama", "rope_scaling": _LLAMA3, "head_dim": 48,
                  "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True,
                     "rope_scaling": {"type": "linear", "factor": 2.0}},
    "mistral": {"model_type": "mistral", "sliding_window": 40},
    "mistral-nemo": {"model_type": "mistral", "sliding_window": None, "head_dim": 48},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": True,
                "no_rope_layers": [1, 1, 1, 0, 1], "no_rope_layer_interval": 4,
                "use_sliding_window": False, "sliding_window": None},
    "granite": {"model_type": "granite", "embedding_multiplier": 12.0, "logits_scaling": 8.0,
                "residual_multiplier": 0.22, "attention_multiplier": 0.0625},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768,
              "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    "qwen2-yarn": {"model_type": "qwen2", "rope_scaling": _YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 48, "attention_bias": False,
              "tie_word_embeddings": True, "rope_theta": 1e6},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 4, "sliding_window": 47,
             "original_max_position_embeddings": 1024},
    "phi3-long": {"model_type": "phi3", "rope_scaling": _longrope(16),
                  "original_max_position_embeddings": 64, "sliding_window": 262144},
    "phi4-mini": {"model_type": "phi3", "rope_scaling": _longrope(12), "partial_rotary_factor": 0.75,
                  "original_max_position_embeddings": 64, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", **_GEMMA, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"model_type": "gemma2", **_GEMMA, "attn_logit_softcapping": 3.0,
               "final_logit_softcapping": 5.0, "sliding_window": 40},
    "gemma2-scale": {"model_type": "gemma2", **_GEMMA, "attn_logit_softcapping": 50.0,
                     "final_logit_softcapping": 30.0, "sliding_window": 4096,
                     "query_pre_attn_scalar": 30},
    "gemma3": {"model_type": "gemma3_text", **_GEMMA, "num_hidden_layers": 7, "sliding_window": 40,
               "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
               "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "olmo2": {"model_type": "olmo2", "rope_theta": 500000.0},
    "olmo3": {"model_type": "olmo3", "num_hidden_layers": 5, "sliding_window": 40,
              "rope_theta": 500000.0, "rope_scaling": _YARN | {"attention_factor": 1.2}},
    "stablelm": {"model_type": "stablelm", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25,
                 "use_qkv_bias": True, "use_parallel_residual": False, "qk_layernorm": False},
    "stablelm-12b": {"model_type": "stablelm", "layer_norm_eps": 1e-5, "use_qkv_bias": False,
                     "partial_rotary_factor": 0.25, "use_parallel_residual": True,
                     "qk_layernorm": True},
    "internlm2": {"model_type": "internlm2", "bias": False, "rope_theta": 1e6,
                  "rope_scaling": {"type": "dynamic", "factor": 2.0}},
}  # fmt: skip


class ArrayTensor:
    """An array with the face of a checkpoint's tensor; it counts the rows that are read at once."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, "F32"
        self.most_rows = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        self.most_rows = max(self.most_rows, stop - start)
        return self.array[start:stop].copy()


def config_of(family: str) -> dict[str, Any]:
    """The contents of a family's config.json."""
    return SIZES | CONFIGS[family]


def shapes(c: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors.  Source: the modeling files of transformers."""
    kind = c["model_type"]
    D, F, H, K = (c[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads",
                                     "num_key_value_heads"))  # fmt: skip
    E = c.get("head_dim") or D // H
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], D)}
    if kind == "internlm2":
        out = {"model.tok_embeddings.weight": (c["vocab_size"], D)}
    if not c["tie_word_embeddings"]:
        head = "output.weight" if kind == "internlm2" else "lm_head.weight"
        out[head] = (c["vocab_size"], D)
    norms = {"input_layernorm": D, "post_attention_layernorm": D}
    linears = {
        "self_attn.q_proj": (H * E, D), "self_attn.k_proj": (K * E, D), "self_attn.v_proj": (K * E, D),
        "self_attn.o_proj": (D, H * E), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }  # fmt: skip
    biases = [n for n in linears if c.get("attention_bias") and n.startswith("self_attn")]
    biases += [n for n in linears if c.get("mlp_bias") and n.startswith("mlp")]
    if kind == "qwen2" or c.get("use_qkv_bias"):
        biases = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    if kind in ("qwen3", "gemma3_text"):
        norms |= {"self_attn.q_norm": E, "self_attn.k_norm": E}
    if kind in ("gemma2", "gemma3_text"):
        norms |= {"pre_feedforward_layernorm": D, "post_feedforward_layernorm": D}
    if kind in ("olmo2", "olmo3"):
        norms |= {"post_feedforward_layernorm": D, "self_attn.q_norm": H * E,
                  "self_attn.k_norm": K * E}  # fmt: skip
        del norms["input_layernorm"]
    if c.get("qk_layernorm"):
        norms |= {f"self_attn.q_layernorm.norms.{i}": E for i in range(H)}
        norms |= {f"self_attn.k_layernorm.norms.{i}": E for i in range(K)}
    if c.get("use_parallel_residual"):
        del norms["post_attention_layernorm"]
    if kind == "phi3":
        linears = {"self_attn.qkv_proj": ((H + 2 * K) * E, D), "self_attn.o_proj": (D, H * E),
                   "mlp.gate_up_proj": (2 * F, D), "mlp.down_proj": (D, F)}  # fmt: skip
    if kind == "internlm2":
        norms = {"attention_norm": D, "ffn_norm": D}
        linears = {"attention.wqkv": ((H + 2 * K) * E, D), "attention.wo": (D, H * E),
                   "feed_forward.w1": (F, D), "feed_forward.w3": (F, D),
                   "feed_forward.w2": (D, F)}  # fmt: skip
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        out |= {f"{at}.{name}.weight": (n,) for name, n in norms.items()}
        out |= {f"{at}.{name}.weight": shape for name, shape in linears.items()}
        out |= {f"{at}.{name}.bias": linears[name][:1] for name in biases}
        if kind == "stablelm":
            out |= {f"{at}.{n}.bias": (D,) for n in norms if n.endswith("_layernorm")}
    out["model.norm.weight"] = (D,)
    if kind == "stablelm":
        out["model.norm.bias"] = (D,)
    return out


def random_weights(c: Mapping[str, Any], seed: int = 1) -> dict[str, np.ndarray]:
    """Weights by name, f32: matrices keep the size of their input, norms lie around 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes(c).items():
        values = rng.standard_normal(shape)
        if "embed" in name:
            values *= 0.3 if c["model_type"].startswith("gemma") else 1.0
        elif len(shape) == 2:
            values *= 1.5 / shape[1] ** 0.5
        else:
            is_norm = name.endswith(".weight") and not c["model_type"].startswith("gemma")
            values = (1.0 if is_norm else 0.0) + 0.2 * values
        weights[name] = values.astype(np.float32)
    return weights


def make_checkpoint(config: dict[str, Any], weights: Mapping[str, np.ndarray]) -> SimpleNamespace:
    """What `plan` takes."""
    tensors = {name: ArrayTensor(values) for name, values in weights.items()}
    return SimpleNamespace(config=config, tensors=tensors)


def write_gguf(path: Path, plan: Any, kind: str = "F32", n_rows: int = 1000) -> Path:
    """Carry out a plan a few rows at a time, with matrices of a type that the gguf package knows."""
    writer = gguf.GGUFWriter(path, plan.architecture)
    n_vocab = plan.metadata[f"{plan.architecture}.vocab_size"]
    add_metadata(writer, plan.metadata | bpe_vocabulary(n_vocab))
    for tensor in plan.tensors:
        pieces = [
            tensor.read(at, min(at + n_rows, tensor.shape[0]))
            for at in range(0, tensor.shape[0], n_rows)
        ]
        values = np.concatenate(pieces)
        assert values.shape == tensor.shape
        assert values.dtype == np.float32
        type_id = gguf.GGMLQuantizationType[kind]
        if len(tensor.shape) == 1 or "norm" in tensor.name:
            type_id = gguf.GGMLQuantizationType.F32
        raw = gguf.quants.quantize(values, type_id)
        writer.add_tensor(tensor.name, raw, raw_dtype=type_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
