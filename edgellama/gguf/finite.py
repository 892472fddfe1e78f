"""Whether the numbers of a tensor are numbers: no NaN, no infinity, in values or in scales of blocks.

A float is not finite when its exponent is all ones, which integers show without a conversion.  Types
without a place in `kernels/blocks.py` are integers, or have no scale that stands whole in its bytes.
"""

from __future__ import annotations

import numpy as np

from edgellama.kernels.blocks import EXPONENTS, BlockFormat


def is_finite(format_: BlockFormat, raw: np.ndarray) -> bool:
    """Say whether whole blocks u8 (n * nbytes,) hold only finite numbers."""
    if not format_.float_places:
        return True
    nbytes, exponent = EXPONENTS[format_.float_type]
    words = raw.view(f"<u{nbytes}").reshape(-1, format_.nbytes // nbytes)
    return not any(
        ((words[:, at // nbytes] & exponent) == exponent).any() for at in format_.float_places
    )
