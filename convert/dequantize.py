"""GGUF's blocks as floats, in NumPy: slow beside a kernel, and exact.

Each decoder takes blocks u8 (n, nbytes) and gives f32 (n, n_weights).  Byte maps: `kernels/repack.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .stored import to_float32

_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # doubled


def _f16(raw: np.ndarray, at: int) -> np.ndarray:
    """The f16 at a byte of each block, f32 (n, 1)."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(raw: np.ndarray, at: int, n: int) -> np.ndarray:
    """Low, then high halves of `n` bytes, u8 (blocks, 2 n)."""
    return np.concatenate([raw[:, at : at + n] & 15, raw[:, at : at + n] >> 4], axis=1)


def _bits(raw: np.ndarray, at: int, n: int) -> np.ndarray:
    """Bits of `n` bytes, the lowest of each byte first, u8 (blocks, 8 n)."""
    return np.unpackbits(raw[:, at : at + n], axis=1, bitorder="little")


def _spread(raw: np.ndarray, at: int, n: int, bits: int) -> np.ndarray:
    """K-quants: each 32 bytes hold 32 numbers in their lowest bits, the next 32 above them, ..."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    groups = raw[:, at : at + n].reshape(len(raw), -1, 1, 32)
    return (groups >> shifts & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)


def _scaled(q: np.ndarray, d: np.ndarray, m: np.ndarray | float = 0.0) -> np.ndarray:
    """q * d - m, with d and m (blocks, groups)."""
    groups = q.reshape(*d.shape, -1).astype(np.float32)
    offset = m[:, :, None] if isinstance(m, np.ndarray) else np.float32(m)
    return (groups * d[:, :, None] - offset).reshape(len(q), -1)


def _sixes(raw: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray]:
    """q4_k, q5_k: eight scales and eight minima of 6 bits in 12 bytes."""
    low, middle, high = (raw[:, at + i : at + i + 4] for i in (0, 4, 8))
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    minima = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=1)
    return _f16(raw, 0) * scales, _f16(raw, 2) * minima


def _q4_0(raw: np.ndarray) -> np.ndarray:
    return _scaled(_nibbles(raw, 2, 16).astype(np.int8) - 8, _f16(raw, 0))


def _q4_1(raw: np.ndarray) -> np.ndarray:
    return _scaled(_nibbles(raw, 4, 16), _f16(raw, 0), -_f16(raw, 2))


def _q5_0(raw: np.ndarray) -> np.ndarray:
    q = _nibbles(raw, 6, 16) | _bits(raw, 2, 4) << 4
    return _scaled(q.astype(np.int8) - 16, _f16(raw, 0))


def _q5_1(raw: np.ndarray) -> np.ndarray:
    return _scaled(_nibbles(raw, 8, 16) | _bits(raw, 4, 4) << 4, _f16(raw, 0), -_f16(raw, 2))


def _q8_0(raw: np.ndarray) -> np.ndarray:
    return _scaled(raw[:, 2:].view(np.int8), _f16(raw, 0))


def _q2_k(raw: np.ndarray) -> np.ndarray:
    scales = raw[:, :16]
    return _scaled(
        _spread(raw, 16, 64, 2), _f16(raw, 80) * (scales & 15), _f16(raw, 82) * (scales >> 4)
    )


def _q3_k(raw: np.ndarray) -> np.ndarray:
    high = raw[:, 104:108, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3  # (n, 4, 4)
    scales = _nibbles(raw, 96, 8) | high.transpose(0, 2, 1).reshape(-1, 16) << 4
    q = _spread(raw, 32, 64, 2) | _spread(raw, 0, 32, 1) << 2
    return _scaled(q.astype(np.int8) - 4, _f16(raw, 108) * (scales.astype(np.int8) - 32))


def _q4_k(raw: np.ndarray) -> np.ndarray:
    return _scaled(_spread(raw, 16, 128, 4), *_sixes(raw, 4))


def _q5_k(raw: np.ndarray) -> np.ndarray:
    return _scaled(_spread(raw, 48, 128, 4) | _spread(raw, 16, 32, 1) << 4, *_sixes(raw, 4))


def _q6_k(raw: np.ndarray) -> np.ndarray:
    # Two halves of 128 numbers: the low nibbles of 64 bytes, then the high ones.
    low = np.concatenate([_nibbles(raw, 0, 64), _nibbles(raw, 64, 64)], axis=1)
    q = (low | _spread(raw, 128, 64, 2) << 4).astype(np.int8) - 32
    return _scaled(q, _f16(raw, 208) * raw[:, 192:208].view(np.int8))


def _iq4_nl(raw: np.ndarray) -> np.ndarray:
    return _scaled(_IQ4[_nibbles(raw, 2, 16)], _f16(raw, 0))


def _iq4_xs(raw: np.ndarray) -> np.ndarray:
    low = (raw[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15).reshape(-1, 8)
    high = (raw[:, 2:4, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(-1, 8)
    scales = (low | high << 4).astype(np.int8) - 32
    q = [_nibbles(raw, at, 16) for at in range(8, 136, 16)]
    return _scaled(_IQ4[np.concatenate(q, axis=1)], _f16(raw, 0) * scales)


def _mxfp4(raw: np.ndarray) -> np.ndarray:
    return _scaled(_E2M1[_nibbles(raw, 1, 16)], to_float32(raw[:, :1], "F8_E8M0") / 2)


DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f32": lambda raw: to_float32(raw.view("<f4"), "F32"),
    "f16": lambda raw: to_float32(raw.view("<f2"), "F16"),
    "bf16": lambda raw: to_float32(raw.view("<u2"), "BF16"),
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "mxfp4": _mxfp4,
}
"""By the names of `kernels/blocks.py`."""
