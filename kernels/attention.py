"""Attention over the paged KV cache.

A row is one query head of one token.  Positions are cut into spans of 256 (`layout.SPAN`): within a span
a row's scores, their maximum, the weights 2^(score - maximum) and the weighted sums of values are
computed plainly, and spans are merged in order.  That is what a row's result is, whoever computes it:
with many tokens a thread goes over the spans itself; with few, spans are parts that threads share, and
`merge` puts together what they left.

Up to six rows of a sequence share every load of keys and values.  What a row computes does not depend
on its neighbours: positions that it may not see have weights of exactly 0, and so have whole spans.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao et al.,
FlashAttention, 2022; Dao et al., Flash-Decoding, 2023.
"""

from __future__ import annotations

import numpy as np

from .kv import BLOCK
from .layout import KV_NBYTES, PAGE, SPAN, STEP_N_SPANS, STEP_POSITIONS, STEP_TABLES
from .quantize import write_forms
from .simd import *
from .simd import inline
from .tiles import tile_load, tile_operations, tile_rows

ROWS = 6
PAGES = SPAN // PAGE
SCORES_NBYTES = SPAN * 4
_LOG2E = np.float32(1.4426950408889634)
_LOWEST = np.float32(-1e30)  # the maximum of a row that sees nothing; finite, so that 2^0 is what
# exp2(maximum - maximum) gives


# --- one span -------------------------------------------------------------------------------------
def _products(kv_type, rows, columns):
    """Return (score, weigh) of a tile: the two products of attention over the pages of a span."""
    kind = "i8" if kv_type == "q8_0" else kv_type
    size = KV_NBYTES[kv_type]
    zero, add, add_scaled, store = tile_operations(rows, columns)
    rows_at = tile_rows(rows)
    load, load_scales = tile_load(kind, columns), tile_load("f32", columns)
    width = 8 * columns

    @inline
    def dot(tile, a, a_stride, keys, n, ahead):
        """tile + a (rows, n) @ keys (n, columns); what lies `ahead` is fetched meanwhile."""
        a = rows_at(a, a_stride)
        for k in range(n):
            if rows <= 4:
                prefetch(keys + ahead)
            tile = add(tile, load(keys), a, k * 4)
            keys += PAGE * size
        return tile

    @inline
    def score(to, a, a_stride, base, page_nbytes, pages, n_pages, head_size, wide):
        """to (rows, positions) = a (rows, E) @ K (E, positions)."""
        for i in range(n_pages):
            at = base + load_i32(pages + 4 * i) * page_nbytes
            ahead = base + load_i32(pages + 4 * min(i + 1, n_pages - 1)) * page_nbytes - at
            for c in range(0, PAGE, width):
                keys = at + c * size
                tile = zero()
                if size > 1:
                    tile = dot(tile, a, a_stride, keys, head_size, ahead)
                else:
                    scales = at + 2 * wide * PAGE + c * 4
                    for k in range(0, head_size, BLOCK):
                        n = min(BLOCK, head_size - k)
                        part = dot(zero(), a + k * 4, a_stride, keys + k * PAGE, n, ahead)
                        tile = add_scaled(tile, part, load_scales(scales))
                        scales += PAGE * 4
                store(to + (i * PAGE + c) * 4, SCORES_NBYTES, tile)

    @inline
    def weigh(to, to_stride, weights, base, page_nbytes, pages, n_pages, wide):
        """to (rows, E) = weights (rows, positions) @ V (positions, E)."""
        for c in range(0, wide, width):
            tile = zero()
            y = rows_at(weights, SCORES_NBYTES)
            for i in range(n_pages):
                at = base + load_i32(pages + 4 * i) * page_nbytes
                ahead = base + load_i32(pages + 4 * min(i + 2, n_pages - 1)) * page_nbytes - at
                at += (PAGE * wide + c) * size
                for k in range(PAGE):
                    values = at + k * wide * size
                    if rows <= 4:
                        prefetch(values + ahead)
                    tile = add(tile, load(values), y, (i * PAGE + k) * 4)
            store(to + c * 4, to_stride, tile)

    return score, weigh


@inline
def masked(score, i, low, high, cap):
    """Cap 8 scores, and put -inf where it is not low <= i < high."""
    a = load_f32x8(score + i * 4)
    if cap != np.float32(0.0) or i + 8 > high or i < low:
        if cap != np.float32(0.0):
            a = capped(a, cap)
        a = mask_before(mask_after(a, high - i), low - i)
        store_f32x8(score + i * 4, a)
    return a


@inline
def softmax(score, n, low, high, cap, state):
    """Turn n scores into weights, 0 outside low <= i < high; write maximum and sum to `state`."""
    a = splat_f32(_LOWEST)
    b = a
    for i in range(0, n, 16):
        a = maximum(a, masked(score, i, low, high, cap))
        b = maximum(b, masked(score, i + 8, low, high, cap))
    peak = max_lanes(maximum(a, b))
    top = splat_f32(peak)
    a = zero_f32x8()
    b = zero_f32x8()
    for i in range(0, n * 4, 64):
        u = exp2(load_f32x8(score + i) - top)
        v = exp2(load_f32x8(score + i + 32) - top)
        store_f32x8(score + i, u)
        store_f32x8(score + i + 32, v)
        a = a + u
        b = b + v
    store_f32(state, peak)
    store_f32(state + 4, sum_lanes(a + b))


