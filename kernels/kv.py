"""The pages of the KV cache: their layout, the writing of keys and values, the moving of keys.

A page holds 32 positions of one head.  Keys are transposed, so that lanes are positions and scores need
no sums across lanes; E is the head size padded to a multiple of 32:

    K (E, 32) | V (32, E)                                                    f16, f32
    K i8 (E, 32) | V i8 (32, E) | K scales f32 (E/32, 32) | V scales (32,)   q8_0

A position of q8_0 has a scale for every 32 elements of its key and one for its value.  One for the whole
key would not do: the heads of 256 elements of Gemma 3 270M then add 0.0043 to the mean KL, with one per
32 elements 0.0004, and values 0.0001 (SmolLM2-135M: 0.0007, 0.0004, 0.0001).

Who owns which page is the runtime's business (`edgellama/runtime/kvcache.py`); who reads them is
`attention.py`.  Source: Kwon et al., PagedAttention, 2023.
"""

from __future__ import annotations

import numpy as np

from .layout import KV_NBYTES, PAGE, STEP_IDS, STEP_POSITIONS, STEP_TABLES
from .quantize import peak_to
from .simd import *
from .simd import inline

BLOCK = 32  # elements of a key that share a scale


@inline
def finite(a, limit):
    """What is beyond the limits would become NaN in positions that are not to be seen."""
    return maximum(minimum(a, splat_f32(limit)), splat_f32(-limit))


@inline
def quantize_row(to, x, n):
    """Write n floats as bytes to `to`; return their scale."""
    limit = np.float32(1e30)
    peak = zero_f32x8()
    for i in range(0, n, 8):
        peak = maximum(peak, absolute(finite(load_f32x8(x + i * 4), limit)))
    inverse, scale = peak_to(np.float32(127.0), max_lanes(peak))
    for i in range(0, n, 8):
        store_rounded_i8x8(to + i, finite(load_f32x8(x + i * 4), limit) * inverse)
    return scale


def store(kv_type):
    """Return `store[type]`: write the keys and values of every token to its page."""
    size = KV_NBYTES[kv_type]
    limit = np.float32(65504.0) if kv_type == "f16" else np.float32(1e30)

    @inline
    def column(to, source, n):
        """Write n elements with PAGE elements from one to the next."""
        for i in range(n):
            if size == 1:
                store_i8(to + i * PAGE, load_i8(source + i))
            elif size == 2:
                store_i16(to + i * PAGE * 2, load_i16(source + i * 2))
            else:
                store_f32(to + i * PAGE * 4, load_f32(source + i * 4))

    @inline
    def convert(to, x, n):
        for i in range(0, n, 8):
            a = finite(load_f32x8(x + i * 4), limit)
            if size == 2:
                store_f16x8(to + i * 2, a)
            else:
                store_f32x8(to + i * 4, a)

    def operation(
        step, part, first, count, scratch,
        k, k_stride, v, v_stride, cache, cache_stride, page_nbytes, table_offset, n_heads, head_size,
    ):  # fmt: skip
        positions = load_i64(step + STEP_POSITIONS)
        tables = load_i64(step + STEP_TABLES)
        wide = (head_size + 31) // 32 * 32
        for t in range(first, first + count):
            position = load_i32(positions + 4 * t)
            table = load_i64(tables + 8 * t) + table_offset
            page = load_i32(table + 4 * (position // PAGE))
            slot = position % PAGE
            for head in range(n_heads):
                at = cache + head * cache_stride + page * page_nbytes
                values = at + (PAGE + slot) * wide * size
                key = k + t * k_stride + head * head_size * 4
                value = v + t * v_stride + head * head_size * 4
                if size == 1:
                    scale_at = at + 2 * PAGE * wide + slot * 4
                    for i in range(0, head_size, BLOCK):
                        n = min(BLOCK, head_size - i)
                        store_f32(scale_at, quantize_row(scratch + i, key + i * 4, n))
                        scale_at += PAGE * 4
                    store_f32(scale_at, quantize_row(values, value, head_size))
                else:
                    convert(scratch, key, head_size)
                    convert(values, value, head_size)
                column(at + slot * size, scratch, head_size)

    return operation


def rotate(kv_type):
    """Return `rotate[type]`: turn the keys of pages, each pair of dimensions by an angle of its own.

    Parts are heads, "tokens" are pages, whose numbers are the step's ids.  `angles` is f32 (n_dims,):
    cosines, then sines.  What is turned is rounded anew to the type.
    """
    size = KV_NBYTES[kv_type]
    limit = np.float32(65504.0) if kv_type == "f16" else np.float32(1e30)
    row = PAGE * 4  # bytes of a dimension in scratch

    @inline
    def unpack(keys, at, scales, n):
        """Write n dimensions as floats: f32 (n, PAGE)."""
        for d in range(n):
            for i in range(0, PAGE, 8):
                source = at + (d * PAGE + i) * size
                if size == 1:
                    scale = load_f32x8(scales + (d // BLOCK * PAGE + i) * 4)
                    store_f32x8(keys + d * row + i * 4, load_i8x8(source) * scale)
                elif size == 2:
                    store_f32x8(keys + d * row + i * 4, load_f16x8(source))
                else:
                    store_f32x8(keys + d * row + i * 4, load_f32x8(source))

    @inline
    def pack(keys, at, scales, n):
        for d in range(n):
            for i in range(0, PAGE, 8):
                a = finite(load_f32x8(keys + d * row + i * 4), limit)
                if size == 2:
                    store_f16x8(at + (d * PAGE + i) * 2, a)
                else:
                    store_f32x8(at + (d * PAGE + i) * 4, a)

    @inline
    def pack_bytes(keys, at, scales, n):
        for block in range(0, n, BLOCK):
            end = min(block + BLOCK, n)
            for i in range(0, PAGE, 8):
                peak = splat_f32(np.float32(1e-30))
                for d in range(block, end):
                    peak = maximum(peak, absolute(load_f32x8(keys + d * row + i * 4)))
                inverse = divide(splat_f32(np.float32(127.0)), peak)
                for d in range(block, end):
                    a = load_f32x8(keys + d * row + i * 4) * inverse
                    store_rounded_i8x8(at + d * PAGE + i, a)
                scale = divide(peak, splat_f32(np.float32(127.0)))
                store_f32x8(scales + (block // BLOCK * PAGE + i) * 4, scale)

    pack_again = pack_bytes if size == 1 else pack

    def operation(
        step, part, first, count, scratch,
        cache, cache_stride, page_nbytes, head_size, n_dims, angles, neox,
    ):  # fmt: skip
        pages = load_i64(step + STEP_IDS)
        wide = (head_size + 31) // 32 * 32
        n = min((n_dims + BLOCK - 1) // BLOCK * BLOCK, head_size)
        half = n_dims // 2
        for t in range(first, first + count):
            at = cache + part * cache_stride + load_i32(pages + 4 * t) * page_nbytes
            scales = at + 2 * PAGE * wide
            unpack(scratch, at, scales, n)
            for j in range(half):
                c = splat_f32(load_f32(angles + 4 * j))
                s = splat_f32(load_f32(angles + 4 * (half + j)))
                a = scratch + (j if neox != 0 else 2 * j) * row
                b = scratch + (j + half if neox != 0 else 2 * j + 1) * row
                for i in range(0, row, 32):
                    x = load_f32x8(a + i)
                    y = load_f32x8(b + i)
                    store_f32x8(a + i, x * c - y * s)
                    store_f32x8(b + i, x * s + y * c)
            pack_again(scratch, at, scales, n)

    return operation
