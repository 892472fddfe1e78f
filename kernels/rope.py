"""Rotary position embedding, in place, from a table of cosines and sines.

Source: Su et al., RoFormer, 2021, section 3.2.2; the two ways to pair dimensions are GPT-J's (`norm`:
neighbours) and GPT-NeoX's (`neox`: halves).  Table: per position cos f32 (n/2,) then sin f32 (n/2,).
"""

from __future__ import annotations

from .layout import STEP_POSITIONS
from .simd import *


def rope(step, part, first, count, scratch, x, x_stride, n_heads, head_size, n_dims, table, neox):
    """Rotate the first `n_dims` of every head of every token by its position."""
    positions = load_i64(step + STEP_POSITIONS)
    half = n_dims // 2
    for t in range(first, first + count):
        cos = table + load_i32(positions + 4 * t) * n_dims * 4
        sin = cos + half * 4
        for head in range(n_heads):
            at = x + t * x_stride + head * head_size * 4
            i = 0
            if neox != 0:
                far = at + half * 4
                while i + 8 <= half:
                    c = load_f32x8(cos + i * 4)
                    s = load_f32x8(sin + i * 4)
                    a = load_f32x8(at + i * 4)
                    b = load_f32x8(far + i * 4)
                    store_f32x8(at + i * 4, a * c - b * s)
                    store_f32x8(far + i * 4, a * s + b * c)
                    i += 8
                while i < half:
                    c1 = load_f32(cos + i * 4)
                    s1 = load_f32(sin + i * 4)
                    a1 = load_f32(at + i * 4)
                    b1 = load_f32(far + i * 4)
                    store_f32(at + i * 4, a1 * c1 - b1 * s1)
                    store_f32(far + i * 4, a1 * s1 + b1 * c1)
                    i += 1
            else:
                while i < half:
                    c1 = load_f32(cos + i * 4)
                    s1 = load_f32(sin + i * 4)
                    a1 = load_f32(at + i * 8)
                    b1 = load_f32(at + i * 8 + 4)
                    store_f32(at + i * 8, a1 * c1 - b1 * s1)
                    store_f32(at + i * 8 + 4, a1 * s1 + b1 * c1)
                    i += 1
