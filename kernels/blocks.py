"""Block formats: how many weights a block holds, and how many bytes it takes in a file and packed.

Byte maps of the packed form (8 rows side by side) are in `formats.py`, those of the file's in
`repack.py`.  Numbers are GGUF's type ids.  Source: the GGUF specification and ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass

STRIP = 32
"""Rows of weights that a matrix kernel takes at once: four groups of 8 rows."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One way to store weights: `n_weights` of them in `nbytes` bytes."""

    name: str
    type_id: int
    n_weights: int
    nbytes: int
    packed: int = 0  # bytes of 8 rows x a block (x 32 columns for floats)
    activation: str = ""  # the form of activations it is multiplied with: i8, i16 or f32

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
        ("f32", 0, 1, 4, 1024, "f32"),
        ("f16", 1, 1, 2, 512, "f32"),
        ("q4_0", 2, 32, 18, 144, "i8"),
        ("q4_1", 3, 32, 20, 160, "i8"),
        ("q5_0", 6, 32, 22, 176, "i8"),
        ("q5_1", 7, 32, 24, 192, "i8"),
        ("q8_0", 8, 32, 34, 272, "i16"),
        ("q2_k", 10, 256, 84, 672, "i8"),
        ("q3_k", 11, 256, 110, 912, "i8"),
        ("q4_k", 12, 256, 144, 1184, "i8"),
        ("q5_k", 13, 256, 176, 1440, "i8"),
        ("q6_k", 14, 256, 210, 1680, "i8"),
        ("iq4_nl", 20, 32, 18, 144, "i16"),
        ("iq4_xs", 23, 256, 136, 1104, "i16"),
        ("bf16", 30, 1, 2, 512, "f32"),
        ("mxfp4", 39, 32, 17, 136, "i8"),
    )
}
"""Formats that the kernels can read, by GGUF name in lower case."""

FORMAT_BY_ID: dict[int, BlockFormat] = {f.type_id: f for f in FORMATS.values()}

# Sound types of GGUF that no kernel reads: known by size, so that a file can still be inspected.
OTHER_TYPES: dict[int, BlockFormat] = {
    type_id: BlockFormat(name, type_id, n_weights, nbytes)
    for name, type_id, n_weights, nbytes in (
        ("q8_1", 9, 32, 36),
        ("q8_k", 15, 256, 292),
        ("iq2_xxs", 16, 256, 66),
        ("iq2_xs", 17, 256, 74),
        ("iq3_xxs", 18, 256, 98),
        ("iq1_s", 19, 256, 50),
        ("iq3_s", 21, 256, 110),
        ("iq2_s", 22, 256, 82),
        ("i8", 24, 1, 1),
        ("i16", 25, 1, 2),
        ("i32", 26, 1, 4),
        ("i64", 27, 1, 8),
        ("f64", 28, 1, 8),
        ("iq1_m", 29, 256, 56),
        ("tq1_0", 34, 256, 54),
        ("tq2_0", 35, 256, 66),
        ("nvfp4", 40, 64, 36),
        ("q1_0", 41, 128, 18),
        ("q2_0", 42, 64, 18),
    )
}
