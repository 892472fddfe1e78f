"""Qwen 2 and 2.5 (biases of q, k and v), Qwen 3 (norms of the heads of q and k)."""

from __future__ import annotations

from .hyper import Hyper
from .parts import BEFORE, HEADS, attention, embeddings, feed_forward, norms
from .plan import TensorMap


def qwen2(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan a Qwen 2 or 2.5."""
    return _plan(h, t, biases="qkv")


def qwen3(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan a Qwen 3."""
    for layer in range(h.n_layers):
        norms(t, layer, HEADS, h.head_size)
    return _plan(h, t, biases="qkvo" if h.flag("attention_bias", False) else "")


def _plan(h: Hyper, t: TensorMap, biases: str) -> tuple[str, ...]:
    h.no_window()
    h.require("hidden_act", "silu", default="silu")
    for name, divisors in h.rope().items():
        t.put_values(name, divisors)
    droppable = embeddings(t, h, tied=False)
    for layer in range(h.n_layers):
        norms(t, layer, BEFORE, h.width)
        attention(t, h, layer, biases=biases)
        feed_forward(t, h, layer)
    return droppable
