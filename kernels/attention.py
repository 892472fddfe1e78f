"""Attention over the paged KV cache, and the writing of new keys and values into it.

A page holds 32 positions of one head: keys transposed, so that lanes are positions and scores need no
sums across lanes, then values:   K (E, 32) | V (32, E), with E padded to a multiple of 32.
Rows (a row = one query head of one token) run over the pages in order with an online softmax, 32
positions at a time; six rows of a sequence share every load of keys and values.  What a row computes
does not depend on its neighbours: pages it may not see change nothing (their weights are exactly 0).

Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao et al.,
FlashAttention, 2022; Kwon et al., PagedAttention, 2023.
"""

from __future__ import annotations

import numpy as np

from .layout import STEP_POSITIONS, STEP_TABLES
from .simd import *
from .simd import inline

PAGE = 32
ROWS = 6
_LOWEST = np.float32(-1e30)  # the running maximum before anything was seen; finite, so that
# exp(maximum - maximum) is 1 while a row sees nothing and its sums stay 0


def _elements(kv_type):
    if kv_type == "f16":
        return load_f16x8, 2
    if kv_type == "f32":
        return load_f32x8, 4
    raise ValueError(f"no kernels for KV type {kv_type}")


def store_kv(kv_type):
    """Return `store_kv[type]`: write the keys and values of every token to its page."""
    _, size = _elements(kv_type)
    is_f16 = kv_type == "f16"

    def operation(
        step, part, first, count, scratch,
        k, k_stride, v, v_stride, cache, head_nbytes, n_heads, head_size,
    ):  # fmt: skip
        positions = load_i64(step + STEP_POSITIONS)
        tables = load_i64(step + STEP_TABLES)
        wide = (head_size + 31) // 32 * 32
        limit = splat_f32(np.float32(65504.0))
        for t in range(first, first + count):
            position = load_i32(positions + 4 * t)
            page = load_i32(load_i64(tables + 8 * t) + 4 * (position // PAGE))
            slot = position % PAGE
            for head in range(n_heads):
                at = cache + head * head_nbytes + page * 2 * PAGE * wide * size
                values = at + (PAGE + slot) * wide * size
                key = k + t * k_stride + head * head_size * 4
                value = v + t * v_stride + head * head_size * 4
                for i in range(0, head_size, 8):
                    a = load_f32x8(key + i * 4)
                    b = load_f32x8(value + i * 4)
                    if is_f16:  # an infinity in the cache would become NaN in masked positions
                        a = maximum(minimum(a, limit), zero_f32x8() - limit)
                        b = maximum(minimum(b, limit), zero_f32x8() - limit)
                        store_f16x8(scratch, a)
                        store_f16x8(values + i * 2, b)
                        for j in range(8):
                            store_i16(at + ((i + j) * PAGE + slot) * 2, load_i16(scratch + j * 2))
                    else:
                        store_f32x8(scratch, a)
                        store_f32x8(values + i * 4, b)
                        for j in range(8):
                            store_f32(at + ((i + j) * PAGE + slot) * 4, load_f32(scratch + j * 4))

    return operation


@inline
def softmax_page(score, out_factor, state, low, high, scale, cap):
    """Turn 32 scores at `score` into weights; update the row's maximum and sum at `state`.

    Positions low <= i < high of the page are visible. Returns the factor of what was summed before.
    """
    factor = splat_f32(scale)
    a = load_f32x8(score) * factor
    b = load_f32x8(score + 32) * factor
    c = load_f32x8(score + 64) * factor
    d = load_f32x8(score + 96) * factor
    if cap != np.float32(0.0):
        a = capped(a, cap)
        b = capped(b, cap)
        c = capped(c, cap)
        d = capped(d, cap)
    if high < PAGE or low > 0:
        a = mask_before(mask_after(a, high), low)
        b = mask_before(mask_after(b, high - 8), low - 8)
        c = mask_before(mask_after(c, high - 16), low - 16)
        d = mask_before(mask_after(d, high - 24), low - 24)
    before = load_f32(state)
    peak = max(before, max_lanes(maximum(maximum(a, b), maximum(c, d))))
    top = splat_f32(peak)
    a = exp(a - top)
    b = exp(b - top)
    c = exp(c - top)
    d = exp(d - top)
    store_f32x8(score, a)
    store_f32x8(score + 32, b)
    store_f32x8(score + 64, c)
    store_f32x8(score + 96, d)
    again = first_lane(exp(splat_f32(before) - top))
    store_f32(state, peak)
    store_f32(state + 4, load_f32(state + 4) * again + sum_lanes((a + b) + (c + d)))
    store_f32(out_factor, again)


def attend(kv_type):
    """Return `attend[type]`: softmax(q K^T * scale) V for the query heads of one KV head (`part`)."""
    load, size = _elements(kv_type)

    @inline
    def tile6(out, out_stride, a, a_stride, factor, b, b_stride, depth):
        """16 columns of out (6 rows) = out * factor + a (6, depth) @ b (depth, 16)."""
        f = broadcast_f32(factor)
        a0 = load_f32x8(out) * f
        a1 = load_f32x8(out + 32) * f
        out1 = out + out_stride
        f = broadcast_f32(factor + 4)
        b0 = load_f32x8(out1) * f
        b1 = load_f32x8(out1 + 32) * f
        out2 = out1 + out_stride
        f = broadcast_f32(factor + 8)
        c0 = load_f32x8(out2) * f
        c1 = load_f32x8(out2 + 32) * f
        out3 = out2 + out_stride
        f = broadcast_f32(factor + 12)
        d0 = load_f32x8(out3) * f
        d1 = load_f32x8(out3 + 32) * f
        out4 = out3 + out_stride
        f = broadcast_f32(factor + 16)
        e0 = load_f32x8(out4) * f
        e1 = load_f32x8(out4 + 32) * f
        out5 = out4 + out_stride
        f = broadcast_f32(factor + 20)
        f0 = load_f32x8(out5) * f
        f1 = load_f32x8(out5 + 32) * f
        for k in range(depth):
            u = load(b + k * b_stride)
            v = load(b + k * b_stride + 8 * size)
            at = a + k * 4
            y = broadcast_f32(at)
            a0 = fma(u, y, a0)
            a1 = fma(v, y, a1)
            at += a_stride
            y = broadcast_f32(at)
            b0 = fma(u, y, b0)
            b1 = fma(v, y, b1)
            at += a_stride
            y = broadcast_f32(at)
            c0 = fma(u, y, c0)
            c1 = fma(v, y, c1)
            at += a_stride
            y = broadcast_f32(at)
            d0 = fma(u, y, d0)
            d1 = fma(v, y, d1)
            at += a_stride
            y = broadcast_f32(at)
            e0 = fma(u, y, e0)
            e1 = fma(v, y, e1)
            at += a_stride
            y = broadcast_f32(at)
            f0 = fma(u, y, f0)
            f1 = fma(v, y, f1)
        store_f32x8(out, a0)
        store_f32x8(out + 32, a1)
        store_f32x8(out1, b0)
        store_f32x8(out1 + 32, b1)
        store_f32x8(out2, c0)
        store_f32x8(out2 + 32, c1)
        store_f32x8(out3, d0)
        store_f32x8(out3 + 32, d1)
        store_f32x8(out4, e0)
        store_f32x8(out4 + 32, e1)
        store_f32x8(out5, f0)
        store_f32x8(out5 + 32, f1)

    @inline
    def tile1(out, a, factor, b, b_stride, depth):
        """The same for one row and 32 columns: four chains."""
        f = broadcast_f32(factor)
        a0 = load_f32x8(out) * f
        a1 = load_f32x8(out + 32) * f
        a2 = load_f32x8(out + 64) * f
        a3 = load_f32x8(out + 96) * f
        for k in range(depth):
            y = broadcast_f32(a + k * 4)
            at = b + k * b_stride
            a0 = fma(load(at), y, a0)
            a1 = fma(load(at + 8 * size), y, a1)
            a2 = fma(load(at + 16 * size), y, a2)
            a3 = fma(load(at + 24 * size), y, a3)
        store_f32x8(out, a0)
        store_f32x8(out + 32, a1)
        store_f32x8(out + 64, a2)
        store_f32x8(out + 96, a3)

    def operation(
        step, part, first, count, scratch,
        out, out_stride, q, q_stride, cache, head_nbytes, n_group, head_size, window,
        scale: float, cap: float,
    ):  # fmt: skip
        positions = load_i64(step + STEP_POSITIONS)
        tables = load_i64(step + STEP_TABLES)
        wide = (head_size + 31) // 32 * 32
        keys_nbytes = PAGE * wide * size
        head_nbytes_f32 = head_size * 4
        row_nbytes = wide * 4
        n_rows = count * n_group
        # scratch: zeros | factors | state (maximum, sum) x 6 | scores (6, 32) | q, sums (6, E) each
        zeros = scratch
        factors = scratch + 32
        state = scratch + 64
        scores = scratch + 128
        queries = scores + ROWS * PAGE * 4
        sums = queries + ROWS * row_nbytes
        base = cache + part * head_nbytes
        store_f32x8(zeros, zero_f32x8())

        row = 0
        while row < n_rows:
            token = first + row // n_group
            table = load_i64(tables + 8 * token)
            n = 1
            while (
                n < ROWS
                and row + n < n_rows
                and load_i64(tables + 8 * (first + (row + n) // n_group)) == table
            ):
                n += 1
            low = 1 << 40
            high = 0
            for r in range(n):
                t = first + (row + r) // n_group
                head = part * n_group + (row + r) % n_group
                position = load_i32(positions + 4 * t)
                high = max(high, position + 1)
                low = min(low, position + 1 - window) if window > 0 else 0
                source = q + t * q_stride + head * head_nbytes_f32
                for i in range(0, head_nbytes_f32, 32):
                    store_f32x8(queries + r * row_nbytes + i, load_f32x8(source + i))
                for i in range(0, row_nbytes, 32):
                    store_f32x8(sums + r * row_nbytes + i, zero_f32x8())
                store_f32(state + r * 8, _LOWEST)
                store_f32(state + r * 8 + 4, np.float32(0.0))
            for page in range(max(low, 0) // PAGE, (high + PAGE - 1) // PAGE):
                at = base + load_i32(table + 4 * page) * 2 * keys_nbytes
                for i in range(0, n * PAGE * 4, 32):
                    store_f32x8(scores + i, zero_f32x8())
                if n == ROWS:
                    for c in range(0, PAGE, 16):
                        tile6(
                            scores + c * 4, PAGE * 4, queries, row_nbytes, zeros,
                            at + c * size, PAGE * size, head_size,
                        )  # fmt: skip
                else:
                    for r in range(n):
                        tile1(
                            scores + r * PAGE * 4, queries + r * row_nbytes, zeros,
                            at, PAGE * size, head_size,
                        )  # fmt: skip
                for r in range(n):
                    position = load_i32(positions + 4 * (first + (row + r) // n_group))
                    visible = max(0, min(PAGE, position + 1 - page * PAGE))
                    hidden = max(0, position + 1 - window - page * PAGE) if window > 0 else 0
                    softmax_page(
                        scores + r * PAGE * 4, factors + r * 4, state + r * 8,
                        hidden, visible, scale, cap,
                    )  # fmt: skip
                values = at + keys_nbytes
                if n == ROWS:
                    for c in range(0, wide, 16):
                        tile6(
                            sums + c * 4, row_nbytes, scores, PAGE * 4, factors,
                            values + c * size, wide * size, PAGE,
                        )  # fmt: skip
                else:
                    for r in range(n):
                        for c in range(0, wide, 32):
                            tile1(
                                sums + r * row_nbytes + c * 4, scores + r * PAGE * 4,
                                factors + r * 4, values + c * size, wide * size, PAGE,
                            )  # fmt: skip
            for r in range(n):
                t = first + (row + r) // n_group
                head = part * n_group + (row + r) % n_group
                to = out + t * out_stride + head * head_nbytes_f32
                share = splat_f32(np.float32(1.0) / load_f32(state + r * 8 + 4))
                for i in range(0, head_nbytes_f32, 32):
                    store_f32x8(to + i, load_f32x8(sums + r * row_nbytes + i) * share)
            row += n

    return operation
