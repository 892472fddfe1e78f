"""Block formats: how many weights a block holds, and how many bytes it takes in a file and packed.

Byte maps of the packed form (8 rows side by side) are in `formats.py`, those of the file's in
`repack.py`.  Numbers are GGUF's type ids.  Source: the GGUF specification and ggml-common.h.
"""

from __future__ import annotations

from typing import NamedTuple

STRIP = 32
"""Rows of weights that a matrix kernel takes at once: four groups of 8 rows."""


class BlockFormat(NamedTuple):
    """One way to store weights: `n_weights` of them in `nbytes` bytes."""

    name: str
    type_id: int
    n_weights: int
    nbytes: int
    packed: int = 0  # bytes of 8 rows x a block (x 32 columns for floats)
    activation: str = ""  # the form of activations it is multiplied with: i8, i16 or f32
    float_type: str = ""  # of the values or scales in a block of the file, which lie at the
    float_places: tuple[int, ...] = ()  # bytes

    def row_nbytes(self, n_cols: int) -> int:
        """Bytes of a row of `n_cols` weights; `n_cols` must be a multiple of `n_weights`."""
        return n_cols // self.n_weights * self.nbytes

    def group_nbytes(self, n_cols: int) -> int:
        """Bytes of 8 packed rows; columns of float formats are padded to 32."""
        return -(-n_cols // max(self.n_weights, 32)) * self.packed

    def packed_nbytes(self, n_rows: int, n_cols: int) -> int:
        """Bytes of a packed tensor; rows are padded to a strip."""
        return padded(n_rows) // 8 * self.group_nbytes(n_cols)


def padded(n: int, multiple: int = STRIP) -> int:
    """Round up to a multiple."""
    return -(-n // multiple) * multiple


FORMATS: dict[str, BlockFormat] = {
    row[0]: BlockFormat(*row)
    for row in (
        ("f32", 0, 1, 4, 1024, "f32", "f32", (0,)),
        ("f16", 1, 1, 2, 512, "f32", "f16", (0,)),
        ("q4_0", 2, 32, 18, 144, "i8", "f16", (0,)),
        ("q4_1", 3, 32, 20, 160, "i8", "f16", (0, 2)),
        ("q5_0", 6, 32, 22, 176, "i8", "f16", (0,)),
        ("q5_1", 7, 32, 24, 192, "i8", "f16", (0, 2)),
        ("q8_0", 8, 32, 34, 272, "i16", "f16", (0,)),
        ("q2_k", 10, 256, 84, 672, "i8", "f16", (80, 82)),
        ("q3_k", 11, 256, 110, 912, "i8", "f16", (108,)),
        ("q4_k", 12, 256, 144, 1184, "i8", "f16", (0, 2)),
        ("q5_k", 13, 256, 176, 1440, "i8", "f16", (0, 2)),
        ("q6_k", 14, 256, 210, 1680, "i8", "f16", (208,)),
        ("iq4_nl", 20, 32, 18, 144, "i16", "f16", (0,)),
        ("iq4_xs", 23, 256, 136, 1104, "i16", "f16", (0,)),
        ("bf16", 30, 1, 2, 512, "f32", "bf16", (0,)),
        ("mxfp4", 39, 32, 17, 136, "i8", "e8m0", (0,)),
    )
}
"""Formats that the kernels can read, by GGUF name in lower case."""

EXPONENTS = {
    "e8m0": (1, 0xFF),
    "f16": (2, 0x7C00),
    "bf16": (2, 0x7F80),
    "f32": (4, 0x7F800000),
    "f64": (8, 0x7FF0000000000000),
}
"""Bytes of a float and its exponent's bits: when all are set, it is NaN or infinite."""

FORMAT_BY_ID: dict[int, BlockFormat] = {f.type_id: f for f in FORMATS.values()}

# Sound types of GGUF that no kernel reads: known by size, so that a file can still be inspected.
OTHER_TYPES: dict[int, BlockFormat] = {
    row[1]: BlockFormat(*row)
    for row in (
        ("q8_1", 9, 32, 36, 0, "", "f16", (0, 2)),
        ("q8_k", 15, 256, 292, 0, "", "f32", (0,)),
        ("iq2_xxs", 16, 256, 66, 0, "", "f16", (0,)),
        ("iq2_xs", 17, 256, 74, 0, "", "f16", (0,)),
        ("iq3_xxs", 18, 256, 98, 0, "", "f16", (0,)),
        ("iq1_s", 19, 256, 50, 0, "", "f16", (0,)),
        ("iq3_s", 21, 256, 110, 0, "", "f16", (0,)),
        ("iq2_s", 22, 256, 82, 0, "", "f16", (0,)),
        ("i8", 24, 1, 1),
        ("i16", 25, 1, 2),
        ("i32", 26, 1, 4),
        ("i64", 27, 1, 8),
        ("f64", 28, 1, 8, 0, "", "f64", (0,)),
        ("iq1_m", 29, 256, 56),
        ("tq1_0", 34, 256, 54, 0, "", "f16", (52,)),
        ("tq2_0", 35, 256, 66, 0, "", "f16", (64,)),
        ("nvfp4", 40, 64, 36),
        ("q1_0", 41, 128, 18, 0, "", "f16", (0,)),
        ("q2_0", 42, 64, 18, 0, "", "f16", (0,)),
    )
}
