"""The vocabulary of the kernels: vector types and operations, neutral to the CPU by name.

Kernels are plain Python functions over 64-bit integers (addresses are integers) and these vectors:

    F32x8    8 floats                 Bytes32  32 bytes (u8 or i8, the operation says which)
    I32x8    8 integers               Bytes16  16 of them
    Words16  16 signed words          Pairs    sums of u8 x i8 products, in the tier's own width

`+ - *` work on F32x8 and I32x8.  The words lie by subject, and kernels import them all from here:

    vectors    the types, and how an operation is declared
    memory     load_*, store_*, broadcast*, prefetch
    integers   bytes_*, tables, pairs_*, words_*: bytes, words and sums of their products
    floats     fma, exp, exp2, maximum, mask_*, sum_lanes ...
    calls      atomics, pause, calls by address

What depends on the CPU is asked of a class per tier (`generic.py`, `x86.py`).
"""

from __future__ import annotations

from .calls import *
from .floats import *
from .integers import *
from .memory import *
from .vectors import *
