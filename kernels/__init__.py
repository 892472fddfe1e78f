"""Arithmetic on bytes: SIMD vocabulary, compiler, thread team and the kernels themselves.

Knows no model and no file. Numba is imported only by what `compiler.py` builds; the names below are
plain modules.  Start at `simd.py` (the vocabulary), `matmul.py` (the heart), `compiler.py` (how a
Python function becomes an object that runs without Python).
"""
