"""Llama 1-3.2, TinyLlama and SmolLM2; Mistral; SmolLM3; Granite: rope on neighbouring dimensions.

Hugging Face rotates halves, so that rows of q and k are reordered.
"""

from __future__ import annotations

from .hyper import Hyper
from .parts import BEFORE, attention, embeddings, feed_forward, norms
from .plan import TensorMap


def llama(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan a Llama."""
    h.no_window()
    return _plan(h, t)


def mistral(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan a Mistral: every layer has the window of the first release; later ones have none."""
    h.window()
    return _plan(h, t)


def smollm3(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan a SmolLM3, whose every fourth layer has no rope."""
    h.no_window()
    h.require("no_rope_layer_interval", 4, default=4)
    usual = [int((i + 1) % 4 != 0) for i in range(h.n_layers)]
    h.require("no_rope_layers", usual, default=usual)
    return _plan(h, t, base=2e6, tied=True)


def granite(h: Hyper, t: TensorMap) -> tuple[str, ...]:
    """Plan a Granite: what its multipliers are called in GGUF."""
    h.no_window()
    h.put("embedding_scale", h.number("embedding_multiplier", 1.0))
    h.put("attention.scale", h.number("attention_multiplier", 1.0))
    h.put("residual_scale", h.number("residual_multiplier", 1.0))
    h.put("logit_scale", h.number("logits_scaling", 1.0))
    return _plan(h, t)


def _plan(h: Hyper, t: TensorMap, *, base: float = 1e4, tied: bool = False) -> tuple[str, ...]:
    h.require("hidden_act", "silu", default="silu")
    for name, divisors in h.rope(base).items():
        t.put_values(name, divisors)
    biases = "qkvo" if h.flag("attention_bias", False) else ""
    droppable = embeddings(t, h, tied=tied)
    for layer in range(h.n_layers):
        norms(t, layer, BEFORE, h.width)
        attention(t, h, layer, biases=biases, interleaved=True)
        feed_forward(t, h, layer, bias=h.flag("mlp_bias", False))
    return droppable
