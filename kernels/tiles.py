"""Tiles: rows x columns of sums in registers, a column being 8 floats wide.

A tile passes between kernel functions as one value; its operations are made for a shape, so that all
products over keys, values and weights read alike: a loop of `add(tile, load(b), rows, offset)`.
Sixteen registers hold 12 sums and what is being multiplied, if the tile has at most two columns: LLVM
loads all columns of a row before it uses them.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from . import vectors
from .emit import f32, i8, i16, i32, i64, load, pointer, splat_value, store_value, vector
from .vectors import Vec, operation

_tiles = {n: Vec(f"Tile{n}", ir.ArrayType(vector(f32, 8), n)) for n in range(1, 13)}
_int_tiles = {n: Vec(f"IntTile{n}", ir.ArrayType(vector(i32, 8), n)) for n in range(1, 13)}
_word_rows = {n: Vec(f"WordRow{n}", ir.ArrayType(vector(i16, 16), n)) for n in range(1, 3)}
_rows = {n: Vec(f"Rows{n}", ir.ArrayType(i8.as_pointer(), n)) for n in range(1, 13)}


def _as_tile(builder, values):
    tile = ir.Constant(ir.ArrayType(values[0].type, len(values)), ir.Undefined)
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


def tile_rows(rows):
    """Return rows(at, stride): where the rows of a tile begin, to be made before the loop that adds.

    LLVM may not know how they follow from each other: it would make each from the one before, in every
    round, where a register for each costs nothing.
    """

    def emit(builder, at, stride):
        starts = [pointer(builder, at, i8)]
        for _ in range(1, rows):
            starts.append(builder.gep(starts[-1], [stride]))
        nothing = ir.InlineAsm(ir.FunctionType(starts[0].type, [starts[0].type]), "", "=r,0")
        return _as_tile(builder, [builder.call(nothing, [start]) for start in starts])

    return operation(_rows[rows], emit)


def _load_at(builder, row, offset, ir_type):
    at = builder.bitcast(builder.gep(row, [offset]), ir_type.as_pointer())
    return builder.load(at, align=1)


def _add_products(multiply_add, element):
    """Return add(tile, row, rows, offset) for one kind of elements."""

    def add(builder, tile, row, rows, offset):
        sums, row = _values(builder, tile), _values(builder, row)
        for r, at in enumerate(_values(builder, rows)):
            y = splat_value(builder, _load_at(builder, at, offset, element), 8)
            for c, w in enumerate(row):
                i = r * len(row) + c
                sums[i] = multiply_add(builder, w, y, sums[i])
        return _as_tile(builder, sums)

    return add


def tile_operations(rows, columns):
    """Return zero(), add(tile, row, rows, offset), add_scaled(tile, other, row), store(to, stride, tile).

    `add` adds the products of a row with the floats that lie `offset` bytes into `rows`, one for each
    row of the tile; `add_scaled` adds another tile, every row of it multiplied with a row.
    """
    tile_type = _tiles[rows * columns]
    add = _add_products(lambda b, w, y, acc: vectors.lowering.fma(b, w, y, acc), f32)

    def add_scaled(builder, tile, other, row):
        row = _values(builder, row)
        pairs = zip(_values(builder, other), _values(builder, tile), strict=True)
        sums = [
            vectors.lowering.fma(builder, v, row[i % columns], s) for i, (v, s) in enumerate(pairs)
        ]
        return _as_tile(builder, sums)

    def store_rows(builder, to, stride, tile):
        for i, value in enumerate(_values(builder, tile)):
            store_value(builder, builder.add(to, i64(i % columns * 32)), value)
            if i % columns == columns - 1:
                to = builder.add(to, stride)

    zero = operation(tile_type, lambda b: ir.Constant(tile_type.ir_type, None))
    return (
        zero,
        operation(tile_type, add),
        operation(tile_type, add_scaled),
        operation(types.void, store_rows),
    )


def word_tile_operations(rows, columns):
    """Return load(address), zero(), add(tile, row, rows, offset), add_floats(sums, tile, scales, rows).

    The tile's sums are integers; `add` is as above, with pairs of words for floats.  `add_floats` adds
    such a tile to one of floats: each sum times its column's scale and the float where its row begins.
    """
    tile_type = _int_tiles[rows * columns]

    def load_row(builder, address):
        at = [builder.add(address, i64(32 * c)) for c in range(columns)]
        return _as_tile(builder, [load(builder, a, vector(i16, 16)) for a in at])

    def multiply_add(builder, w, y, acc):
        return vectors.lowering.words_add(builder, acc, w, builder.bitcast(y, vector(i16, 16)))

    def add_floats(builder, sums, tile, scales, rows):
        sums, tile, scales = (_values(builder, v) for v in (sums, tile, scales))
        for r, at in enumerate(_values(builder, rows)):
            y = splat_value(builder, _load_at(builder, at, i64(0), f32), 8)
            for c, scale in enumerate(scales):
                i = r * columns + c
                value = builder.sitofp(tile[i], vector(f32, 8))
                sums[i] = vectors.lowering.fma(builder, value, builder.fmul(scale, y), sums[i])
        return _as_tile(builder, sums)

    return (
        operation(_word_rows[columns], load_row),
        operation(tile_type, lambda b: ir.Constant(tile_type.ir_type, None)),
        operation(tile_type, _add_products(multiply_add, i32)),
        operation(_tiles[rows * columns], add_floats),
    )


def byte_tile_operations(tokens, bits, stride):
    """Return add(tile, w, y), add_centred(tile, w, y, c), add_offset(tile, m, y): 8 rows, a column per token.

    `add` adds the products of 16 columns: at `w` four byte vectors of codes below 2**bits, and the f32 d
    of 8 rows; at `y`, and `stride` bytes on for each further token, its bytes as `spread16` writes them,
    and its scale in 8 lanes.  `add_centred` takes off what `centre16` wrote at `c`.  `add_offset` adds
    the 8 floats at `m` times those at `y`.
    """

    def at(builder, address, nbytes, ir_type):
        return load(builder, builder.add(address, i64(nbytes)), ir_type)

    def add(builder, tile, w, y):
        return add_centred(builder, tile, w, y, None)

    def add_centred(builder, tile, w, y, c):
        codes = [at(builder, w, 32 * k, vector(i8, 32)) for k in range(4)]
        d = at(builder, w, 128, vector(f32, 8))
        sums = _values(builder, tile)
        for t in range(tokens):
            columns = vectors.lowering.spread_columns(builder, builder.add(y, i64(t * stride)))
            if c is None:
                total = vectors.lowering.dot16(builder, codes, columns, bits)
            else:
                centre = builder.add(c, i64(t * stride))
                total = vectors.lowering.centred16(builder, codes, columns, centre, bits)
            scale = builder.fmul(d, at(builder, y, t * stride + 128, vector(f32, 8)))
            value = builder.sitofp(total, vector(f32, 8))
            sums[t] = vectors.lowering.fma(builder, value, scale, sums[t])
        return _as_tile(builder, sums)

    def add_offset(builder, tile, m, y):
        m = load(builder, m, vector(f32, 8))
        sums = _values(builder, tile)
        for t in range(tokens):
            ys = at(builder, y, t * stride, vector(f32, 8))
            sums[t] = vectors.lowering.fma(builder, m, ys, sums[t])
        return _as_tile(builder, sums)

    return tuple(operation(_tiles[tokens], emit) for emit in (add, add_centred, add_offset))
