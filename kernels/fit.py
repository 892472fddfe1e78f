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
def within_f16(v):
    """Clamp to what f16 holds."""
    most = splat_f32(np.float32(65504.0))
    return minimum(maximum(v, zero_f32x8() - most), most)


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

    From each of the `n_trials` trials, least squares runs `rounds` times.
    """

    first: float
    step: float
    n_trials: int
    rounds: int


SIGNED = Trials(-0.9, 0.3, 7, 3)
LINE = Trials(-1.2, 0.4, 11, 4)
COARSE_LINE = Trials(-1.0, 0.2, 14, 4)  # two bits
CODE_BOOK = Trials(-20.0, 5.0, 7, 3)


def sums_and_loss(grid, n):
    """Return add_up(x, w, d, m), for the q nearest to (x - m) / d.

    Sums of w q, w q^2, w q (x - m), w (x - m), and the loss w (x - m - d q)^2.
    """
    nearest = grid.nearest

    @inline
    def add_up(x, w, d, m):
        scale = inverse(d)
        q1 = zero_f32x8()
        qq = zero_f32x8()
        qx = zero_f32x8()
        wx = zero_f32x8()
        lost = zero_f32x8()
        for i in range(n):
            v = load_f32x8(x + 32 * i) - m
            weight = load_f32x8(w + 32 * i)
            q = nearest(v * scale)
            wq = weight * q
            rest = v - d * q
            q1 = q1 + wq
            qq = qq + wq * q
            qx = qx + wq * v
            wx = wx + weight * v
            lost = lost + weight * rest * rest
        return q1, qq, qx, wx, lost

    return add_up


def fit_scale(grid, n, trials, in_f16):
    """Return fit(x, w): d f32 per lane, for x ~ d * q; `in_f16`: as f16 holds it."""
    add_up = sums_and_loss(grid, n)
    low, high = np.float32(grid.low), np.float32(grid.high)
    first, step = np.float32(trials.first), np.float32(trials.step)
    count, rounds = trials.n_trials, trials.rounds

    @inline
    def fit(x, w):
        best = zero_f32x8()
        least = splat_f32(np.float32(3e38))
        top = peak(x, n)
        for i in range(2 * count):
            beyond = first + step * np.float32(i // 2)
            end = low - beyond if i % 2 == 0 else high + beyond
            d = top * splat_f32(np.float32(1.0) / end)
            for _round in range(rounds):
                if in_f16:
                    d = as_f16(within_f16(d))
                _, qq, qx, _, lost = add_up(x, w, d, zero_f32x8())
                best = where_greater(least, lost, d, best)
                least = minimum(least, lost)
                d = qx * inverse(qq)
        return best

    return fit


def fit_line(grid, n, trials, in_f16):
    """Return fit(x, w): d and m f32 per lane, for x ~ d * q + m; `in_f16`: as f16 holds them.

    In super-blocks, where they are not f16 themselves, m may not exceed 0.
    """
    add_up = sums_and_loss(grid, n)
    high_q = np.float32(grid.high)
    first, step = np.float32(trials.first), np.float32(trials.step)
    count, rounds = trials.n_trials, trials.rounds

    @inline
    def solve(ww, q1, qq, qx, wx, m):
        """Least squares of x - m over q: d, and the new m."""
        determinant = ww * qq - q1 * q1
        # Where all q are (nearly) alike there is no line but a constant, or one through 0.
        flat = splat_f32(np.float32(1e-6)) * ww * qq
        if in_f16:
            other = wx * inverse(ww)
        else:
            other = zero_f32x8() - m
        more = (qq * wx - q1 * qx) * inverse(determinant)
        new_m = m + where_greater(determinant, flat, more, other)
        if in_f16:
            new_m = as_f16(within_f16(new_m))
        else:
            new_m = minimum(new_m, zero_f32x8())
        return (qx - (new_m - m) * q1) * inverse(qq), new_m

    @inline
    def fit(x, w):
        low = load_f32x8(x)
        high = load_f32x8(x)
        ww = load_f32x8(w)
        for i in range(1, n):
            v = load_f32x8(x + 32 * i)
            low = minimum(low, v)
            high = maximum(high, v)
            ww = ww + load_f32x8(w + 32 * i)
        if in_f16:
            low = as_f16(within_f16(low))
        else:
            low = minimum(low, zero_f32x8())
        best = zero_f32x8()
        best_m = low
        least = splat_f32(np.float32(3e38))
        for i in range(count):
            reach = high_q + (first + step * np.float32(i))
            d = (high - low) * splat_f32(np.float32(1.0) / reach)
            m = low
            for _round in range(rounds):
                if in_f16:
                    d = as_f16(within_f16(d))
                q1, qq, qx, wx, lost = add_up(x, w, d, m)
                best = where_greater(least, lost, d, best)
                best_m = where_greater(least, lost, m, best_m)
                least = minimum(least, lost)
                d, m = solve(ww, q1, qq, qx, wx, m)
        return best, best_m

    return fit
