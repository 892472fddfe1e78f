"""Reading GGUF files: bounds-checked, and fast enough to be part of start-up (`reader.py`)."""

from __future__ import annotations

from .reader import GGUFFile, Place, TensorBytes, TensorInfo, open_gguf

__all__ = ["GGUFFile", "Place", "TensorBytes", "TensorInfo", "open_gguf"]
