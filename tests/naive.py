"""The slow NumPy oracle: what a model's weights say, written as plainly as possible.

Nothing here is shared with the kernels, the builder or `config.py`: hyper-parameters come straight
from the metadata, and weights through the `gguf` package's own dequantization.  Only the container
is read by `edgellama.gguf`, which its own tests compare with the `gguf` package.  `test_models.py`
compares every kernel path with this file; `test_fidelity.py` uses its divergence, and so does
`benchmarks/record_golden.py`, where only NumPy is at hand: everything else is imported late.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def dequantize(raw: np.ndarray, type_id: int, n_rows: int, n_cols: int) -> np.ndarray:
    """Return the f32 (n_rows, n_cols) values of the bytes of any GGUF tensor."""
    import gguf

    kind = gguf.GGMLQuantizationType(type_id)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rows = np.ascontiguousarray(raw).reshape(n_rows, n_cols // block * nbytes)
    return np.asarray(gguf.quants.dequantize(rows, kind), np.float32).reshape(n_rows, n_cols)


def round_activations(x: np.ndarray, form: str) -> np.ndarray:
    """Round rows to what integer kernels see: i8 with a scale per 16 columns, i16 with one per 32."""
    group, limit = {"i8": (16, 127.0), "i16": (32, 32767.0)}[form]
    n_rows, n_cols = x.shape
    padded = np.zeros((n_rows, -(-n_cols // group) * group), np.float64)
    padded[:, :n_cols] = x
    blocks = padded.reshape(n_rows, -1, group)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / limit
    codes = np.rint(blocks / np.where(scale > 0, scale, 1.0))
    return (codes * scale).reshape(n_rows, -1)[:, :n_cols].astype(x.dtype)


def round_rows(x: np.ndarray, group: int) -> np.ndarray:
    """Round (..., E) to 8 bits with a scale for every `group` elements of the last axis."""
    flat = x.reshape(-1, x.shape[-1])
    parts = [flat[:, i : i + group] for i in range(0, flat.shape[1], group)]
    scales = [np.abs(part).max(axis=1, keepdims=True) / 127.0 for part in parts]
    rounded = [np.rint(p / np.where(s > 0, s, 1.0)) * s for p, s in zip(parts, scales, strict=True)]
    return np.concatenate(rounded, axis=1).reshape(x.shape).astype(x.dtype)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / rms(x) * weight over the last axis."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) normalised over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Logarithm of softmax over the last axis, in float64."""
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x / (1.0 + np.exp(-np.clip(x, -80.0, None)))


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh form."""
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


class NaiveModel:
    """A `llama` or `gemma3` file, evaluated one operation at a time."""

    def __init__(
        self,
        path: Path | str,
        *,
        dtype: Any = np.float64,
        rounds: bool = False,
        kv_type: str = "f32",
    ) -> None:
        """`rounds`: the inputs of projections are rounded to the form their kernels take."""
        from edgellama.gguf import open_gguf

        self.file = open_gguf(path)
        self.dtype = dtype
        self.rounds = rounds
        self.kv_type = kv_type
        self.arch = self.file.metadata["general.architecture"]
        self.gemma = self.arch == "gemma3"
        self.n_layers = int(self.key("block_count"))
        self.width = int(self.key("embedding_length"))
        self.n_heads = int(self.key("attention.head_count"))
        self.n_kv_heads = int(self.key("attention.head_count_kv", self.n_heads))
        self.head_size = int(self.key("attention.key_length", self.width // self.n_heads))
        self.eps = float(self.key("attention.layer_norm_rms_epsilon"))
        self.window = int(self.key("attention.sliding_window", 0))

    def __enter__(self) -> NaiveModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def key(self, name: str, default: Any = None) -> Any:
        """A value of the architecture's metadata."""
        value = self.file.metadata.get(f"{self.arch}.{name}", default)
        if value is None:
            raise KeyError(f"{self.arch}.{name}")
        return value

    def weight(self, name: str) -> np.ndarray:
        """A tensor as (rows, cols), or (n,) for a vector."""
        info = self.file.tensors[name]
        n_rows = info.shape[1] if len(info.shape) > 1 else 1
        values = dequantize(self.file.data(name), info.type_id, n_rows, info.shape[0])
        values = values.astype(self.dtype)
        return values if len(info.shape) > 1 else values[0]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """x @ W^T + bias."""
        from edgellama.kernels.blocks import FORMATS

        form = FORMATS[self.file.tensors[f"{name}.weight"].type_name].activation
        if self.rounds and form != "f32":
            x = round_activations(x, form)
        out = x @ self.weight(f"{name}.weight").T
        if f"{name}.bias" in self.file.tensors:
            out = out + self.weight(f"{name}.bias")
        return out

    # --- positions --------------------------------------------------------------------------------
    def angles(self, n_positions: int, *, local: bool) -> tuple[np.ndarray, float]:
        """Angle of (position, pair), and the factor that multiplies cosine and sine.

        Source: llama.cpp's rope_yarn and ggml_rope_yarn_corr_dims.
        """
        n_dims = int(self.key("rope.dimension_count", self.head_size))
        base = float(self.key("rope.freq_base_swa" if local else "rope.freq_base", 10000.0))
        pair = np.arange(n_dims // 2, dtype=np.float64)
        theta = np.arange(n_positions)[:, None] * base ** (-2.0 * pair / n_dims)
        if local:
            return theta, 1.0
        if "rope_freqs.weight" in self.file.tensors:
            theta = theta / self.weight("rope_freqs.weight").astype(np.float64)
        kind = self.key("rope.scaling.type", "none")
        factor = float(self.key("rope.scaling.factor", 1.0))
        if kind == "none":
            return theta, 1.0
        if kind == "linear":
            return theta / factor, 1.0
        assert kind == "yarn", f"rope scaling {kind} is not known"
        context = int(self.key("rope.scaling.original_context_length", self.key("context_length")))
        edges = []
        for n_rotations in (
            float(self.key("rope.scaling.yarn_beta_fast", 32.0)),
            float(self.key("rope.scaling.yarn_beta_slow", 1.0)),
        ):
            turns = context / (n_rotations * 2 * math.pi)
            edges.append(n_dims * math.log(turns) / (2 * math.log(base)))
        low, high = max(0.0, math.floor(edges[0])), min(n_dims - 1.0, math.ceil(edges[1]))
        extrapolated = 1.0 - np.clip((pair - low) / max(0.001, high - low), 0.0, 1.0)
        extrapolated *= float(self.key("rope.scaling.yarn_ext_factor", 1.0))
        mixed = theta / factor * (1.0 - extrapolated) + theta * extrapolated
        magnitude = float(self.key("rope.scaling.attn_factor", 1.0))
        return mixed, magnitude * (1.0 + 0.1 * math.log(factor))

    def rotate(self, x: np.ndarray, *, local: bool) -> np.ndarray:
        """Rotate (T, heads, head size): neighbours pair in `llama`, halves in `gemma3`."""
        theta, magnitude = self.angles(len(x), local=local)
        half = theta.shape[1]
        cos = (np.cos(theta) * magnitude)[:, None, :].astype(x.dtype)
        sin = (np.sin(theta) * magnitude)[:, None, :].astype(x.dtype)
        first, second = (
            (slice(0, half), slice(half, 2 * half))
            if self.gemma
            else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        )
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out

    # --- the pass ---------------------------------------------------------------------------------
    def attention(self, h: np.ndarray, layer: int) -> np.ndarray:
        """Causal grouped-query attention of one layer, before the output projection."""
        blk, n = f"blk.{layer}", len(h)
        local = self.gemma and (layer + 1) % 6 != 0  # every sixth layer of Gemma 3 is global
        q = self.linear(h, f"{blk}.attn_q").reshape(n, self.n_heads, self.head_size)
        k = self.linear(h, f"{blk}.attn_k").reshape(n, self.n_kv_heads, self.head_size)
        v = self.linear(h, f"{blk}.attn_v").reshape(n, self.n_kv_heads, self.head_size)
        if self.gemma:
            q = rms_norm(q, self.weight(f"{blk}.attn_q_norm.weight"), self.eps)
            k = rms_norm(k, self.weight(f"{blk}.attn_k_norm.weight"), self.eps)
        q = self.rotate(q, local=local)
        k = self.rotate(k, local=local)
        if self.kv_type == "q8_0":
            k = round_rows(k, 32)
            v = round_rows(v, self.head_size)
        if self.kv_type == "f16":
            k = k.astype(np.float16).astype(self.dtype)
            v = v.astype(np.float16).astype(self.dtype)
        distance = np.arange(n)[:, None] - np.arange(n)[None, :]
        hidden = distance < 0
        if self.window and (local or not self.gemma):
            hidden |= distance >= self.window
        cap = float(self.key("attn_logit_softcapping", 0.0)) if self.gemma else 0.0
        out = np.empty_like(q)
        for head in range(self.n_heads):
            kv_head = head // (self.n_heads // self.n_kv_heads)
            scores = q[:, head] @ k[:, kv_head].T / math.sqrt(self.head_size)
            if cap:
                scores = cap * np.tanh(scores / cap)
            out[:, head] = softmax(np.where(hidden, -np.inf, scores)) @ v[:, kv_head]
        return out.reshape(n, -1)

    def hidden(self, ids: Sequence[int]) -> np.ndarray:
        """Rows (T, width) after the last norm."""
        x = self.weight("token_embd.weight")[np.asarray(ids)]
        if self.gemma:
            x = x * self.dtype(math.sqrt(self.width))
        for layer in range(self.n_layers):
            blk = f"blk.{layer}"
            h = rms_norm(x, self.weight(f"{blk}.attn_norm.weight"), self.eps)
            h = self.linear(self.attention(h, layer), f"{blk}.attn_output")
            if self.gemma:
                h = rms_norm(h, self.weight(f"{blk}.post_attention_norm.weight"), self.eps)
            x = x + h
            h = rms_norm(x, self.weight(f"{blk}.ffn_norm.weight"), self.eps)
            activation = gelu if self.gemma else silu
            h = activation(self.linear(h, f"{blk}.ffn_gate")) * self.linear(h, f"{blk}.ffn_up")
            h = self.linear(h, f"{blk}.ffn_down")
            if self.gemma:
                h = rms_norm(h, self.weight(f"{blk}.post_ffw_norm.weight"), self.eps)
            x = x + h
        return rms_norm(x, self.weight("output_norm.weight"), self.eps)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits (T, V) after every token."""
        name = "output" if "output.weight" in self.file.tensors else "token_embd"
        out = self.linear(self.hidden(ids), name)
        cap = float(self.key("final_logit_softcapping", 0.0)) if self.gemma else 0.0
        return cap * np.tanh(out / cap) if cap else out


def divergence(logits: np.ndarray, reference: Mapping[str, np.ndarray]) -> np.ndarray:
    """KL(reference || ours) f64 (T,) per row, over the reference's top 64 and "any other token".

    `reference` holds `top_ids`, `top_logprobs` and `rest_logprob` for at least as many rows.
    """
    n = len(logits)
    ids = np.asarray(reference["top_ids"][:n], np.int64)
    expected = np.asarray(reference["top_logprobs"][:n], np.float64)
    rest = np.asarray(reference["rest_logprob"][:n], np.float64)
    ours = np.take_along_axis(log_softmax(logits), ids, axis=1)
    ours_rest = np.log(np.maximum(1.0 - np.exp(ours).sum(axis=1), 1e-12))
    kl = (np.exp(expected) * (expected - ours)).sum(axis=1)
    return kl + np.exp(rest) * (rest - ours_rest)
