"""Model families: each file is one forward pass, written with `builder.py`.

`config.py` reads and validates hyper-parameters; a new family is a row there, a page here, and a line
in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable

from . import gemma, llama
from .builder import Builder, Node, Tensor

__all__ = ["FAMILIES", "Builder", "Node", "Tensor"]

FAMILIES: dict[str, Callable[[Builder], Tensor]] = {
    "llama": llama.forward,
    "gemma3": gemma.forward,
}
"""Forward pass by `general.architecture`."""
