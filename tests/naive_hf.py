"""The slow NumPy oracle of published checkpoints: a forward pass for every family, from its papers.

It reads config.json and tensors under Hugging Face's names; nothing of it is shared with the planner,
the builder or the kernels.  Families differ in `TRAITS` and in their configuration; `hidden` is the pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from naive import gelu, rms_norm, silu, softmax


class Traits(NamedTuple):
    """What a family does differently from Llama (Touvron et al., 2023)."""

    norms: str = "before"  # a block; "after" it, "around" it, or one before both ("parallel")
    norm_offset: float = 0.0  # what is added to the weights of norms
    layer_norm: bool = False  # norms subtract the mean
    head_norm: str = ""  # of q and k: "each" head with shared weights, or "all" heads together
    gelu: bool = False
    scaled_embedding: bool = False  # by the root of the width
    global_every: int = 0  # this layer of so many has no window
    local_rope: bool = False  # layers with a window rotate by a base of their own, unscaled


TRAITS = {
    "llama": Traits(),
    "mistral": Traits(),
    "internlm2": Traits(),
    "phi3": Traits(),
    "smollm3": Traits(),
    "granite": Traits(),
    "qwen2": Traits(),
    "qwen3": Traits(head_norm="each"),
    "olmo2": Traits(norms="after", head_norm="all"),
    "olmo3": Traits(norms="after", head_norm="all", global_every=4, local_rope=True),
    "stablelm": Traits(layer_norm=True),
    "gemma": Traits(norm_offset=1.0, gelu=True, scaled_embedding=True),
    "gemma2": Traits(
        norms="around", norm_offset=1.0, gelu=True, scaled_embedding=True, global_every=2
    ),
    "gemma3_text": Traits(
        norms="around", norm_offset=1.0, head_norm="each", gelu=True, scaled_embedding=True,
        global_every=6, local_rope=True,
    ),
}  # fmt: skip


class NaiveCheckpoint:
    """A checkpoint, evaluated one operation at a time in f64."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
        self.c = {key: value for key, value in config.items() if value is not None}
        self.weights = weights
        self.traits = TRAITS[config["model_type"]]
        self.D, self.H, self.K = (
            config[f"{k}"] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        self.E = self.c.get("head_dim", self.D // self.H)
        self.L = config["num_hidden_layers"]

    def weight(self, name: str) -> np.ndarray:
        """A tensor, f64."""
        return self.weights[name].astype(np.float64)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """x @ W^T + b."""
        bias = f"{name}.bias"
        return x @ self.weight(f"{name}.weight").T + (
            self.weight(bias) if bias in self.weights else 0.0
        )

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """Normalise the last axis."""
        weight = self.weight(f"{name}.weight") + self.traits.norm_offset
        if not self.traits.layer_norm:
            return rms_norm(x, weight, self.c["rms_norm_eps"])
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(x.var(axis=-1, keepdims=True) + self.c["layer_norm_eps"]) * weight
        return x + (self.weight(f"{name}.bias") if f"{name}.bias" in self.weights else 0.0)

    # --- positions --------------------------------------------------------------------------------
    def is_local(self, layer: int) -> bool:
        """Whether a layer has the sliding window."""
        every = self.traits.global_every
        return not every or (layer + 1) % every != 0

    def angles(self, n: int, *, local: bool) -> tuple[np.ndarray, float]:
        """Angle of (position, pair), and the factor that multiplies cosine and sine."""
        n_dims = int(self.E * self.c.get("partial_rotary_factor", 1.0))
        base = self.c["rope_theta"]
        pair = np.arange(n_dims // 2)
        scaling = dict(self.c.get("rope_scaling", {}))
        if local:
            base, scaling = self.c.get("rope_local_base_freq", base), {}
        frequency = base ** (-2.0 * pair / n_dims)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        factor = scaling.get("factor", 1.0)
        context = scaling.get(
            "original_max_position_embeddings", self.c.get("original_max_position_embeddings", 0)
        )
        magnitude = 1.0
        if kind == "linear":
            frequency = frequency / factor
        elif kind == "llama3":
            low = context / scaling["low_freq_factor"]
            high = context / scaling["high_freq_factor"]
            for i, f in enumerate(frequency):
                wavelength = 2 * math.pi / f
                if wavelength > low:
                    frequency[i] = f / factor
                elif wavelength > high:
                    smooth = context / wavelength - scaling["low_freq_factor"]
                    smooth /= scaling["high_freq_factor"] - scaling["low_freq_factor"]
                    frequency[i] = (1 - smooth) * f / factor + smooth * f
        elif kind == "yarn":
            edges = [
                n_dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))
                for turns in (32, 1)
            ]
            low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), n_dims - 1)
            ramp = np.clip((pair - low) / max(high - low, 0.001), 0, 1)
            frequency = frequency / factor * ramp + frequency * (1 - ramp)
            magnitude = scaling.get("attention_factor", 0.1 * math.log(factor) + 1)
        elif kind == "longrope":
            which = "long_factor" if n > context else "short_factor"
            frequency = frequency / np.array(scaling[which])
            extension = self.c["max_position_embeddings"] / context
            magnitude = math.sqrt(1 + math.log(extension) / math.log(context))
        else:
            assert kind in ("default", "dynamic"), f"rope of kind {kind} is not known"
        return np.arange(n)[:, None] * frequency, magnitude

    def rotate(self, x: np.ndarray, layer: int) -> np.ndarray:
        """Rotate the first dimensions of (T, heads, E), halves paired."""
        if not self.c.get("no_rope_layers", [1] * self.L)[layer]:
            return x
        local = self.traits.local_rope and self.is_local(layer)
        theta, magnitude = self.angles(len(x), local=local)
        half = theta.shape[1]
        cos, sin = (magnitude * f(theta)[:, None, :] for f in (np.cos, np.sin))
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    # --- the pass ---------------------------------------------------------------------------------
    def projections(self, h: np.ndarray, at: str) -> list[np.ndarray]:
        """q (T, H, E), k and v (T, K, E), however the family packs them."""
        n, H, K, E = len(h), self.H, self.K, self.E
        if self.c["model_type"] == "phi3":
            qkv = self.linear(h, f"{at}.self_attn.qkv_proj").reshape(n, H + 2 * K, E)
            return list(np.split(qkv, [H, H + K], axis=1))
        if self.c["model_type"] == "internlm2":
            groups = self.linear(h, f"{at}.attention.wqkv").reshape(n, K, H // K + 2, E)
            return [groups[:, :, :-2].reshape(n, H, E), groups[:, :, -2], groups[:, :, -1]]
        parts = [self.linear(h, f"{at}.self_attn.{part}_proj") for part in "qkv"]
        if self.traits.head_norm == "all":
            parts[0] = self.norm(parts[0], f"{at}.self_attn.q_norm")
            parts[1] = self.norm(parts[1], f"{at}.self_attn.k_norm")
        q, k, v = (part.reshape(n, -1, E) for part in parts)
        if self.traits.head_norm == "each":
            q, k = self.norm(q, f"{at}.self_attn.q_norm"), self.norm(k, f"{at}.self_attn.k_norm")
        if self.c.get("qk_layernorm"):
            for x, part in ((q, "q"), (k, "k")):
                for i in range(x.shape[1]):
                    name = f"{at}.self_attn.{part}_layernorm.norms.{i}"
                    x[:, i] = self.norm(x[:, i], name)
        return [q, k, v]

    def attention(self, h: np.ndarray, layer: int) -> np.ndarray:
        """Causal grouped-query attention with its output projection."""
        at, n = f"model.layers.{layer}", len(h)
        q, k, v = self.projections(h, at)
        q, k = self.rotate(q, layer), self.rotate(k, layer)
        distance = np.arange(n)[:, None] - np.arange(n)[None, :]
        hidden = distance < 0
        is_windowed = self.c.get("use_sliding_window", True) and self.is_local(layer)
        if "sliding_window" in self.c and is_windowed:
            hidden |= distance >= self.c["sliding_window"]
        scale = self.c.get("query_pre_attn_scalar", self.E) ** -0.5
        scale = self.c.get("attention_multiplier", scale)
        out = np.empty_like(q)
        for head in range(self.H):
            scores = q[:, head] @ k[:, head * self.K // self.H].T * scale
            if "attn_logit_softcapping" in self.c:
                cap = self.c["attn_logit_softcapping"]
                scores = cap * np.tanh(scores / cap)
            weights = softmax(np.where(hidden, -np.inf, scores))
            out[:, head] = weights @ v[:, head * self.K // self.H]
        name = "attention.wo" if self.c["model_type"] == "internlm2" else "self_attn.o_proj"
        return self.linear(out.reshape(n, -1), f"{at}.{name}")

    def feed_forward(self, h: np.ndarray, layer: int) -> np.ndarray:
        """f(gate) * up, down again."""
        at = f"model.layers.{layer}"
        function = gelu if self.traits.gelu else silu
        if self.c["model_type"] == "phi3":
            gate, up = np.split(self.linear(h, f"{at}.mlp.gate_up_proj"), 2, axis=1)
            return self.linear(function(gate) * up, f"{at}.mlp.down_proj")
        names = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
        if self.c["model_type"] == "internlm2":
            names = [f"feed_forward.{part}" for part in ("w1", "w3", "w2")]
        gate, up, down = (f"{at}.{name}" for name in names)
        return self.linear(function(self.linear(h, gate)) * self.linear(h, up), down)

    def layer(self, x: np.ndarray, i: int) -> np.ndarray:
        """One layer: where the norms stand, and what is added to what."""
        at, r = f"model.layers.{i}", self.c.get("residual_multiplier", 1.0)

        def norm(h: np.ndarray, name: str) -> np.ndarray:
            return self.norm(h, f"{at}.{name}")

        if self.c.get("use_parallel_residual"):
            h = norm(x, "input_layernorm")
            return x + self.attention(h, i) + self.feed_forward(h, i)
        if self.traits.norms == "after":
            x = x + norm(self.attention(x, i), "post_attention_layernorm")
            return x + norm(self.feed_forward(x, i), "post_feedforward_layernorm")
        if self.traits.norms == "around":
            h = self.attention(norm(x, "input_layernorm"), i)
            x = x + norm(h, "post_attention_layernorm")
            h = self.feed_forward(norm(x, "pre_feedforward_layernorm"), i)
            return x + norm(h, "post_feedforward_layernorm")
        names = ("input_layernorm", "post_attention_layernorm")
        if self.c["model_type"] == "internlm2":
            names = ("attention_norm", "ffn_norm")
        x = x + r * self.attention(norm(x, names[0]), i)
        return x + r * self.feed_forward(norm(x, names[1]), i)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits f64 (T, V) after every token."""
        packed = self.c["model_type"] == "internlm2"
        embedding = "model.tok_embeddings" if packed else "model.embed_tokens"
        x = self.weight(f"{embedding}.weight")[np.asarray(ids)]
        if self.traits.scaled_embedding:
            x = x * math.sqrt(self.D)
        x = x * self.c.get("embedding_multiplier", 1.0)
        for i in range(self.L):
            x = self.layer(x, i)
        head = "output" if packed else "lm_head"
        head = embedding if self.c["tie_word_embeddings"] else head
        out = self.linear(self.norm(x, "model.norm"), head) / self.c.get("logits_scaling", 1.0)
        cap = self.c.get("final_logit_softcapping")
        return cap * np.tanh(out / cap) if cap else out
