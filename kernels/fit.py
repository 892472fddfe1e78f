"""Scales that lose least: per lane, min over d, q (and m) of sum w * (x - d * q - m)^2.

Blocks lie side by side: element i of eight of them at x + 32 i, its weight at w + 32 i.  A `Grid` says
which numbers q may be.  The search starts from some scales around the one that reaches the largest
element; from each it goes to q given d (and m), then to d (and m) given q by least squares, and again.
The loss has many local minima: starting often helps, and so does going on from every start.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .lanes import *
from .simd import *
from .simd import inline

_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds |v| < 2^22 to nearest even
MAX_F16 = np.float32(65519.996)  # what is larger rounds to infinity
MAX_BF16 = np.float32(3.3961774e38)


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
    tiny = splat_f32(np.float32(3e-39))
    return where_greater(absolute(v), tiny, divide(splat_f32(np.float32(1.0)), v), zero_f32x8())


@inline
def to_f16(at, v):
    """Round to f16 and back; the bits stay at `at` (16 bytes)."""
    store_f16x8(at, v)
    return load_f16x8(at)


@inline
def exceeds(v, limit):
    """1 when the magnitude of a lane does, otherwise 0."""
    return 1 if max_lanes(absolute(v)) > limit else 0


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
    """How far beyond the ends of the grid the largest element is put: `first`, first + `step` ...

    From each of the `count` trials, least squares runs `rounds` times.
    """

    first: float
    step: float
    count: int
    rounds: int


SIGNED = Trials(-0.9, 0.3, 7, 2)
LINE = Trials(-1.4, 0.4, 11, 3)
COARSE_LINE = Trials(-1.1, 0.2, 14, 3)  # two bits
CODE_BOOK = Trials(-20.0, 5.0, 7, 2)


def sums(grid, n):
    """Return sums(x, w, scale, m): of w q (x - m) and of w q^2, for the q nearest to (x - m) * scale."""
    nearest = grid.nearest

    @inline
    def add_up(x, w, scale, m):
        qx = zero_f32x8()
        qq = zero_f32x8()
        for i in range(n):
            v = load_f32x8(x + 32 * i) - m
            q = nearest(v * scale)
            wq = load_f32x8(w + 32 * i) * q
            qx = qx + wq * v
            qq = qq + wq * q
        return qx, qq

    return add_up


def loss(grid, n):
    """Return loss(x, w, d, m): the sum of w (x - m - d q)^2 for the nearest q."""
    nearest = grid.nearest

    @inline
    def add_up(x, w, d, m):
        scale = inverse(d)
        total = zero_f32x8()
        for i in range(n):
            v = load_f32x8(x + 32 * i) - m
            rest = v - d * nearest(v * scale)
            total = total + load_f32x8(w + 32 * i) * rest * rest
        return total

    return add_up


def fit_scale(grid, n, trials):
    """Return fit(x, w): d f32 per lane, for x ~ d * q."""
    add_up = sums(grid, n)
    low, high = np.float32(grid.low), np.float32(grid.high)
    first, step = np.float32(trials.first), np.float32(trials.step)
    count, rounds = trials.count, trials.rounds

    @inline
    def fit(x, w):
        d = zero_f32x8()
        best = zero_f32x8()
        to_one = inverse(peak(x, n))
        for i in range(2 * count):
            beyond = first + step * np.float32(i // 2)
            end = low - beyond if i % 2 == 0 else high + beyond
            scale = to_one * splat_f32(end)
            for _ in range(rounds):
                qx, qq = add_up(x, w, scale, zero_f32x8())
                ratio = qx * inverse(qq)
                gain = ratio * qx
                d = where_greater(gain, best, ratio, d)
                best = maximum(gain, best)
                scale = inverse(ratio)
        return d

    return fit


def fit_line(grid, n, trials, m_below_zero):
    """Return fit(x, w): d and m f32 per lane, for x ~ d * q + m. `m_below_zero`: m may not exceed 0."""
    nearest = grid.nearest
    high_q = np.float32(grid.high)
    first, step = np.float32(trials.first), np.float32(trials.step)
    count, rounds = trials.count, trials.rounds

    @inline
    def line(x, w, base, scale, offset, ww, wx):
        """d, m and what they gain, for the q nearest to (x - base - offset) * scale."""
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
        return d, m, gain

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
        best = zero_f32x8()
        if not m_below_zero:  # constant blocks
            m = wx * inverse(ww)
            best = m * wx
        for i in range(count):
            scale = to_one * splat_f32(high_q + (first + step * np.float32(i)))
            offset = zero_f32x8()
            for _ in range(rounds):
                slope, offset, gain = line(x, w, low, scale, offset, ww, wx)
                d = where_greater(gain, best, slope, d)
                m = where_greater(gain, best, offset, m)
                best = maximum(gain, best)
                scale = inverse(slope)
        return d, low + m

    return fit
