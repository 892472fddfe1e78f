"""edgellama: run Llama-family language models fast on a commodity CPU.

``from edgellama import LLM`` is the whole public surface together with :mod:`edgellama.errors`.
Importing this package is cheap: NumPy and the kernels are loaded when a model is.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellama.llm import LLM

__all__ = ["LLM", "__version__"]
__version__ = "0.1.0"

# In a checkout `kernels/` and `convert/` stand beside this package; an installed wheel has them inside.
_checkout = os.path.dirname(__path__[0])
if os.path.exists(os.path.join(_checkout, "kernels", "compiler.py")) and os.path.exists(
    os.path.join(_checkout, "pyproject.toml")
):
    __path__.append(_checkout)


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from edgellama.llm import LLM

        return LLM
    raise AttributeError(f"module 'edgellama' has no attribute {name!r}")
