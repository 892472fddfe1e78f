"""Lowerings for x86-64: AVX2 with FMA and F16C, and VNNI, as AVX-VNNI or AVX-512, on 256-bit registers."""

from __future__ import annotations

from llvmlite import ir

from .emit import call, i8, i16, i32, splat, vector
from .generic import Native


class AVX2(Native):
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
    def words_add(builder, acc, w, y):
        return builder.add(acc, call(builder, "llvm.x86.avx2.pmadd.wd", vector(i32, 8), w, y))

    @staticmethod
    def table16(builder, table, index):
        return call(builder, "llvm.x86.ssse3.pshuf.b.128", vector(i8, 16), table, index)

    @staticmethod
    def pause(builder):
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())


class VNNI(AVX2):
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
