"""Hyper-parameters from metadata, validated against the tensors before any kernel runs.

Kernels do not check bounds: what `read_config` returns is what makes that safe.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from edgellama.errors import ModelFileError, UnsupportedModelError, shown
from edgellama.gguf import GGUFFile
from edgellama.kernels.blocks import FORMATS


class RopeConfig(NamedTuple):
    """How positions rotate: which dimensions pair up, at which frequencies."""

    kind: str  # "norm": neighbours, "neox": halves
    n_dims: int
    freq_base: float
    scaling: str = "none"  # or linear, yarn
    factor: float = 1.0
    original_context: int = 0
    ext_factor: float = 1.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    freq_factors: str = ""  # tensor of divisors


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
    sliding_window: int
    window_pattern: int
    attention_scale: float
    attn_softcap: float
    final_softcap: float
    embedding_scale: float
    tied: bool


class _Family(NamedTuple):
    """What differs between architectures."""

    rope_kind: str
    gemma: bool = False


_INT32_MAX = (1 << 31) - 1
_BASES = (2.0, 1e12)  # of the angles of rope: above 1, whose logarithm yarn divides by
_FACTORS = (1e-6, 1e6)
_FAMILIES = {"llama": _Family("norm"), "gemma3": _Family("neox", gemma=True)}


class _Keys:
    """Metadata of one architecture, read with type and range checks."""

    def __init__(self, gguf: GGUFFile, arch: str) -> None:
        self.metadata = gguf.metadata
        self.file = gguf.path.name
        self.arch = arch

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return f"{self.arch}.{key}" in self.metadata

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise ModelFileError(f"{self.file}: {self.arch}.{key} is missing")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in a range, which a default must keep to as well."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelFileError(
                f"{self.file}: {self.arch}.{key} is {shown(value)}; one integer is needed"
            )
        if not low <= value <= high:
            raise ModelFileError(
                f"{self.file}: {self.arch}.{key} is {value}; it must be {low} to {high}"
            )
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number in a range, which no NaN and no infinity is."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelFileError(
                f"{self.file}: {self.arch}.{key} is {shown(value)}; a number is needed"
            )
        if not low <= value <= high:
            raise ModelFileError(
                f"{self.file}: {self.arch}.{key} is {value}; it must be {low:g} to {high:g}"
            )
        return float(value)


def read_config(gguf: GGUFFile) -> ModelConfig:
    """Read and validate the hyper-parameters and the tensors they imply.

    Raises: ModelFileError naming the key or tensor; UnsupportedModelError for another architecture.
    """
    arch = gguf.metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise ModelFileError(
            f"{gguf.path.name}: general.architecture is missing or no string: this is no model"
        )
    family = _FAMILIES.get(arch)
    if family is None:
        known = ", ".join(sorted(_FAMILIES))
        raise UnsupportedModelError(
            f"{gguf.path.name} is a model of architecture {shown(arch)}; edgellama runs: {known}"
        )
    k = _Keys(gguf, arch)
    n_experts = k.integer("expert_count", 0, 1 << 16, 0)
    k.integer("expert_used_count", 0, n_experts, 0)
    if n_experts > 0:
        raise UnsupportedModelError(
            f"{gguf.path.name} is a mixture of experts, which is not supported"
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
    rope, rope_local = _rope(gguf, k, family, head_size)
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
    gemma = family.gemma
    name = gguf.metadata.get("general.name")
    has_window = k.has("attention.sliding_window")
    config = ModelConfig(
        arch=arch,
        name=name if isinstance(name, str) and name.isprintable() else gguf.path.stem,
        n_layers=n_layers,
        width=width,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_size=head_size,
        ffn_width=k.integer("feed_forward_length", 1, 1 << 22),
        n_vocab=n_vocab,
        context_length=k.integer("context_length", 1, _INT32_MAX),
        norm_eps=k.number("attention.layer_norm_rms_epsilon", 1e-20, 1.0),
        rope=rope,
        rope_local=rope_local,
        sliding_window=k.integer("attention.sliding_window", 1, _INT32_MAX) if has_window else 0,
        window_pattern=6 if gemma else 0,
        attention_scale=1.0 / math.sqrt(head_size),
        attn_softcap=_soft_cap(k, "attn_logit_softcapping") if gemma else 0.0,
        final_softcap=_soft_cap(k, "final_logit_softcapping") if gemma else 0.0,
        embedding_scale=math.sqrt(width) if gemma else 1.0,
        tied="output.weight" not in gguf.tensors,
    )
    check_tensors(gguf, config)
    return config


def _soft_cap(k: _Keys, key: str) -> float:
    return k.number(key, 1e-3, 1e6) if k.has(key) else 0.0


def _rope(
    gguf: GGUFFile, k: _Keys, family: _Family, head_size: int
) -> tuple[RopeConfig, RopeConfig | None]:
    n_dims = k.integer("rope.dimension_count", 2, head_size, head_size)
    if n_dims % 2:
        raise ModelFileError(
            f"{k.file}: {k.arch}.rope.dimension_count is {n_dims}; it must be even"
        )
    base = k.number("rope.freq_base", *_BASES, 10000.0)
    scaling = gguf.metadata.get(f"{k.arch}.rope.scaling.type", "none")
    factor = k.number("rope.scale_linear", *_FACTORS, 1.0)
    factor = k.number("rope.scaling.factor", *_FACTORS, factor)
    if not isinstance(scaling, str) or scaling not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"{k.file}: {k.arch}.rope.scaling.type is {shown(scaling)}; none, linear and yarn are "
            "known"
        )
    if scaling == "none" and factor != 1.0:
        scaling = "linear"
    attn_factor = k.number("rope.scaling.yarn_attn_factor", *_FACTORS, 1.0)
    factors = ""
    info = gguf.tensors.get("rope_freqs.weight")
    if info is not None:
        if info.type_name != "f32" or info.shape != (n_dims // 2,):
            raise ModelFileError(
                f"{k.file}: rope_freqs.weight is {info.type_name} {list(info.shape)}; "
                f"f32 [{n_dims // 2}] is needed"
            )
        divisors = gguf.data("rope_freqs.weight").view("<f4")
        if not all(math.isfinite(d) and d > 0 for d in divisors.tolist()):
            raise ModelFileError(f"{k.file}: rope_freqs.weight holds a divisor that is not above 0")
        factors = "rope_freqs.weight"
    rope = RopeConfig(
        kind=family.rope_kind,
        n_dims=n_dims,
        freq_base=base,
        scaling=scaling,
        factor=factor,
        original_context=k.integer(
            "rope.scaling.original_context_length", 1, _INT32_MAX,
            k.integer("context_length", 1, _INT32_MAX),
        ),
        ext_factor=k.number("rope.scaling.yarn_ext_factor", 0.0, 1.0, 1.0),
        attn_factor=k.number("rope.scaling.attn_factor", *_FACTORS, attn_factor),
        beta_fast=k.number("rope.scaling.yarn_beta_fast", *_FACTORS, 32.0),
        beta_slow=k.number("rope.scaling.yarn_beta_slow", *_FACTORS, 1.0),
        freq_factors=factors,
    )  # fmt: skip
    local = (
        RopeConfig("neox", n_dims, k.number("rope.freq_base_swa", *_BASES, 10000.0))
        if family.gemma
        else None
    )
    return rope, local


def check_tensors(gguf: GGUFFile, c: ModelConfig) -> None:
    """Prove that the file has the tensors the forward pass names and no other, and that they fit.

    Raises: ModelFileError naming the tensor and both shapes.
    """
    q, kv = c.n_heads * c.head_size, c.n_kv_heads * c.head_size
    needed: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (c.width, c.n_vocab),
        "output_norm.weight": (c.width,),
    }
    if not c.tied:
        needed["output.weight"] = (c.width, c.n_vocab)
    matrices: dict[str, tuple[int, int]] = {
        "attn_q": (c.width, q),
        "attn_k": (c.width, kv),
        "attn_v": (c.width, kv),
        "attn_output": (q, c.width),
        "ffn_gate": (c.width, c.ffn_width),
        "ffn_up": (c.width, c.ffn_width),
        "ffn_down": (c.ffn_width, c.width),
    }
    vectors = {"attn_norm": c.width, "ffn_norm": c.width}
    if _FAMILIES[c.arch].gemma:
        vectors |= {"post_attention_norm": c.width, "post_ffw_norm": c.width}
        vectors |= {"attn_q_norm": c.head_size, "attn_k_norm": c.head_size}
    for layer in range(c.n_layers):
        for part, (n_cols, n_rows) in matrices.items():
            needed[f"blk.{layer}.{part}.weight"] = (n_cols, n_rows)
            if f"blk.{layer}.{part}.bias" in gguf.tensors:
                needed[f"blk.{layer}.{part}.bias"] = (n_rows,)
        for part, size in vectors.items():
            needed[f"blk.{layer}.{part}.weight"] = (size,)
    extra = next((n for n in gguf.tensors if n not in needed and n != c.rope.freq_factors), None)
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
