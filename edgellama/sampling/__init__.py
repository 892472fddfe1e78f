"""From logits to a token: `Sampler` draws, `SamplingOptions` says how.

One file for each kind: what removes candidates (`truncation.py`), what makes said tokens less likely
(`penalties.py`, `dry.py`), `mirostat.py`; their order is in `chain.py`.
"""

from .options import SamplingOptions, check_count, file_options, read_options
from .sampler import LogitsProcessor, Sampler

__all__ = [
    "LogitsProcessor",
    "Sampler",
    "SamplingOptions",
    "check_count",
    "file_options",
    "read_options",
]
