"""Lowering that runs anywhere LLVM does: the operations of `simd.py` whose best form depends on the CPU.

Each function takes an IR builder and values and returns a value.  Other tiers override what they do
better (`x86.py`, `arm.py`).  Nothing here may become a call to a C library: objects have no external symbols.
"""

from __future__ import annotations

from llvmlite import ir

from .emit import (
    broadcast4,
    call,
    f16,
    f32,
    i8,
    i16,
    i32,
    i64,
    load,
    shuffle,
    splat,
    splat_value,
    store_value,
    vector,
)


class Generic:
    """Plain IR. Sums of products accumulate in i32 (`pairs` is <8 x i32>)."""

    pairs_type = vector(i32, 8)
    four_hold_bits = 7
    """Codes of so many bits may be added to `pairs` four times."""

    @staticmethod
    def pairs_add(builder, acc, w, y):
        """acc + products of u8 and i8, four neighbours summed into each i32 lane."""
        wide = vector(i32, 32)
        product = builder.mul(builder.zext(w, wide), builder.sext(y, wide))
        for lanes in (16, 8):
            halves = [shuffle(builder, product, list(range(k, 2 * lanes, 2))) for k in (0, 1)]
            product = builder.add(*halves)
        return builder.add(acc, product)

    @staticmethod
    def pairs_sum(builder, acc):
        return acc

    @staticmethod
    def columns4(builder, address):
        """16 bytes of activations, four for all rows at a time."""
        return [broadcast4(builder, builder.add(address, i64(4 * i))) for i in range(4)]

    @classmethod
    def spread16(cls, builder, to, address):
        """Write 16 bytes of activations so that `spread_columns` reads what `columns4` would."""
        for i, columns in enumerate(cls.columns4(builder, address)):
            store_value(builder, builder.add(to, i64(32 * i)), columns)

    @staticmethod
    def spread_columns(builder, address):
        """What `spread16` wrote: operands in memory, where broadcasts would take a load each."""
        return [load(builder, builder.add(address, i64(32 * i)), vector(i8, 32)) for i in range(4)]

    @classmethod
    def dot16(cls, builder, weights, activations, bits):
        """Four byte vectors times those of 16 columns of activations: for 8 rows the sum."""
        at_once = 4 if bits <= cls.four_hold_bits else 2
        sums = []
        for i in range(0, 4, at_once):
            acc = ir.Constant(cls.pairs_type, None)
            for w, y in list(zip(weights, activations, strict=True))[i : i + at_once]:
                acc = cls.pairs_add(builder, acc, w, y)
            sums.append(cls.pairs_sum(builder, acc))
        return sums[0] if at_once == 4 else builder.add(*sums)

    @staticmethod
    def centre16(builder, to, address, total, centre):
        """Write what `centred16` subtracts: `centre` times the `total` of the 16 bytes at an address."""
        product = builder.mul(builder.trunc(total, i32), i32(centre))
        store_value(builder, to, splat_value(builder, product, 8))

    @classmethod
    def centred16(cls, builder, weights, activations, address, bits):
        """As `dot16`, less what `centre16` wrote at an address."""
        total = cls.dot16(builder, weights, activations, bits)
        return builder.sub(total, load(builder, address, vector(i32, 8)))

    @staticmethod
    def words_add(builder, acc, w, y):
        """acc + products of i16 and i16, two neighbours summed into each i32 lane."""
        wide = vector(i32, 16)
        product = builder.mul(builder.sext(w, wide), builder.sext(y, wide))
        even, odd = (shuffle(builder, product, list(range(k, 16, 2))) for k in (0, 1))
        return builder.add(acc, builder.add(even, odd))

    @staticmethod
    def fma(builder, a, b, c):
        return builder.fadd(builder.fmul(a, b), c)

    @staticmethod
    def f16_to_f32(builder, bits):
        """<8 x i16> bits of f16 to f32, without an instruction or a library call for it."""
        wide = builder.zext(bits, vector(i32, 8))
        sign = builder.shl(builder.and_(wide, splat(i32, 8, 0x8000)), splat(i32, 8, 16))
        magnitude = builder.shl(builder.and_(wide, splat(i32, 8, 0x7FFF)), splat(i32, 8, 13))
        scaled = builder.fmul(builder.bitcast(magnitude, vector(f32, 8)), splat(f32, 8, 2.0**112))
        exponent_full = builder.icmp_unsigned(">=", magnitude, splat(i32, 8, 0x1F << 23))
        infinite = builder.or_(magnitude, splat(i32, 8, 0x7F800000))
        value = builder.select(exponent_full, infinite, builder.bitcast(scaled, vector(i32, 8)))
        return builder.bitcast(builder.or_(value, sign), vector(f32, 8))

    @staticmethod
    def f32_to_f16(builder, value):
        """<8 x f32> in the range of f16 to bits of f16, rounded to nearest even."""
        bits = builder.bitcast(value, vector(i32, 8))
        sign = builder.and_(builder.lshr(bits, splat(i32, 8, 16)), splat(i32, 8, 0x8000))
        magnitude = builder.and_(bits, splat(i32, 8, 0x7FFFFFFF))
        odd = builder.and_(builder.lshr(magnitude, splat(i32, 8, 13)), splat(i32, 8, 1))
        rounded = builder.add(builder.add(magnitude, odd), splat(i32, 8, 0xFFF - (112 << 23)))
        normal = builder.lshr(rounded, splat(i32, 8, 13))
        # Below 2^-14 the sum with 0.5 leaves the subnormal's bits, rounded, at the end.
        half = builder.fadd(builder.bitcast(magnitude, vector(f32, 8)), splat(f32, 8, 0.5))
        small = builder.sub(builder.bitcast(half, vector(i32, 8)), splat(i32, 8, 0x3F000000))
        tiny = builder.icmp_unsigned("<", magnitude, splat(i32, 8, 113 << 23))
        result = builder.or_(builder.select(tiny, small, normal), sign)
        return builder.trunc(result, vector(i16, 8))

    @staticmethod
    def table16(builder, table, index):
        """Look up <16 x i8> indices 0..15 in a <16 x i8> table."""
        result = ir.Constant(vector(i8, 16), ir.Undefined)
        for lane in range(16):
            at = builder.extract_element(index, i32(lane))
            result = builder.insert_element(
                result, builder.extract_element(table, builder.zext(at, i32)), i32(lane)
            )
        return result

    @staticmethod
    def pause(builder):
        builder.fence("seq_cst")


class Native(Generic):
    """For CPUs that fuse multiplication and addition, and convert f16."""

    @staticmethod
    def fma(builder, a, b, c):
        return call(builder, "llvm.fma.v8f32", vector(f32, 8), a, b, c)

    @staticmethod
    def f16_to_f32(builder, bits):
        return builder.fpext(builder.bitcast(bits, vector(f16, 8)), vector(f32, 8))

    @staticmethod
    def f32_to_f16(builder, value):
        return builder.bitcast(builder.fptrunc(value, vector(f16, 8)), vector(i16, 8))
