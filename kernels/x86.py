"""Lowerings for x86-64: AVX2 with FMA and F16C, and AVX-512 VNNI on 256-bit registers."""

from __future__ import annotations

from llvmlite import ir

from .emit import call, f32, i8, i16, i32, splat, vector
from .generic import Generic


class AVX2(Generic):
    """vpmaddubsw keeps `pairs` in i16, so the caller bounds how many may be added (see `integers.py`)."""

    pairs_type = vector(i16, 16)

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
    def fma(builder, a, b, c):
        return call(builder, "llvm.fma.v8f32", vector(f32, 8), a, b, c)

    @staticmethod
    def f16_to_f32(builder, bits):
        return builder.fpext(builder.bitcast(bits, vector(ir.HalfType(), 8)), vector(f32, 8))

    @staticmethod
    def f32_to_f16(builder, value):
        return builder.bitcast(builder.fptrunc(value, vector(ir.HalfType(), 8)), vector(i16, 8))

    @staticmethod
    def table16(builder, table, index):
        return call(builder, "llvm.x86.ssse3.pshuf.b.128", vector(i8, 16), table, index)

    @staticmethod
    def pause(builder):
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())


class AVX512VNNI(AVX2):
    """vpdpbusd sums four products into i32 at once: no i16 in between, half the instructions."""

    pairs_type = vector(i32, 8)

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
