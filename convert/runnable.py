"""What edgellama would refuse to open is not written: its own reader looks at what a file will hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError
from edgellama.gguf.reader import GGUFFile, TensorInfo
from edgellama.models.config import read_config

from .write import Source

_ORIGINS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.scale": "attention_multiplier or query_pre_attn_scalar",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "embedding_scale": "embedding_multiplier",
    "feed_forward_length": "intermediate_size",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logits_scaling",
    "residual_scale": "residual_multiplier",
    "rope.dimension_count": "partial_rotary_factor",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.factor": "factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
"""Keys of GGUF, without the architecture, and those of config.json that they come from."""


def check_runnable(
    path: Path, metadata: Mapping[str, Any], sources: Sequence[Source], origin: str
) -> None:
    """Let the reader judge metadata and the table of tensors.

    `origin` is the file whose keys `_ORIGINS` names, or "" where the hyper-parameters have others.
    Raises: ModelFileError, UnsupportedModelError as `read_config` does, naming the key of `origin`.
    """
    try:
        read_config(_Unwritten(path, metadata, sources))
    except (ModelFileError, UnsupportedModelError) as error:
        reason = str(error).removeprefix(f"{path.name}: ")
        found = re.search(rf"\b{metadata['general.architecture']}\.([\w.]*\w)", reason)
        key = _ORIGINS.get(found[1]) if found and origin else None
        what = f"{origin}: {key} makes a file" if key else "this would make a file"
        raise type(error)(f"{what} that edgellama cannot run: {reason}") from None


class _Unwritten(GGUFFile):
    """A file that is not there yet, with the face of an open one."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], sources: Sequence[Source]) -> None:
        super().__init__(path)
        self.metadata = dict(metadata)
        self._sources = {source.tensor.name: source for source in sources}
        self.tensors = {
            t.name: TensorInfo(t.name, t.shape, t.format, prod(t.shape), t.nbytes, 0)
            for t, _ in sources
        }

    def data(self, name: str) -> np.ndarray:
        """The bytes of a vector, u8 (nbytes,); longrope's divisors are looked at."""
        return self._sources[name].read(0, 1).reshape(-1).view(np.uint8)
