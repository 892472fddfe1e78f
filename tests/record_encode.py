"""Record what llama.cpp's quantizer makes of some rows, for `tests/test_encode.py`.

Run with any Python that has NumPy, naming ggml's library, as llama-cpp-python installs it:

    python tests/record_encode.py .../llama_cpp/lib/libggml-base.so

Writes `tests/data/encode.npz`: rows f32 and the bytes that `ggml_quantize_chunk` returns.  `edges` are
for the formats that must agree bit for bit; `weights` for all, without and with `importance`.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent / "data" / "encode.npz"
FORMATS = {  # type id, weights and bytes of a block
    "f16": (1, 1, 2), "q4_0": (2, 32, 18), "q4_1": (3, 32, 20), "q5_0": (6, 32, 22),
    "q5_1": (7, 32, 24), "q8_0": (8, 32, 34), "q2_k": (10, 256, 84), "q3_k": (11, 256, 110),
    "q4_k": (12, 256, 144), "q5_k": (13, 256, 176), "q6_k": (14, 256, 210), "iq4_nl": (20, 32, 18),
    "iq4_xs": (23, 256, 136), "bf16": (30, 1, 2), "mxfp4": (39, 32, 17),
}  # fmt: skip
EXACT = ("f16", "bf16", "q8_0", "q4_0")


def edges() -> np.ndarray:
    """f32 (9, 96): zeros of both signs, ties, equal magnitudes, very small and large numbers."""
    rng = np.random.default_rng(1)
    halves = np.concatenate([[127.0], np.arange(31) - 15.5]).astype(np.float32)
    eighths = np.concatenate([[-8.0], np.arange(31) / 2 - 7.5]).astype(np.float32)
    below_half = np.full(32, np.nextafter(np.float32(0.5), np.float32(0.0)), np.float32)
    below_half[0] = 127.0
    spike = np.zeros(32, np.float32)
    spike[17] = -3.0
    mixed = rng.standard_normal(96).astype(np.float32)
    return np.stack(
        [
            np.concatenate([halves, -halves, below_half]),
            np.concatenate([eighths, -eighths, spike]),
            np.concatenate([np.zeros(32), -np.zeros(32), np.full(32, 0.1)]).astype(np.float32),
            np.where(rng.random(96) < 0.5, 1.0, -1.0).astype(np.float32),
            mixed,
            mixed * np.float32(1e-6),  # scales are subnormal in f16
            mixed * np.float32(1e-9),  # scales are 0 in f16
            mixed * np.float32(1e-30),
            mixed * np.float32(1e4),
        ]
    )


def weights() -> tuple[np.ndarray, np.ndarray]:
    """f32 (4, 512): normal, two rows with outlier columns; and an importance f32 (512,)."""
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((4, 512)).astype(np.float32) * np.float32(0.03)
    rows[2:, ::61] *= 12
    return rows, rng.gamma(0.5, 1.0, 512).astype(np.float32)


def main() -> None:
    quantize = ctypes.CDLL(sys.argv[1]).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]

    def encode(name: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        type_id, block, nbytes = FORMATS[name]
        out = np.zeros((len(rows), rows.shape[1] // block * nbytes), np.uint8)
        importance_at = None if importance is None else importance.ctypes.data
        quantize(
            type_id, rows.ctypes.data, out.ctypes.data, 0, len(rows), rows.shape[1], importance_at
        )
        return out

    rows, importance = weights()
    arrays = {"edges": edges(), "weights": rows, "importance": importance}
    for name in EXACT:
        arrays[f"edges_{name}"] = encode(name, arrays["edges"])
    for name in FORMATS:
        arrays[f"weights_{name}"] = encode(name, rows)
        arrays[f"important_{name}"] = encode(name, rows, importance)
    np.savez_compressed(OUT, **arrays)


if __name__ == "__main__":
    main()
