"""Model families: each file is one forward pass, written with `builder.py`.

`config.py` reads and validates hyper-parameters; a new family is a row there, a page here, and a line
in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable

from . import gemma, granite, llama, olmo, qwen, smollm, stablelm
from .builder import Builder, Node, Tensor

__all__ = ["FAMILIES", "Builder", "Node", "Tensor"]

FAMILIES: dict[str, Callable[[Builder], Tensor]] = {
    "gemma": gemma.forward,
    "gemma2": gemma.forward,
    "gemma3": gemma.forward,
    "granite": granite.forward,
    "internlm2": llama.forward,
    "llama": llama.forward,
    "olmo2": olmo.forward,
    "phi3": llama.forward,
    "qwen2": qwen.forward,
    "qwen3": qwen.forward,
    "smollm3": smollm.forward,
    "stablelm": stablelm.forward,
}
"""Forward pass by `general.architecture`."""
