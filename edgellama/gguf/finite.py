"""Whether the numbers of a tensor are numbers: no NaN, no infinity, in values or in scales of blocks.

A float is not finite when its exponent is all ones, which integers show without a conversion.  Offsets
are those of the GGUF specification (ggml-common.h).
"""

from __future__ import annotations

import numpy as np

# Type: word, exponent, the places of floats in a block, in words.  Types that are not here are integers,
# or (iq1_m, nvfp4) have no scale that stands whole in its bytes.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger], int, tuple[int, ...]]] = {
    "f64": (np.uint64, 0x7FF0000000000000, (0,)),
    "f32": (np.uint32, 0x7F800000, (0,)),
    "q8_k": (np.uint32, 0x7F800000, (0,)),
    "bf16": (np.uint16, 0x7F80, (0,)),
    "mxfp4": (np.uint8, 0xFF, (0,)),
    **{
        name: (np.uint16, 0x7C00, places)
        for names, places in (
            ("f16 q4_0 q5_0 q8_0 iq4_nl iq4_xs", (0,)),
            ("q4_1 q5_1 q8_1 q4_k q5_k", (0, 1)),
            ("iq1_s iq2_xxs iq2_xs iq2_s iq3_xxs iq3_s q1_0 q2_0", (0,)),
            ("q2_k", (40, 41)),
            ("q3_k", (54,)),
            ("q6_k", (104,)),
            ("tq1_0", (26,)),
            ("tq2_0", (32,)),
        )
        for name in names.split()
    },
}


def is_finite(type_name: str, block_nbytes: int, raw: np.ndarray) -> bool:
    """Say whether whole blocks u8 (n * block_nbytes,) hold only finite numbers."""
    if type_name not in _EXPONENTS:
        return True
    word, exponent, places = _EXPONENTS[type_name]
    words = raw.view(word).reshape(-1, block_nbytes // np.dtype(word).itemsize)
    return not any(((words[:, at] & word(exponent)) == exponent).any() for at in places)
