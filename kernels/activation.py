"""Element-wise operations on rows of activations; each may write its byte form as well."""

from __future__ import annotations

import numpy as np

from .layout import STEP_OUT_ROWS
from .quantize import write_forms
from .simd import *


def gated(name):
    """Return `gated[silu]` or `gated[gelu]`: out = f(gate) * up.

    Source: Shazeer, GLU Variants Improve Transformer, 2020; gelu is its tanh form.
    """
    is_gelu = name == "gelu"

    def operation(
        step, part, first, count, scratch,
        out, out_stride, i8, i8_stride, i16, i16_stride, gate, up, stride,
    ):  # fmt: skip
        one = splat_f32(np.float32(1.0))
        for t in range(first, first + count):
            for i in range(0, out_stride, 32):
                g = load_f32x8(gate + t * stride + i)
                u = load_f32x8(up + t * stride + i)
                z = g
                if is_gelu:  # 0.5 g (1 + tanh z) = g / (1 + exp(-2 z))
                    cubic = fma(g * g * g, splat_f32(np.float32(0.044715)), g)
                    z = cubic * splat_f32(np.float32(1.5957691216057308))
                z = divide(g, one + exp(zero_f32x8() - z)) * u
                store_f32x8(out + t * out_stride + i, z)
            to = out + t * out_stride
            write_forms(t, to, out_stride // 128, i8, i8_stride, i16, i16_stride)

    return operation


def add(step, part, first, count, scratch, out, x, y, stride, factor: float):
    """out = x + y * factor."""
    f = splat_f32(factor)
    for t in range(first, first + count):
        for i in range(t * stride, (t + 1) * stride, 32):
            store_f32x8(out + i, fma(load_f32x8(y + i), f, load_f32x8(x + i)))


def scale(step, part, first, count, scratch, x, stride, factor: float):
    """x = x * factor, in place."""
    f = splat_f32(factor)
    for t in range(first, first + count):
        for i in range(t * stride, (t + 1) * stride, 32):
            store_f32x8(x + i, load_f32x8(x + i) * f)


def take(step, part, first, count, scratch, out, x, stride):
    """Row i of `out` = row out_rows[i] of `x`: the rows whose logits are wanted."""
    rows = load_i64(step + STEP_OUT_ROWS)
    for t in range(first, first + count):
        source = x + load_i32(rows + 4 * t) * stride
        for i in range(0, stride, 32):
            store_f32x8(out + t * stride + i, load_f32x8(source + i))


def soft_cap(step, part, first, count, scratch, x, stride, cap: float):
    """x = cap * tanh(x / cap), in place.  Source: Gemma 2, 2024, section 2."""
    for t in range(first, first + count):
        for i in range(t * stride, (t + 1) * stride, 32):
            store_f32x8(x + i, capped(load_f32x8(x + i), cap))
