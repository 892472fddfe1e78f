"""What this machine can do at most: the loops that the other kernels are measured against.

Nothing is computed that anyone wants; the sums are stored so that the work is not optimised away.
Who runs them and makes rates of their times: `edgellama/runtime/ceiling.py`.
"""

from __future__ import annotations

import numpy as np

from .simd import *
from .simd import inline

_PREFETCH_AHEAD = 3072


def read_memory(step, part, first, count, scratch, data, nbytes, sums):
    """Sum the `nbytes` (a multiple of 256) of a part; eight chains, so that loads never wait."""
    base = data + part * nbytes
    a = b = c = d = e = f = g = h = splat_i32(0)
    for i in range(0, nbytes, 256):
        at = base + i
        ahead = at + _PREFETCH_AHEAD
        prefetch(ahead)
        prefetch(ahead + 64)
        prefetch(ahead + 128)
        prefetch(ahead + 192)
        a = a + load_i32x8(at)
        b = b + load_i32x8(at + 32)
        c = c + load_i32x8(at + 64)
        d = d + load_i32x8(at + 96)
        e = e + load_i32x8(at + 128)
        f = f + load_i32x8(at + 160)
        g = g + load_i32x8(at + 192)
        h = h + load_i32x8(at + 224)
    total = ((a + b) + (c + d)) + ((e + f) + (g + h))
    store_i64(sums + part * 8, sum_lanes_i32(total))


def multiply_f32(step, part, first, count, scratch, operands, n_rounds, sums):
    """Twelve chains of fma, with three loads for twelve of them: 32 * 12 * 8 products a round."""
    # Chains that began alike would be alike throughout, and LLVM would keep one of them.
    a0 = splat_f32(np.float32(0.0))
    a1 = splat_f32(np.float32(1.0))
    b0 = splat_f32(np.float32(2.0))
    b1 = splat_f32(np.float32(3.0))
    c0 = splat_f32(np.float32(4.0))
    c1 = splat_f32(np.float32(5.0))
    d0 = splat_f32(np.float32(6.0))
    d1 = splat_f32(np.float32(7.0))
    e0 = splat_f32(np.float32(8.0))
    e1 = splat_f32(np.float32(9.0))
    f0 = splat_f32(np.float32(10.0))
    f1 = splat_f32(np.float32(11.0))
    for _ in range(n_rounds):
        for k in range(0, 2048, 64):
            u = load_f32x8(operands + k)
            v = load_f32x8(operands + k + 32)
            y = broadcast_f32(operands + 4096 + k)
            a0 = fma(u, y, a0)
            a1 = fma(v, y, a1)
            b0 = fma(u, y, b0)
            b1 = fma(v, y, b1)
            c0 = fma(u, y, c0)
            c1 = fma(v, y, c1)
            d0 = fma(u, y, d0)
            d1 = fma(v, y, d1)
            e0 = fma(u, y, e0)
            e1 = fma(v, y, e1)
            f0 = fma(u, y, f0)
            f1 = fma(v, y, f1)
    total = ((a0 + a1) + (b0 + b1)) + ((c0 + c1) + (d0 + d1)) + ((e0 + e1) + (f0 + f1))
    store_f32(sums + part * 8, sum_lanes(total))


def multiply_i16(step, part, first, count, scratch, operands, n_rounds, sums):
    """The same in words: 32 * 12 * 16 products a round.

    Six activations, because LLVM would make equal products of integers only once.
    """
    a0 = splat_i32(0)
    a1 = splat_i32(1)
    b0 = splat_i32(2)
    b1 = splat_i32(3)
    c0 = splat_i32(4)
    c1 = splat_i32(5)
    d0 = splat_i32(6)
    d1 = splat_i32(7)
    e0 = splat_i32(8)
    e1 = splat_i32(9)
    f0 = splat_i32(10)
    f1 = splat_i32(11)
    for _ in range(n_rounds):
        for k in range(0, 2048, 64):
            u = load_words16(operands + k)
            v = load_words16(operands + k + 32)
            y = broadcast_pair(operands + 4096 + 0 + k)
            a0 = words_add(a0, u, y)
            a1 = words_add(a1, v, y)
            y = broadcast_pair(operands + 4096 + 4 + k)
            b0 = words_add(b0, u, y)
            b1 = words_add(b1, v, y)
            y = broadcast_pair(operands + 4096 + 8 + k)
            c0 = words_add(c0, u, y)
            c1 = words_add(c1, v, y)
            y = broadcast_pair(operands + 4096 + 12 + k)
            d0 = words_add(d0, u, y)
            d1 = words_add(d1, v, y)
            y = broadcast_pair(operands + 4096 + 16 + k)
            e0 = words_add(e0, u, y)
            e1 = words_add(e1, v, y)
            y = broadcast_pair(operands + 4096 + 20 + k)
            f0 = words_add(f0, u, y)
            f1 = words_add(f1, v, y)
    total = ((a0 + a1) + (b0 + b1)) + ((c0 + c1) + (d0 + d1)) + ((e0 + e1) + (f0 + f1))
    store_i64(sums + part * 8, sum_lanes_i32(total))


@inline
def _products(s, w, y):
    """64 codes times 4 tokens: 6 loads for 8 products, fewer than the multipliers could use up."""
    u = load_bytes32(w)
    v = load_bytes32(w + 32)
    t = broadcast4(y)
    s0 = pairs_add(s[0], u, t)
    s1 = pairs_add(s[1], v, t)
    t = broadcast4(y + 256)
    s2 = pairs_add(s[2], u, t)
    s3 = pairs_add(s[3], v, t)
    t = broadcast4(y + 512)
    s4 = pairs_add(s[4], u, t)
    s5 = pairs_add(s[5], v, t)
    t = broadcast4(y + 768)
    s6 = pairs_add(s[6], u, t)
    s7 = pairs_add(s[7], v, t)
    return s0, s1, s2, s3, s4, s5, s6, s7


def multiply_i8(step, part, first, count, scratch, operands, n_rounds, sums):
    """Codes up to 15 times bytes, eight to a sum, which is the least that a tier spends on sums.

    8 * 64 * 32 products a round.
    """
    acc = splat_i32(0)
    for _ in range(n_rounds):
        for block in range(8):
            w = operands + block * 512
            y = operands + 4096 + block * 32
            z = pairs_zero()
            s = _products((z, z, z, z, z, z, z, z), w, y)
            s = _products(s, w + 64, y + 4)
            s = _products(s, w + 128, y + 8)
            s = _products(s, w + 192, y + 12)
            s = _products(s, w + 256, y + 16)
            s = _products(s, w + 320, y + 20)
            s = _products(s, w + 384, y + 24)
            s = _products(s, w + 448, y + 28)
            acc = acc + ((pairs_sum(s[0]) + pairs_sum(s[1])) + (pairs_sum(s[2]) + pairs_sum(s[3])))
            acc = acc + ((pairs_sum(s[4]) + pairs_sum(s[5])) + (pairs_sum(s[6]) + pairs_sum(s[7])))
    store_i64(sums + part * 8, sum_lanes_i32(acc))
