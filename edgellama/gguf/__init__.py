"""Reading GGUF files: bounds-checked, and fast enough to be part of start-up (`reader.py`)."""

from __future__ import annotations

from .reader import GGUFFile, TensorInfo, open_gguf

__all__ = ["GGUFFile", "TensorInfo", "open_gguf"]
