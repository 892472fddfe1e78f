"""Lowerings for x86-64: AVX2 with FMA and F16C, and VNNI, as AVX-VNNI or AVX-512, on 256-bit registers."""

from __future__ import annotations

from llvmlite import ir

from .emit import call, i8, i16, i32, load, shuffle, splat, store_value, vector
from .generic import Native


class X86(Native):
    """What all tiers of x86-64 from v3 on share."""

    @staticmethod
    def table16(builder, table, index):
        return call(builder, "llvm.x86.ssse3.pshuf.b.128", vector(i8, 16), table, index)

    @staticmethod
    def pause(builder):
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())


class AVX2(X86):
    """vpmaddubsw keeps `pairs` in i16, so the caller bounds how many may be added (see `integers.py`)."""

    pairs_type = vector(i16, 16)
    four_hold_bits = 5

    @staticmethod
    def pairs_add(builder, acc, w, y):
        product = call(builder, "llvm.x86.avx2.pmadd.ub.sw", vector(i16, 16), w, y)
        return builder.add(acc, product)

    @staticmethod
    def pairs_sum(builder, acc):
        return call(builder, "llvm.x86.avx2.pmadd.wd", vector(i32, 8), acc, splat(i16, 16, 1))

    @staticmethod
    def centre16(builder, to, address, total, centre):
        """A lane of `pairs` has the columns 4k, 4k+1, the next one 4k+2, 4k+3."""
        words, y = vector(i16, 8), load(builder, address, vector(i8, 16))
        name = "llvm.x86.ssse3.pmadd.ub.sw.128"
        sums = call(builder, name, words, splat(i8, 16, centre), y)
        for lanes in (4, 2):  # the columns that are alike modulo 8, then modulo 4
            sums = builder.add(sums, shuffle(builder, sums, [(k + lanes) % 8 for k in range(8)]))
        store_value(builder, to, shuffle(builder, sums, [0, 1] * 8))

    @classmethod
    def centred16(cls, builder, weights, activations, address, bits):
        """Four products may wrap around in i16 on the way: less the centre a lane's sum fits again.

        8 columns * 32 * 127 = 32512 where |q - centre| <= 32, and a product of two columns that nothing
        was added to (63 * 127 * 2 = 16002) does not saturate.
        """
        acc = builder.neg(load(builder, address, cls.pairs_type))
        for w, y in zip(weights, activations, strict=True):
            acc = cls.pairs_add(builder, acc, w, y)
        return cls.pairs_sum(builder, acc)

    @staticmethod
    def words_add(builder, acc, w, y):
        return builder.add(acc, call(builder, "llvm.x86.avx2.pmadd.wd", vector(i32, 8), w, y))


class VNNI(X86):
    """vpdpbusd sums four products into i32 at once: no i16 in between, half the instructions.

    LLVM names one intrinsic for both encodings; the tier's features choose between them.
    """

    pairs_type = vector(i32, 8)
    four_hold_bits = 7

    @staticmethod
    def pairs_add(builder, acc, w, y):
        # LLVM 22 declares byte vectors here and upgrades the older i32 form when it parses text.
        w, y = (builder.bitcast(v, vector(i32, 8)) for v in (w, y))
        return call(builder, "llvm.x86.avx512.vpdpbusd.256", vector(i32, 8), acc, w, y)

    @staticmethod
    def pairs_sum(builder, acc):
        return acc

    @staticmethod
    def words_add(builder, acc, w, y):
        w, y = (builder.bitcast(v, vector(i32, 8)) for v in (w, y))
        return call(builder, "llvm.x86.avx512.vpdpwssd.256", vector(i32, 8), acc, w, y)
