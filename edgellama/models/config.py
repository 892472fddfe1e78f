"""Hyper-parameters from metadata, validated against the tensors before any kernel runs.

Kernels do not check bounds: what `read_config` returns is what makes that safe.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError, shown
from edgellama.gguf import GGUFFile
from edgellama.kernels.blocks import FORMATS

from .architectures import ARCHITECTURES, Architecture
from .keys import INT32_MAX, Keys
from .rope import RopeConfig, read_rope
from .stacked import flatten_vectors, split_projections


class ModelConfig(NamedTuple):
    """The shape of a model. Letters as in CONTRIBUTING: D width, H heads, K kv heads, E head size."""

    arch: str
    name: str
    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    ffn_width: int
    n_vocab: int
    context_length: int
    norm_eps: float
    rope: RopeConfig
    rope_local: RopeConfig | None
    windows: tuple[int, ...]  # of each layer: positions that a token sees, 0 for all before it
    norms: frozenset[str]  # of each layer
    attention_scale: float
    attn_softcap: float
    final_softcap: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    tied: bool

    def rope_of(self, layer: int) -> RopeConfig:
        """How positions rotate in a layer."""
        return self.rope_local if self.rope_local and self.windows[layer] else self.rope


def read_config(gguf: GGUFFile) -> ModelConfig:
    """Read and validate the hyper-parameters and the tensors they imply.

    Raises: ModelFileError naming the key or tensor; UnsupportedModelError for another architecture.
    """
    arch = gguf.metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise ModelFileError(
            f"{gguf.path.name}: general.architecture is missing or no string: this is no model"
        )
    family = ARCHITECTURES.get(arch)
    if family is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(
            f"{gguf.path.name} is a model of architecture {shown(arch)}; edgellama runs: {known}"
        )
    k = Keys(gguf, arch, family.defaults)
    n_experts = k.integer("expert_count", 0, 1 << 16, 0)
    k.integer("expert_used_count", 0, n_experts, 0)
    if n_experts > 0:
        raise UnsupportedModelError(
            f"{gguf.path.name} is a mixture of experts, which is not supported"
        )
    if k.metadata.get(f"{arch}.rope.scaling.finetuned") is False and family.multipliers:
        raise UnsupportedModelError(
            f"{gguf.path.name}: {arch}.rope.scaling.finetuned is False: a Granite without positions "
            "is not supported"
        )
    n_layers = k.integer("block_count", 1, 512)
    width = k.integer("embedding_length", 1, 1 << 20)
    n_heads = k.integer("attention.head_count", 1, 1024)
    n_kv_heads = k.integer("attention.head_count_kv", 1, n_heads, n_heads)
    if n_heads % n_kv_heads:
        raise ModelFileError(
            f"{gguf.path.name}: {n_heads} heads cannot share {n_kv_heads} KV heads evenly "
            f"({arch}.attention.head_count_kv)"
        )
    if width % n_heads and not k.has("attention.key_length"):
        raise ModelFileError(
            f"{gguf.path.name}: {arch}.embedding_length {width} is no multiple of {n_heads} heads"
        )
    head_size = k.integer("attention.key_length", 1, 1024, width // n_heads)
    if k.integer("attention.value_length", 1, 1024, head_size) != head_size or head_size % 8:
        raise UnsupportedModelError(
            f"{gguf.path.name}: heads of {head_size} with values of another size, or no multiple "
            "of 8, are not supported"
        )
    rope, rope_local = read_rope(gguf, k, family, head_size)
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(f"{gguf.path.name}: tensor token_embd.weight is missing")
    if len(embedding.shape) != 2 or embedding.shape[1] == 0:
        raise ModelFileError(
            f"{gguf.path.name}: tensor token_embd.weight has shape {list(embedding.shape)}; "
            "columns and rows are needed"
        )
    n_vocab = embedding.shape[1]
    if isinstance(tokens, list) and len(tokens) != n_vocab:
        raise ModelFileError(
            f"{gguf.path.name}: tokenizer.ggml.tokens has {len(tokens)} entries but "
            f"token_embd.weight has {n_vocab} rows"
        )
    declared = k.integer("vocab_size", 1, 1 << 31, n_vocab)
    if declared != n_vocab:
        raise ModelFileError(
            f"{gguf.path.name}: {arch}.vocab_size is {declared} but token_embd.weight has "
            f"{n_vocab} rows"
        )
    name = gguf.metadata.get("general.name")
    ffn_width = k.integer("feed_forward_length", 1, 1 << 22)
    q, kv = n_heads * head_size, n_kv_heads * head_size
    split_projections(gguf, n_layers, width, "attn_qkv", {"attn_q": q, "attn_k": kv, "attn_v": kv})
    if family.stacked_ffn:
        halves = {"ffn_gate": ffn_width, "ffn_up": ffn_width}
        split_projections(gguf, n_layers, width, "ffn_up", halves)
    flatten_vectors(gguf, n_layers, head_size, ("attn_q_norm", "attn_k_norm"))
    config = ModelConfig(
        arch=arch,
        name=name if isinstance(name, str) and name.isprintable() else gguf.path.stem,
        n_layers=n_layers,
        width=width,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_size=head_size,
        ffn_width=ffn_width,
        n_vocab=n_vocab,
        context_length=k.integer("context_length", 1, INT32_MAX),
        norm_eps=k.number(family.eps, 1e-20, 1.0),
        rope=rope,
        rope_local=rope_local,
        windows=_windows(k, family, n_layers),
        norms=frozenset(
            norm
            for norm in family.norms
            if norm not in family.optional or f"blk.0.{norm}.weight" in gguf.tensors
        ),
        attention_scale=_attention_scale(k, family, n_layers, head_size, width // n_heads),
        attn_softcap=_factor(k, "attn_logit_softcapping", 0.0) if family.soft_caps else 0.0,
        final_softcap=_factor(k, "final_logit_softcapping", 0.0) if family.soft_caps else 0.0,
        embedding_scale=(
            math.sqrt(width) if family.embedding_by_width
            else _factor(k, "embedding_scale", 1.0) if family.multipliers else 1.0
        ),
        residual_scale=_factor(k, "residual_scale", 1.0) if family.multipliers else 1.0,
        logit_scale=1.0 / k.number("logit_scale", 1e-3, 1e6) if family.multipliers else 1.0,
        tied="output.weight" not in gguf.tensors,
    )  # fmt: skip
    check_tensors(gguf, config)
    return config


def _factor(k: Keys, key: str, default: float) -> float:
    return k.number(key, 1e-3, 1e6) if k.has(key) else default


def _windows(k: Keys, family: Architecture, n_layers: int) -> tuple[int, ...]:
    """How many positions a token of each layer sees; 0: all before it."""
    if not k.has("attention.sliding_window"):
        return (0,) * n_layers
    window = k.integer("attention.sliding_window", 0, INT32_MAX)
    every = family.global_every
    pattern = k.metadata.get(f"{k.arch}.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        pattern = pattern.tolist()
    if isinstance(pattern, list):
        if len(pattern) != n_layers or not all(isinstance(local, bool) for local in pattern):
            raise ModelFileError(
                f"{k.file}: {k.arch}.attention.sliding_window_pattern has {len(pattern)} entries; "
                f"a boolean for each of {n_layers} layers is needed"
            )
        return tuple(window if local else 0 for local in pattern)
    if pattern is not None:
        every = k.integer("attention.sliding_window_pattern", 0, 512)
    return tuple(0 if every and (i + 1) % every == 0 else window for i in range(n_layers))


def _attention_scale(
    k: Keys, family: Architecture, n_layers: int, head_size: int, width_per_head: int
) -> float:
    """What scores are multiplied with: 1 / sqrt(E), but for the largest Gemmas, or as the file says.

    Files of Gemma 2 and 3 27B do not say that theirs is 1 / sqrt(D / H): one knows them by their
    number of layers.
    """
    by_width = n_layers == family.layers_scaled_by_width
    default = 1.0 / math.sqrt(width_per_head if by_width else head_size)
    return _factor(k, "attention.scale", default)


def check_tensors(gguf: GGUFFile, c: ModelConfig) -> None:
    """Prove that the file has the tensors the forward pass names and no other, and that they fit.

    Raises: ModelFileError naming the tensor and both shapes.
    """
    family = ARCHITECTURES[c.arch]
    q, kv = c.n_heads * c.head_size, c.n_kv_heads * c.head_size
    needed: dict[str, tuple[int, ...]] = {"token_embd.weight": (c.width, c.n_vocab)}
    if not c.tied:
        needed["output.weight"] = (c.width, c.n_vocab)
    matrices: dict[str, tuple[int, ...]] = {
        "attn_q": (c.width, q),
        "attn_k": (c.width, kv),
        "attn_v": (c.width, kv),
        "attn_output": (q, c.width),
        "ffn_gate": (c.width, c.ffn_width),
        "ffn_up": (c.width, c.ffn_width),
        "ffn_down": (c.ffn_width, c.width),
    }
    sizes = {"width": c.width, "head": c.head_size, "q": q, "k": kv}
    vectors = {"output_norm": c.width}
    for layer in range(c.n_layers):
        for part, shape in matrices.items():
            needed[f"blk.{layer}.{part}.weight"] = shape
            if f"blk.{layer}.{part}.bias" in gguf.tensors:
                needed[f"blk.{layer}.{part}.bias"] = shape[1:]
        vectors |= {f"blk.{layer}.{norm}": sizes[family.norms[norm]] for norm in c.norms}
    for name, size in vectors.items():
        needed[f"{name}.weight"] = (size,)
        if family.norm_biases and f"{name}.bias" in gguf.tensors:
            needed[f"{name}.bias"] = (size,)
    ropes = (c.rope.freq_factors, c.rope.freq_factors_long)
    extra = next((n for n in gguf.tensors if n not in needed and n not in ropes), None)
    if extra is not None:
        raise UnsupportedModelError(
            f"{gguf.path.name}: tensor {shown(extra)} has no place in a {c.arch} model of "
            f"{c.n_layers} layers; leaving it out would change every answer"
        )
    for name, shape in needed.items():
        info = gguf.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{gguf.path.name}: tensor {name} is missing")
        if info.shape != shape:
            raise ModelFileError(
                f"{gguf.path.name}: tensor {name} has shape {list(info.shape)}; the "
                f"hyper-parameters need {list(shape)}"
            )
        if info.type_name not in (FORMATS if len(shape) == 2 else ("f32", "f16", "bf16")):
            raise UnsupportedModelError(
                f"{gguf.path.name}: tensor {name} is {info.type_name}, which no kernel reads here; "
                f"matrices may be {', '.join(FORMATS)}"
            )
