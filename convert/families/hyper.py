"""Hyper-parameters: config.json becomes metadata, and whatever is not understood is an error.

Values that change what a model computes are either written to the file or required to be what the
forward pass does; those that only matter for training are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError, shown

_INT32_MAX = (1 << 31) - 1
_MISSING = object()


class Hyper:
    """The configuration of a checkpoint, and the metadata that it becomes.

    Sizes have the names of `edgellama.models.config.ModelConfig`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        architecture: str,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """`defaults`: what a key means that published configurations leave out."""
        self.config = dict(defaults or {}) | {k: v for k, v in config.items() if v is not None}
        self.architecture = architecture
        self.metadata: dict[str, Any] = {}

    # --- reading ----------------------------------------------------------------------------------
    def value(self, key: str, default: Any = _MISSING) -> Any:
        """A value that must be there, or else is `default`; null counts as missing."""
        value = self.config.get(key, default)
        if value is _MISSING:
            raise ModelFileError(f"config.json: {key} is missing")
        return value

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """A whole number above 0."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _INT32_MAX:
            raise ModelFileError(
                f"config.json: {key} is {shown(value)}; it must be an integer from 1 to {_INT32_MAX}"
            )
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A number above 0."""
        return _positive(key, self.value(key, default))

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise ModelFileError(f"config.json: {key} is {shown(value)}; it must be true or false")
        return value

    def require(self, key: str, *known: Any, default: Any = _MISSING) -> None:
        """The value must be one of `known`.

        Raises: UnsupportedModelError naming the key, the value, and what is known.
        """
        value = self.value(key, default)
        if value not in known:
            raise UnsupportedModelError(
                f"config.json: {key} is {shown(value)}; {self.architecture} is run with "
                f"{' or '.join(repr(k) for k in known)} only"
            )

    # --- writing ----------------------------------------------------------------------------------
    def put(self, key: str, value: Any) -> None:
        """Write a key of the architecture."""
        self.metadata[f"{self.architecture}.{key}"] = value

    def sizes(self, eps: str = "rms_norm_eps") -> None:
        """Read and write what every family has."""
        self.n_layers = self.integer("num_hidden_layers")
        self.width = self.integer("hidden_size")
        self.n_heads = self.integer("num_attention_heads")
        self.n_kv_heads = self.integer("num_key_value_heads", self.n_heads)
        self.ffn_width = self.integer("intermediate_size")
        self.n_vocab = self.integer("vocab_size")
        if self.n_heads % self.n_kv_heads:
            raise ModelFileError(
                f"config.json: num_attention_heads {self.n_heads} is no multiple of "
                f"num_key_value_heads {self.n_kv_heads}"
            )
        if "head_dim" not in self.config and self.width % self.n_heads:
            raise ModelFileError(
                f"config.json: hidden_size {self.width} is no multiple of num_attention_heads "
                f"{self.n_heads}"
            )
        self.head_size = self.integer("head_dim", self.width // self.n_heads)
        self.context_length = self.integer("max_position_embeddings")
        self.put("vocab_size", self.n_vocab)
        self.put("context_length", self.context_length)
        self.put("embedding_length", self.width)
        self.put("block_count", self.n_layers)
        self.put("feed_forward_length", self.ffn_width)
        self.put("attention.head_count", self.n_heads)
        self.put("attention.head_count_kv", self.n_kv_heads)
        self.put("attention.key_length", self.head_size)
        self.put("attention.value_length", self.head_size)
        kind = "layer_norm_rms_epsilon" if eps == "rms_norm_eps" else "layer_norm_epsilon"
        self.put(f"attention.{kind}", self.number(eps))

    def window(self, global_every: int = 0) -> None:
        """Write the sliding window, and which layers have it where the family does not say.

        Every `global_every`-th layer of the family sees all positions; 0: none does.
        """
        if "sliding_window" not in self.config:
            return
        self.put("attention.sliding_window", self.integer("sliding_window"))
        every = self.value("sliding_window_pattern", global_every)
        usual = [not global_every or (i + 1) % global_every != 0 for i in range(self.n_layers)]
        given = [not every or (i + 1) % every != 0 for i in range(self.n_layers)]
        if "layer_types" in self.config:
            kinds = {"sliding_attention": True, "full_attention": False}
            types = self.value("layer_types")
            unknown = [t for t in types if t not in kinds]
            if unknown or len(types) != self.n_layers:
                raise UnsupportedModelError(
                    f"config.json: layer_types has {len(types)} entries, {shown(unknown[:1])} unknown;"
                    f" {self.n_layers} of sliding_attention or full_attention are needed"
                )
            given = [kinds[t] for t in types]
        if given != usual:
            self.put("attention.sliding_window_pattern", given)

    def no_window(self) -> None:
        """Every layer must see all positions."""
        types = self.value("layer_types", ["full_attention"])
        is_on = self.flag("use_sliding_window", False) and "sliding_window" in self.config
        if "layer_types" not in self.config and is_on:
            is_on = self.value("max_window_layers", 0) < self.n_layers
        if set(types) != {"full_attention"} or (is_on and "layer_types" not in self.config):
            raise UnsupportedModelError(
                f"config.json: use_sliding_window or layer_types ask for a sliding window, which "
                f"{self.architecture} has no place for"
            )

    # --- rope -------------------------------------------------------------------------------------
    def rope(
        self, base: float = 10000.0, fraction: float = 1.0, *, longrope: bool = False
    ) -> dict[str, np.ndarray]:
        """Write how positions rotate; return the tensors of divisors that belong to it.

        `base` and `fraction` stand in for `rope_theta` and `partial_rotary_factor`; `longrope` says
        whether the architecture has a place for its divisors.
        Raises: UnsupportedModelError for a scaling, or a setting of it, that is not known.
        """
        given = self.value("rope_parameters", self.value("rope_scaling", {}))
        if not isinstance(given, dict):
            raise ModelFileError(
                f"config.json: rope_scaling is {shown(given)}; an object is needed"
            )
        if "full_attention" in given:
            local = given.get("sliding_attention") or {}
            if local.get("rope_type", "default") != "default":
                raise UnsupportedModelError(
                    "config.json: rope_parameters.sliding_attention.rope_type is "
                    f"{shown(local['rope_type'])}; default is known"
                )
            if "rope_theta" in local:
                self.config["rope_local_base_freq"] = local["rope_theta"]
            given = given["full_attention"] or {}
        scaling = {key: value for key, value in given.items() if value is not None}
        kind = scaling.pop("rope_type", scaling.pop("type", "default"))
        scaling.pop("type", None)
        self.rope_base = _positive(
            "rope_theta", scaling.pop("rope_theta", self.value("rope_theta", base))
        )
        fraction = _positive(
            "partial_rotary_factor",
            scaling.pop(
                "partial_rotary_factor",
                self.value("partial_rotary_factor", self.value("rope_pct", fraction)),
            ),
        )
        self.n_dims = int(self.head_size * fraction)
        self.put("rope.dimension_count", self.n_dims)
        self.put("rope.freq_base", self.rope_base)
        known = _SCALINGS.get(kind) if isinstance(kind, str) else None
        if known is None:
            raise UnsupportedModelError(
                f"config.json: rope_type is {shown(kind)}; known are {', '.join(_SCALINGS)}"
            )
        unknown = sorted(set(scaling) - known - {"original_max_position_embeddings"})
        if unknown:
            raise UnsupportedModelError(
                f"config.json: {shown(unknown[0])} is no known setting of rope_type {kind}"
            )
        self.scaling = scaling
        if kind == "linear":
            self.put("rope.scaling.type", "linear")
            self.put("rope.scaling.factor", self._setting("factor"))
        elif kind == "yarn":
            self._yarn()
        elif kind == "llama3":
            return {"rope_freqs.weight": self._llama3()}
        elif kind in ("longrope", "su") and longrope:
            return self._longrope()
        elif kind in ("longrope", "su"):
            raise UnsupportedModelError(
                f"config.json: rope_type is {kind}, which {self.architecture} has no place for"
            )
        return {}

    def _setting(self, key: str, default: Any = _MISSING) -> float:
        value = self.scaling.get(key, default)
        if value is _MISSING:
            raise ModelFileError(f"config.json: {key} is missing from rope_scaling")
        return _positive(key, value)

    def original_context(self) -> int:
        """The context of the model before it was extended."""
        value = self.scaling.get("original_max_position_embeddings")
        if value is None:
            return self.integer("original_max_position_embeddings", self.context_length)
        return int(_positive("original_max_position_embeddings", value))

    def _yarn(self) -> None:
        """Source: Peng et al., YaRN, 2023, section 3; its magnitude is 1 + 0.1 ln(factor)."""
        factor = self._setting("factor")
        if self.scaling.get("truncate", True) is not True:
            raise UnsupportedModelError(
                "config.json: truncate is False; yarn is run with True only"
            )
        self.put("rope.scaling.type", "yarn")
        self.put("rope.scaling.factor", factor)
        self.put("rope.scaling.original_context_length", self.original_context())
        for name in ("beta_fast", "beta_slow"):
            if name in self.scaling:
                self.put(f"rope.scaling.yarn_{name}", self._setting(name))
        if "attention_factor" in self.scaling:
            usual = 1.0 + 0.1 * math.log(factor)
            self.put("rope.scaling.attn_factor", self._setting("attention_factor") / usual)

    def _llama3(self) -> np.ndarray:
        """Divisors f32 (n_dims / 2,): slow dimensions by `factor`, fast ones by 1, a blend between.

        Source: the model card of Llama 3.1, apply_scaling.
        """
        factor, low, high = map(self._setting, ("factor", "low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise ModelFileError(
                f"config.json: high_freq_factor is {high:g}; it must be above low_freq_factor, {low:g}"
            )
        frequencies = self.rope_base ** (-np.arange(0, self.n_dims, 2) / self.n_dims)
        n_turns = self.original_context() * frequencies / (2 * math.pi)
        keep = np.clip((n_turns - low) / (high - low), 0.0, 1.0)
        return (1.0 / ((1.0 - keep) / factor + keep)).astype(np.float32)

    def _longrope(self) -> dict[str, np.ndarray]:
        """Divisors f32 (n_dims / 2,) of contexts up to the original one and of longer ones.

        Source: Ding et al., LongRoPE, 2024; magnitude: the model card of Phi-3-mini-128k-instruct.
        """
        original = self.original_context()
        tensors = {}
        for kind in ("long", "short"):
            divisors = self.scaling.get(f"{kind}_factor")
            if not isinstance(divisors, list) or len(divisors) != self.n_dims // 2:
                raise ModelFileError(
                    f"config.json: {kind}_factor is {shown(divisors)}; "
                    f"{self.n_dims // 2} numbers are needed"
                )
            values = [_positive(f"{kind}_factor", divisor) for divisor in divisors]
            tensors[f"rope_factors_{kind}.weight"] = np.array(values, np.float32)
        extension = self._setting("factor", self.context_length / original)
        magnitude = math.sqrt(1.0 + math.log(max(extension, 1.0)) / math.log(original))
        self.put("rope.scaling.type", "longrope")
        self.put("rope.scaling.original_context_length", original)
        self.put("rope.scaling.attn_factor", self._setting("attention_factor", magnitude))
        return tensors


# Scalings and their settings.  What `dynamic` does begins after max_position_embeddings, which is as
# long as the context of a converted model gets.
_SCALINGS: dict[str, set[str]] = {
    "default": {"factor"},
    "dynamic": {"factor"},
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "beta_fast", "beta_slow", "attention_factor", "truncate"},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor"},
    "su": {"factor", "short_factor", "long_factor", "attention_factor"},
}


def _positive(key: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ModelFileError(f"config.json: {key} is {shown(value)}; it must be a number above 0")
    return float(value)