@inline
def scale_weights(weight, base, page_nbytes, pages, n_pages, offset):
    """Multiply weights with the scales of their values."""
    for i in range(n_pages):
        scales = base + load_i32(pages + 4 * i) * page_nbytes + offset
        for j in range(0, PAGE * 4, 32):
            at = weight + i * PAGE * 4 + j
            store_f32x8(at, load_f32x8(at) * load_f32x8(scales + j))


# --- spans together -------------------------------------------------------------------------------
@inline
def clear_row(out, state, head_nbytes):
    for i in range(0, head_nbytes, 32):
        store_f32x8(out + i, zero_f32x8())
    store_f32(state, _LOWEST)
    store_f32(state + 4, np.float32(0.0))


@inline
def merge_row(out, state, sums, span_state, head_nbytes):
    """Add the sums of a span to a row's, both relative to their maximum."""
    before = load_f32(state)
    here = load_f32(span_state)
    peak = max(before, here)
    f = exp2(splat_f32(before - peak))
    g = exp2(splat_f32(here - peak))
    for i in range(0, head_nbytes, 32):
        store_f32x8(out + i, fma(load_f32x8(sums + i), g, load_f32x8(out + i) * f))
    store_f32(state, peak)
    total = load_f32(state + 4) * first_lane(f) + load_f32(span_state + 4) * first_lane(g)
    store_f32(state + 4, total)


@inline
def finish_row(out, state, head_nbytes):
    share = splat_f32(np.float32(1.0) / load_f32(state + 4))
    for i in range(0, head_nbytes, 32):
        store_f32x8(out + i, load_f32x8(out + i) * share)


@inline
def copy_row(to, source, nbytes):
    for i in range(0, nbytes, 32):
        store_f32x8(to + i, load_f32x8(source + i))


@inline
def place(rows, stride, token, head, head_nbytes):
    return rows + token * stride + head * head_nbytes


