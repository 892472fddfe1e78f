"""Normalisation, with what usually stands around it: a residual, and the byte form of the result.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4; Ba, Kiros and
Hinton, Layer Normalization, 2016, equation 4.
"""

from __future__ import annotations

import numpy as np

from .quantize import write_forms
from .simd import *


def rms_norm(
    step, part, first, count, scratch,
    out, out_stride, i8, i8_stride, i16, i16_stride, x, x_stride, add, n_groups, width, weight, eps: float,
):  # fmt: skip
    """out = add + x / sqrt(mean(x^2) + eps) * weight over groups of `width`.

    With one group the row may end in columns of zeros, which stay; with more, `width` is a multiple
    of 8. `add` may be 0, and so may `i8` and `i16`, the
    integer forms of the result.
    """
    n_vectors = out_stride // 32 if n_groups == 1 else width // 8
    for t in range(first, first + count):
        for group in range(n_groups):
            at = x + t * x_stride + group * width * 4
            to = out + t * out_stride + group * width * 4
            squares = zero_f32x8()
            for i in range(n_vectors):
                v = load_f32x8(at + i * 32)
                squares = fma(v, v, squares)
            mean = sum_lanes(squares) / np.float32(width)
            scale = splat_f32(np.float32(1.0) / sqrt_f32(mean + eps))
            for i in range(n_vectors):
                v = load_f32x8(at + i * 32) * scale * load_f32x8(weight + i * 32)
                if add != 0:
                    v = load_f32x8(add + t * x_stride + group * width * 4 + i * 32) + v
                store_f32x8(to + i * 32, v)
        to = out + t * out_stride
        write_forms(t, to, out_stride // 128, i8, i8_stride, i16, i16_stride)


def layer_norm(
    step, part, first, count, scratch,
    out, out_stride, i8, i8_stride, i16, i16_stride, x, x_stride, n_groups, width,
    weight, weight_stride, bias, eps: float,
):  # fmt: skip
    """out = (x - mean) / sqrt(variance + eps) * weight + bias over groups of `width`.

    Group i has the weights at i * `weight_stride`; `bias` may be 0.  For the rest see `rms_norm`.
    """
    n_vectors = out_stride // 32 if n_groups == 1 else width // 8
    for t in range(first, first + count):
        for group in range(n_groups):
            at = x + t * x_stride + group * width * 4
            to = out + t * out_stride + group * width * 4
            total = zero_f32x8()
            for i in range(n_vectors):
                total = total + load_f32x8(at + i * 32)
            mean = sum_lanes(total) / np.float32(width)
            center = splat_f32(mean)
            squares = zero_f32x8()
            for i in range(width // 8):
                v = load_f32x8(at + i * 32) - center
                squares = fma(v, v, squares)
            variance = sum_lanes(squares)
            for i in range(width // 8 * 8, width):
                rest = load_f32(at + i * 4) - mean
                variance += rest * rest
            scale = splat_f32(np.float32(1.0) / sqrt_f32(variance / np.float32(width) + eps))
            for i in range(n_vectors):
                w = load_f32x8(weight + group * weight_stride + i * 32)
                v = (load_f32x8(at + i * 32) - center) * scale * w
                if bias != 0:
                    v = v + load_f32x8(bias + i * 32)
                store_f32x8(to + i * 32, v)
        to = out + t * out_stride
        write_forms(t, to, out_stride // 128, i8, i8_stride, i16, i16_stride)
