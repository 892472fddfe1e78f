"""Scales that lose least: per lane, min over d, q (and m) of sum w * (x - d * q - m)^2.

Blocks lie side by side: element i of eight of them at x + 32 i, its weight at w + 32 i.  A `Grid` says
which numbers q may be.  Some scales around the one that reaches the largest element are tried, each
judged by the best d (and m) for the q it leads to; the best then alternates between q given d, m and
d, m given q (least squares).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .lanes import *
from .simd import *
from .simd import inline

_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds |v| < 2^22 to nearest even


class Grid(NamedTuple):
    """Numbers from `low` to `high`: the nearest one to v, and its code in a file."""

    low: int
    high: int
    nearest: Any
    code: Any


def integers(low, high):
    """The grid of all integers between; the code of the lowest is 0."""
    least, most = np.float32(low), np.float32(high)

    @inline
    def nearest(v):
        shift = splat_f32(_ROUND)
        return (minimum(maximum(v, splat_f32(least)), splat_f32(most)) + shift) - shift

    @inline
    def code(v):
        return truncate(nearest(v) - splat_f32(least))

    return Grid(low, high, nearest, code)


IQ4 = Grid(-127, 113, nearest_iq4, iq4_code)
E2M1 = Grid(-12, 12, nearest_e2m1, e2m1_code)


@inline
def inverse(v):
    """1 / v, and 0 where that would be infinite or v is 0."""
    tiny = splat_f32(np.float32(1e-37))
    return where_greater(absolute(v), tiny, divide(splat_f32(np.float32(1.0)), v), zero_f32x8())


@inline
def to_f16(at, v):
    """Round to f16 and back; the bits stay at `at` (16 bytes)."""
    store_f16x8(at, v)
    return load_f16x8(at)


@inline
def peak(x, n):
    """The element of largest magnitude, the first of equals."""
    largest = zero_f32x8()
    top = zero_f32x8()
    for i in range(n):
        v = load_f32x8(x + 32 * i)
        top = where_greater(absolute(v), largest, v, top)
        largest = maximum(absolute(v), largest)
    return top


class Trials(NamedTuple):
    """How far beyond the ends of the grid the largest element is put: `first`, first + `step` ..."""

    first: float
    step: float
    count: int


SIGNED = Trials(-0.9, 0.3, 7)
LINE = Trials(-1.4, 0.5, 9)
COARSE_LINE = Trials(-1.1, 0.25, 11)  # two bits
CODE_BOOK = Trials(-20.0, 4.0, 9)


def fit_scale(grid, n, trials):
    """Return fit(x, w): d f32 per lane, for x ~ d * q."""
    nearest = grid.nearest
    low, high = np.float32(grid.low), np.float32(grid.high)
    first, step, count = np.float32(trials.first), np.float32(trials.step), trials.count

    @inline
    def sums(x, w, scale):
        qx = zero_f32x8()
        qq = zero_f32x8()
        for i in range(n):
            v = load_f32x8(x + 32 * i)
            q = nearest(v * scale)
            wq = load_f32x8(w + 32 * i) * q
            qx = qx + wq * v
            qq = qq + wq * q
        ratio = qx * inverse(qq)
        return ratio, ratio * qx

    @inline
    def fit(x, w):
        d = zero_f32x8()
        best = zero_f32x8()
        to_one = inverse(peak(x, n))
        for i in range(2 * count):
            beyond = first + step * np.float32(i // 2)
            end = low - beyond if i % 2 == 0 else high + beyond
            ratio, gain = sums(x, w, to_one * splat_f32(end))
            d = where_greater(gain, best, ratio, d)
            best = maximum(gain, best)
        for _ in range(2):
            ratio, gain = sums(x, w, inverse(d))
            d = where_greater(gain, best, ratio, d)
            best = maximum(gain, best)
        return d

    return fit


def fit_line(grid, n, trials, m_below_zero):
    """Return fit(x, w): d and m f32 per lane, for x ~ d * q + m. `m_below_zero`: m may not exceed 0."""
    nearest = grid.nearest
    high_q = np.float32(grid.high)
    first, step, count = np.float32(trials.first), np.float32(trials.step), trials.count

    @inline
    def improve(x, w, base, scale, offset, ww, wx, state):
        """Line for the q at (x - base - offset) * scale, if it gains on that of `state`."""
        q1 = zero_f32x8()
        qq = zero_f32x8()
        qx = zero_f32x8()
        for i in range(n):
            v = load_f32x8(x + 32 * i) - base
            q = nearest((v - offset) * scale)
            wq = load_f32x8(w + 32 * i) * q
            q1 = q1 + wq
            qq = qq + wq * q
            qx = qx + wq * v
        # Where all q are (nearly) alike there is no line: a constant, or a line through 0.
        determinant = ww * qq - q1 * q1
        determinant = where_greater(
            determinant, splat_f32(np.float32(1e-6)) * ww * qq, determinant, zero_f32x8()
        )
        d = (ww * qx - wx * q1) * inverse(determinant)
        m = (qq * wx - q1 * qx) * inverse(determinant)
        if m_below_zero:
            top = zero_f32x8() - base
            m = where_greater(determinant, zero_f32x8(), m, splat_f32(np.float32(3e38)))
            d = where_greater(m, top, (qx - top * q1) * inverse(qq), d)
            m = minimum(m, top)
        two = splat_f32(np.float32(2.0))
        gain = d * (two * (qx - m * q1) - d * qq) + m * (two * wx - m * ww)
        return (
            where_greater(gain, state[0], d, state[1]),
            where_greater(gain, state[0], m, state[2]),
            maximum(gain, state[0]),
        )

    @inline
    def fit(x, w):
        low = load_f32x8(x)
        high = load_f32x8(x)
        for i in range(1, n):
            v = load_f32x8(x + 32 * i)
            low = minimum(low, v)
            high = maximum(high, v)
        if m_below_zero:
            low = minimum(low, zero_f32x8())
        ww = zero_f32x8()
        wx = zero_f32x8()
        for i in range(n):
            v = load_f32x8(w + 32 * i)
            ww = ww + v
            wx = wx + v * (load_f32x8(x + 32 * i) - low)
        to_one = inverse(high - low)
        d = zero_f32x8()
        m = zero_f32x8()
        gain = zero_f32x8()
        if not m_below_zero:  # constant blocks
            m = wx * inverse(ww)
            gain = m * wx
        for i in range(count):
            scale = to_one * splat_f32(high_q + (first + step * np.float32(i)))
            d, m, gain = improve(x, w, low, scale, zero_f32x8(), ww, wx, (gain, d, m))
        for _ in range(2):
            d, m, gain = improve(x, w, low, inverse(d), m, ww, wx, (gain, d, m))
        return d, low + m

    return fit


def fit_slope(grid, n):
    """Return fit(x, w, d, m): the best d for the q that d and m lead to, and for m as it will be read."""
    nearest = grid.nearest

    @inline
    def fit(x, w, d, m):
        scale = inverse(d)
        qx = zero_f32x8()
        qq = zero_f32x8()
        for i in range(n):
            v = load_f32x8(x + 32 * i) - m
            q = nearest(v * scale)
            wq = load_f32x8(w + 32 * i) * q
            qx = qx + wq * v
            qq = qq + wq * q
        return qx * inverse(qq)

    return fit