# --- operations -----------------------------------------------------------------------------------
def attend(kv_type):
    """Return `attend[type]`: softmax(q K^T * scale) V for the query heads of one KV head.

    A part is a KV head, or one span of it; then its sums go to `partials`, a row for each token and
    span: sums f32 (heads, E) | (maximum, sum) f32 (heads, 2).
    """
    size = KV_NBYTES[kv_type]
    score6, weigh6 = _products(kv_type, 6, 2)
    score4, weigh4 = _products(kv_type, 4, 2)
    score3, weigh3 = _products(kv_type, 3, 2)
    score2, weigh2 = _products(kv_type, 2, 4)
    score1, weigh1 = _products(kv_type, 1, 4)

    @inline
    def score(n, to, a, a_stride, base, page_nbytes, pages, n_pages, head_size, wide):
        if n >= 5:  # for five rows, the sixth is whatever lies there
            score6(to, a, a_stride, base, page_nbytes, pages, n_pages, head_size, wide)
        elif n == 4:
            score4(to, a, a_stride, base, page_nbytes, pages, n_pages, head_size, wide)
        elif n == 3:
            score3(to, a, a_stride, base, page_nbytes, pages, n_pages, head_size, wide)
        elif n == 2:
            score2(to, a, a_stride, base, page_nbytes, pages, n_pages, head_size, wide)
        else:
            score1(to, a, a_stride, base, page_nbytes, pages, n_pages, head_size, wide)

    @inline
    def weigh(n, to, to_stride, weights, base, page_nbytes, pages, n_pages, wide):
        if n >= 5:
            weigh6(to, to_stride, weights, base, page_nbytes, pages, n_pages, wide)
        elif n == 4:
            weigh4(to, to_stride, weights, base, page_nbytes, pages, n_pages, wide)
        elif n == 3:
            weigh3(to, to_stride, weights, base, page_nbytes, pages, n_pages, wide)
        elif n == 2:
            weigh2(to, to_stride, weights, base, page_nbytes, pages, n_pages, wide)
        else:
            weigh1(to, to_stride, weights, base, page_nbytes, pages, n_pages, wide)

    def operation(
        step, part, first, count, scratch,
        out, out_stride, q, q_stride, cache, cache_stride, page_nbytes, table_offset,
        partials, partials_stride,
        n_kv_heads, n_group, head_size, window, scale: float, cap: float,
    ):  # fmt: skip
        positions = load_i64(step + STEP_POSITIONS)
        tables = load_i64(step + STEP_TABLES)
        n_spans = load_i64(step + STEP_N_SPANS)
        kv_head = part % n_kv_heads
        base = cache + kv_head * cache_stride
        wide = (head_size + 31) // 32 * 32
        row_nbytes = wide * 4
        head_nbytes = head_size * 4
        n_rows = count * n_group
        factor = splat_f32(scale * _LOG2E)  # scores are logarithms to base 2
        base2_cap = cap * _LOG2E
        # scratch: states of a span | scores (6, SPAN) | q (6, E) | sums (6, E) | states of all rows
        span_states = scratch
        scores = scratch + 64
        queries = scores + ROWS * SCORES_NBYTES
        sums = queries + ROWS * row_nbytes
        states = sums + ROWS * row_nbytes

        first_span = 1 << 40
        last_span = -1
        for row in range(n_rows):
            t = first + row // n_group
            position = load_i32(positions + 4 * t)
            low = max(0, position + 1 - window) if window > 0 else 0
            first_span = min(first_span, low // SPAN)
            last_span = max(last_span, position // SPAN)
            if n_spans == 1:
                to = place(out, out_stride, t, kv_head * n_group + row % n_group, head_nbytes)
                clear_row(to, states + row * 8, head_nbytes)
        if n_spans > 1:
            first_span = max(first_span, part // n_kv_heads)
            last_span = min(last_span, part // n_kv_heads)

        for span in range(first_span, last_span + 1):
            row = 0
            while row < n_rows:
                # As many rows of one sequence as there are, up to six.
                table = load_i64(tables + 8 * (first + row // n_group))
                low = 1 << 40
                high = 0
                n = 0
                while n < ROWS and row + n < n_rows:
                    t = first + (row + n) // n_group
                    if load_i64(tables + 8 * t) != table:
                        break
                    position = load_i32(positions + 4 * t)
                    high = max(high, position + 1)
                    low = min(low, max(0, position + 1 - window)) if window > 0 else 0
                    n += 1
                first_page = max(low // PAGE, span * PAGES)
                n_pages = min((high + PAGE - 1) // PAGE, (span + 1) * PAGES) - first_page
                if n_pages <= 0:
                    row += n
                    continue
                pages = table + table_offset + 4 * first_page
                for r in range(n):
                    head = kv_head * n_group + (row + r) % n_group
                    source = place(q, q_stride, first + (row + r) // n_group, head, head_nbytes)
                    to = queries + r * row_nbytes
                    for i in range(0, head_nbytes, 32):
                        store_f32x8(to + i, load_f32x8(source + i) * factor)
                score(n, scores, queries, row_nbytes, base, page_nbytes, pages, n_pages,
                      head_size, wide)  # fmt: skip
                for r in range(n):
                    weights = scores + r * SCORES_NBYTES
                    position = load_i32(positions + 4 * (first + (row + r) // n_group))
                    seen = position + 1 - first_page * PAGE
                    hidden = max(0, seen - window) if window > 0 else 0
                    softmax(weights, n_pages * PAGE, hidden, seen, base2_cap, span_states + r * 8)
                    if size == 1:
                        offset = (2 * wide + wide // BLOCK * 4) * PAGE
                        scale_weights(weights, base, page_nbytes, pages, n_pages, offset)
                weigh(n, sums, row_nbytes, scores, base, page_nbytes, pages, n_pages, wide)
                for r in range(n):
                    t = first + (row + r) // n_group
                    head = kv_head * n_group + (row + r) % n_group
                    state = span_states + r * 8
                    if n_spans == 1:
                        to = place(out, out_stride, t, head, head_nbytes)
                        merge_row(to, states + (row + r) * 8, sums + r * row_nbytes, state,
                                  head_nbytes)  # fmt: skip
                    else:
                        to = partials + (t * n_spans + span) * partials_stride
                        copy_row(to + head * head_nbytes, sums + r * row_nbytes, head_nbytes)
                        to += n_kv_heads * n_group * head_nbytes + head * 8
                        store_i64(to, load_i64(state))
                row += n

        if n_spans == 1:
            for row in range(n_rows):
                head = kv_head * n_group + row % n_group
                to = place(out, out_stride, first + row // n_group, head, head_nbytes)
                finish_row(to, states + row * 8, head_nbytes)

    return operation


def merge(
    step, part, first, count, scratch,
    out, out_stride, i8, i8_stride, i16, i16_stride, partials, partials_stride,
    n_heads, head_size, window,
):  # fmt: skip
    """Put the spans of every row together where `attend` shared them out; write the byte forms."""
    positions = load_i64(step + STEP_POSITIONS)
    n_spans = load_i64(step + STEP_N_SPANS)
    head_nbytes = head_size * 4
    for t in range(first, first + count):
        row = out + t * out_stride
        if n_spans > 1:
            position = load_i32(positions + 4 * t)
            first_span = max(0, position + 1 - window) // SPAN if window > 0 else 0
            for head in range(n_heads):
                to = row + head * head_nbytes
                clear_row(to, scratch, head_nbytes)
                for span in range(first_span, position // SPAN + 1):
                    at = partials + (t * n_spans + span) * partials_stride
                    state = at + n_heads * head_nbytes + head * 8
                    merge_row(to, scratch, at + head * head_nbytes, state, head_nbytes)
                finish_row(to, scratch, head_nbytes)
        write_forms(t, row, out_stride // 128, i8, i8_stride, i16, i16_stride)
