"""Checkpoints in, GGUF out.

`checkpoint.py` opens whatever a model comes as and is where to begin; a file beside it per format.
"""
