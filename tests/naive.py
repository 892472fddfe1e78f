"""The slow oracle: forward passes in plain NumPy, f64, on weights dequantized by the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


class NaiveModel:
    """Reads a whole file and evaluates it the long way."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()
                       if not name.startswith("tokenizer.")}  # fmt: skip
        self.arch = self.fields["general.architecture"]
        self.w = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
            for t in reader.tensors
        }

    def key(self, name: str, default=None):
        return self.fields.get(f"{self.arch}.{name}", default)

    def logits(self, ids: list[int]) -> np.ndarray:
        """(T, V) logits of a text."""
        gemma = self.arch == "gemma3"
        w, n = self.w, len(ids)
        heads, kv_heads = self.key("attention.head_count"), self.key("attention.head_count_kv")
        size = self.key("attention.key_length")
        window = self.key("attention.sliding_window", 0)
        eps = self.key("attention.layer_norm_rms_epsilon")

        def norm(x, name):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name]

        def linear(x, name):
            return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

        x = w["token_embd.weight"][ids]
        if gemma:
            x = x * np.sqrt(x.shape[1])
        for layer in range(self.key("block_count")):
            blk = f"blk.{layer}"
            local = gemma and (layer + 1) % 6 != 0
            reach = window if (local or not gemma) else 0
            base = 10000.0 if local else self.key("rope.freq_base")
            h = norm(x, f"{blk}.attn_norm.weight")
            q = linear(h, f"{blk}.attn_q").reshape(n, heads, size)
            k = linear(h, f"{blk}.attn_k").reshape(n, kv_heads, size)
            v = linear(h, f"{blk}.attn_v").reshape(n, kv_heads, size)
            if gemma:
                q = norm(q, f"{blk}.attn_q_norm.weight")
                k = norm(k, f"{blk}.attn_k_norm.weight")
            q, k = self.rope(q, base, gemma), self.rope(k, base, gemma)
            k, v = (np.repeat(a, heads // kv_heads, axis=1) for a in (k, v))
            scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(size)
            position = np.arange(n)
            hidden = position[None, :] > position[:, None]
            if reach:
                hidden |= position[None, :] <= position[:, None] - reach
            scores = np.where(hidden, -np.inf, scores)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            a = np.einsum("hts,shd->thd", p, v).reshape(n, heads * size)
            a = linear(a, f"{blk}.attn_output")
            x = x + (norm(a, f"{blk}.post_attention_norm.weight") if gemma else a)
            h = norm(x, f"{blk}.ffn_norm.weight")
            gate, up = linear(h, f"{blk}.ffn_gate"), linear(h, f"{blk}.ffn_up")
            if gemma:
                inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
                h = 0.5 * gate * (1 + np.tanh(inner)) * up
            else:
                h = gate / (1 + np.exp(-gate)) * up
            h = linear(h, f"{blk}.ffn_down")
            x = x + (norm(h, f"{blk}.post_ffw_norm.weight") if gemma else h)
        x = norm(x, "output_norm.weight")
        return x @ w.get("output.weight", w["token_embd.weight"]).T

    def rope(self, x: np.ndarray, base: float, neox: bool) -> np.ndarray:
        n, _, size = x.shape
        half = size // 2
        frequencies = base ** (-2.0 * np.arange(half) / size)
        if "rope_freqs.weight" in self.w:
            frequencies = frequencies / self.w["rope_freqs.weight"]
        angle = (np.arange(n)[:, None] * frequencies)[:, None, :]
        cos, sin = np.cos(angle), np.sin(angle)
        a, b = (x[..., :half], x[..., half:]) if neox else (x[..., ::2], x[..., 1::2])
        out = np.empty_like(x)
        u, v = a * cos - b * sin, a * sin + b * cos
        if neox:
            out[..., :half], out[..., half:] = u, v
        else:
            out[..., ::2], out[..., 1::2] = u, v
        return out


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
