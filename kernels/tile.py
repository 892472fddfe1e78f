"""256 weights at a time: what the encoders of all formats have in common.

A tile is eight blocks of 32 weights, or one of 256.  It is laid out so that lanes are blocks (of 32) or
sub-blocks (of 32 or 16): element i of blocks 8 g ... 8 g + 7 lies at X + 32 (g n + i).
"""

from __future__ import annotations

import numpy as np

from .lanes import *
from .simd import *
from .simd import inline

TILE = 256
X, W, CODES, NUMBERS, PADDED, BLOCKS = 0, 1024, 2048, 2304, 3072, 4096  # places in scratch


@inline
def is_finite_tile(x):
    """1 when all 256 f32 are numbers."""
    total = zero_f32x8()
    for i in range(0, 4 * TILE, 32):
        total = total + load_f32x8(x + i) * zero_f32x8()
    return 1 if sum_lanes(total) == np.float32(0) else 0


@inline
def largest_of_tile(x):
    largest = zero_f32x8()
    for i in range(0, 4 * TILE, 32):
        largest = maximum(absolute(load_f32x8(x + i)), largest)
    return max_lanes(largest)


@inline
def side_by_side(to, x, n):
    """Bring f32 (256,) into lanes, `n` to a block."""
    for group in range(0, TILE, 8 * n):
        for i in range(n):
            at = x + 4 * (group + i)
            store_f32x8(to + 4 * group + 32 * i, gather_f32x8(at, 4 * n))


@inline
def load_importance(scratch, weights, n):
    """Importance side by side, or ones."""
    if weights != 0:
        side_by_side(scratch + W, weights, n)
        return
    for i in range(0, 4 * TILE, 32):
        store_f32x8(scratch + W + i, splat_f32(np.float32(1.0)))


@inline
def load_weights(scratch, weights, n):
    """Importance side by side; without it a weight counts by its size, as |x| + the mean of its block.

    That loses slightly more than counting all alike would, and moves a model less: mean KL on
    SmolLM2-135M is 0.168 instead of 0.201 (iq4_nl), 0.204 instead of 0.229 (q3_k), 0.083 instead of
    0.085 (q5_0).  Beside importance it does not help (q5_0: 0.050 instead of 0.045).
    """
    if weights != 0:
        side_by_side(scratch + W, weights, n)
        return
    for group in range(0, 4 * TILE, 32 * n):
        total = zero_f32x8()
        for i in range(group, group + 32 * n, 32):
            total = total + absolute(load_f32x8(scratch + X + i))
        mean = total * splat_f32(np.float32(1 / n))
        for i in range(group, group + 32 * n, 32):
            store_f32x8(scratch + W + i, mean + absolute(load_f32x8(scratch + X + i)))


def put_lanes(grid, n):
    """Return write(codes, x, scale, m): the codes of (x - m) * scale for eight blocks side by side."""
    code = grid.code

    @inline
    def write(codes, x, scale, m):
        for i in range(0, n, 4):
            word = code((load_f32x8(x + 32 * i) - m) * scale)
            word = word + code((load_f32x8(x + 32 * i + 32) - m) * scale) * splat_i32(1 << 8)
            word = word + code((load_f32x8(x + 32 * i + 64) - m) * scale) * splat_i32(1 << 16)
            word = word + code((load_f32x8(x + 32 * i + 96) - m) * scale) * splat_i32(1 << 24)
            scatter_i32x8(codes + i, n, word)

    return write


def over_tiles(encode, n_weights_block, block_nbytes, largest):
    """Return the operation that encodes `n_weights` f32 at `x`, in parts of `per_part` tiles.

    `encode(to, x, weights, scratch)` does one tile of numbers up to `largest`.
    `importance` f32 (n_cols + 256,) repeats itself past the end of a row; 0: there is none.
    `failures` i64 (2,) counts tiles that hold a NaN or an infinity, and tiles with too large numbers.
    """
    tile_nbytes = TILE // n_weights_block * block_nbytes
    limit = np.float32(largest)

    def operation(
        step, part, first, count, scratch,
        out, x, n_weights, importance, n_cols, per_part, failures,
    ):  # fmt: skip
        begin = part * per_part
        end = min(begin + per_part, (n_weights + TILE - 1) // TILE)
        n_not_finite = 0
        n_too_large = 0
        for tile in range(begin, end):
            source = x + tile * 4 * TILE
            to = out + tile * tile_nbytes
            n = n_weights - tile * TILE
            if n < TILE:
                for i in range(n):
                    store_i32(scratch + PADDED + 4 * i, load_u32(source + 4 * i))
                for i in range(n, TILE):
                    store_i32(scratch + PADDED + 4 * i, 0)
                source = scratch + PADDED
                to = scratch + BLOCKS
            n_not_finite += 1 - is_finite_tile(source)
            weights = importance
            if importance != 0:
                weights += 4 * (tile * TILE % n_cols)
            n_too_large += 1 if largest_of_tile(source) > limit else 0
            encode(to, source, weights, scratch)
            if n < TILE:
                for i in range(n // n_weights_block * block_nbytes):
                    store_i8(out + tile * tile_nbytes + i, load_u8(to + i))
        if n_not_finite > 0:
            atomic_add(failures, n_not_finite)
        if n_too_large > 0:
            atomic_add(failures + 8, n_too_large)

    return operation
