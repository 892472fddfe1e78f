"""GGUF files: a bounds-checked reader that is part of start-up (`reader.py`), and a writer."""

from __future__ import annotations

from .cursor import RawValue
from .reader import GGUFFile, Place, TensorBytes, TensorInfo, open_gguf

__all__ = ["GGUFFile", "Place", "RawValue", "TensorBytes", "TensorInfo", "open_gguf"]
