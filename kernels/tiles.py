"""Tiles: rows x columns of sums in registers, a column being 8 floats wide.

A tile passes between kernel functions as one value; its operations are made for a shape, so that all
products over keys, values and weights in floats read alike: a loop of `add(tile, load(b), a, stride)`.
Sixteen registers hold 12 sums and what is being multiplied, if the tile has at most two columns: LLVM
loads all columns of a row before it uses them.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from . import vectors
from .emit import f32, i8, i16, i64, load, splat_value, store, vector
from .vectors import Vec, operation

_tiles = {n: Vec(f"Tile{n}", ir.ArrayType(vector(f32, 8), n)) for n in range(1, 13)}


def _as_tile(builder, values):
    tile = ir.Constant(ir.ArrayType(vector(f32, 8), len(values)), ir.Undefined)
    for i, value in enumerate(values):
        tile = builder.insert_value(tile, value, i)
    return tile


def _values(builder, tile):
    return [builder.extract_value(tile, i) for i in range(tile.type.count)]


_KINDS = {
    "f32": (4, lambda b, a: load(b, a, vector(f32, 8))),
    "f16": (2, lambda b, a: vectors.lowering.f16_to_f32(b, load(b, a, vector(i16, 8)))),
    "i8": (1, lambda b, a: b.sitofp(load(b, a, vector(i8, 8)), vector(f32, 8))),
}


def tile_load(kind, columns):
    """Return load(address): neighbouring elements of a kind, as one row."""
    nbytes, load = _KINDS[kind]

    def emit(builder, address):
        at = [builder.add(address, i64(8 * nbytes * c)) for c in range(columns)]
        return _as_tile(builder, [load(builder, a) for a in at])

    return operation(_tiles[columns], emit)


def tile_operations(rows, columns):
    """Return zero(), add(tile, row, at, stride), add_scaled(tile, other, row), store(to, stride, tile).

    `add` adds the products of a row with the floats at `at`, `at + stride` ..., one for each row of
    the tile; `add_scaled` adds another tile, every row of it multiplied with a row.
    """
    tile_type = _tiles[rows * columns]

    def add(builder, tile, row, at, stride):
        sums, row = _values(builder, tile), _values(builder, row)
        for r in range(rows):
            y = splat_value(builder, load(builder, at, f32), 8)
            for c in range(columns):
                i = r * columns + c
                sums[i] = vectors.lowering.fma(builder, row[c], y, sums[i])
            at = builder.add(at, stride)
        return _as_tile(builder, sums)

    def add_scaled(builder, tile, other, row):
        row = _values(builder, row)
        pairs = zip(_values(builder, other), _values(builder, tile), strict=True)
        sums = [
            vectors.lowering.fma(builder, v, row[i % columns], s) for i, (v, s) in enumerate(pairs)
        ]
        return _as_tile(builder, sums)

    def store_rows(builder, to, stride, tile):
        for i, value in enumerate(_values(builder, tile)):
            store(builder, builder.add(to, i64(i % columns * 32)), value)
            if i % columns == columns - 1:
                to = builder.add(to, stride)

    zero = operation(tile_type, lambda b: ir.Constant(tile_type.ir_type, None))
    return (
        zero,
        operation(tile_type, add),
        operation(tile_type, add_scaled),
        operation(types.void, store_rows),
    )
