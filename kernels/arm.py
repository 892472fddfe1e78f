"""Lowerings for arm64: NEON, and its dot product.  Codes are below 128, so they count as signed bytes.

An <8 x i32> lies in two registers here, and 32 bytes in two.

Source: Arm Architecture Reference Manual, A64: SMLAL, SADDLP, ADDP, SDOT (by element), TBL.
"""

from __future__ import annotations

from llvmlite import ir

from .emit import call, concatenate, i8, i16, i32, load, shuffle, store_value, vector
from .generic import Native


def _parts(builder, value, n):
    """`value` cut into n vectors."""
    size = value.type.count // n
    return [shuffle(builder, value, list(range(i * size, (i + 1) * size))) for i in range(n)]


class NEON(Native):
    """`pairs` keeps every product's column apart in i16, one product a call: 16-bit sums hold twice as
    many calls as AVX2's.
    """

    pairs_type = vector(i16, 32)
    four_hold_bits = 6

    @staticmethod
    def pairs_add(builder, acc, w, y):
        wide = vector(i16, 32)
        return builder.add(acc, builder.mul(builder.sext(w, wide), builder.sext(y, wide)))

    @staticmethod
    def pairs_sum(builder, acc):
        two = [
            call(builder, "llvm.aarch64.neon.saddlp.v4i32.v8i16", vector(i32, 4), part)
            for part in _parts(builder, acc, 4)
        ]
        rows = [
            call(builder, "llvm.aarch64.neon.addp.v4i32", vector(i32, 4), two[i], two[i + 1])
            for i in (0, 2)
        ]
        return concatenate(builder, *rows)

    @staticmethod
    def columns4(builder, address):
        # One load: a lane of it costs no more than a broadcast from memory, and sdot takes lanes itself.
        y = load(builder, address, vector(i32, 4))
        return [builder.bitcast(shuffle(builder, y, [i] * 8), vector(i8, 32)) for i in range(4)]

    @classmethod
    def spread16(cls, builder, to, address):
        store_value(builder, to, load(builder, address, vector(i8, 16)))

    @classmethod
    def spread_columns(cls, builder, address):
        return cls.columns4(builder, address)

    @staticmethod
    def words_add(builder, acc, w, y):
        # Columns apart, so that a product's lane is its row: the weights' half of that leaves the loops.
        wide = vector(i32, 8)
        for column in (0, 1):
            rows = shuffle(builder, w, list(range(column, 16, 2)))
            factor = shuffle(builder, y, [column] * 8)
            product = builder.mul(builder.sext(rows, wide), builder.sext(factor, wide))
            acc = builder.add(acc, product)
        return acc

    @staticmethod
    def table16(builder, table, index):
        return call(builder, "llvm.aarch64.neon.tbl1.v16i8", vector(i8, 16), table, index)

    @staticmethod
    def pause(builder):
        # YIELD does nothing on most cores; ISB waits for some ten cycles.
        call(builder, "llvm.aarch64.isb", ir.VoidType(), i32(15))


class DotProd(NEON):
    """sdot sums four products into i32; by element, one load of activations serves four of them."""

    pairs_type = vector(i32, 8)
    four_hold_bits = 7

    @staticmethod
    def pairs_add(builder, acc, w, y):
        sums = [
            call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", vector(i32, 4), *operands)
            for operands in zip(*(_parts(builder, v, 2) for v in (acc, w, y)), strict=True)
        ]
        return concatenate(builder, *sums)

    @staticmethod
    def pairs_sum(builder, acc):
        return acc
