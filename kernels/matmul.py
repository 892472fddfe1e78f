"""Matrix products: out = W @ x for one token or many, from packed weights of any format.

A row of the result is the same to the last bit whatever T is, because both paths run the same chain,
with lanes = rows and blocks in order:

    i8    acc = fma(f32(sum of q*y over 16 columns), d*yd, acc), twice; acc = fma(m, ys, acc)
          with a centre instead of m: sum of (q - centre)*y
    i16   acc = fma(f32(sum of q*y over 32 columns), d*yd, acc)
    f32   acc = fma(w, y, acc), column by column

Few tokens stream the packed weights.  More tokens first unpack strips of 32 rows into the thread's
scratch (the panel), and run a register tile over them; unpacking costs 1/T of the work, so any format gets
the same fast tile.  The forms of activations are those of `quantize.py`; each has a file here.
"""

from __future__ import annotations

import numpy as np

from . import project_f32, project_i8, project_i16
from .blocks import FORMATS, STRIP
from .layout import STEP_IDS
from .simd import *
from .simd import inline

_FORMS = {"i8": project_i8, "i16": project_i16, "f32": project_f32}


def project(format_name):
    """Return the operation `project[format]`: rows of `out` += or = W @ x (+ bias) for all tokens."""
    form = _FORMS[FORMATS[format_name].activation]
    stream, batch = form.strip_functions(format_name)
    if form is not project_i8:
        batch = _strip_by_strip(batch)
    group_nbytes = FORMATS[format_name].group_nbytes(256)
    tile = form.TILE

    def operation(
        step, part, first, count, scratch,
        out, out_stride, x, x_stride, w, bias, n_blocks, n_strips, per_part, residual,
    ):  # fmt: skip
        group = n_blocks * (group_nbytes // 8)
        first_strip = part * per_part
        last_strip = min(n_strips, first_strip + per_part)
        to = out + first * out_stride
        y = x + first * x_stride
        if count < tile:
            for strip in range(first_strip, last_strip):
                packed = w + strip * 4 * group
                row = strip * STRIP
                for t in range(count):
                    stream(
                        to + t * out_stride + row * 4, y + t * x_stride, packed, group, n_blocks,
                        residual, bias, row,
                    )  # fmt: skip
        else:
            batch(
                to, out_stride, y, x_stride, count, w, group, n_blocks, scratch, residual, bias,
                first_strip, last_strip,
            )  # fmt: skip

    return operation


def _strip_by_strip(batch_strip):
    @inline
    def batch(
        out, out_stride, y, y_stride, count, w, group, n_blocks, scratch, residual, bias,
        first_strip, last_strip,
    ):  # fmt: skip
        for strip in range(first_strip, last_strip):
            row = strip * STRIP
            batch_strip(
                out + row * 4, out_stride, y, y_stride, count, w + strip * 4 * group, group,
                n_blocks, scratch, residual, bias, row,
            )  # fmt: skip

    return batch


def embed(format_name):
    """Return the operation `embed[format]`: the float row of each token id, times `factor`."""
    columns = _FORMS[FORMATS[format_name].activation].row_function(format_name)
    group_nbytes = FORMATS[format_name].group_nbytes(256)

    def operation(step, part, first, count, scratch, out, out_stride, w, n_blocks, factor: float):
        ids = load_i64(step + STEP_IDS)
        for t in range(first, first + count):
            token = load_i32(ids + 4 * t)
            base = w + (token // 8) * n_blocks * (group_nbytes // 8)
            to = out + t * out_stride
            for block in range(n_blocks):
                columns(base, block, token % 8, to + block * 128, scratch)
            if factor != np.float32(1.0):
                for block in range(n_blocks * 4):
                    at = to + block * 32
                    store_f32x8(at, load_f32x8(at) * splat_f32(factor))

    return operation
