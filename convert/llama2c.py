"""Files of llama2.c: a header of seven counts, then weights in an order of their own.

    version 0   no magic; f32; all layers of a kind together; tables of RoPE before the classifier
    version 1   "ak42", a header of 256 bytes; f32; norms first
    version 2   as 1; norms f32, matrices int8, each followed by its f32 scales, one per group

Names are Meta's, so is the order of rows in `wq` and `wk`.  Source: `export.py`, `run.c` and `runq.c` of
karpathy/llama2.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError
from edgellama.gguf.cursor import Part

from .checkpoint import Checkpoint, SourceTensor
from .stored import StoredTensor

_MAGIC = 0x616B3432
_HEADER_NBYTES = 256
_COUNTS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_MAX_COUNT = 1 << 24
_MAX_LAYERS = 1 << 12

_Shape = tuple[int, ...]


class GroupedTensor(SourceTensor):
    """Bytes with a scale for every `group` of them, counted through all rows."""

    dtype = "I8"

    def __init__(self, values: StoredTensor, scales: StoredTensor, group: int) -> None:
        self.values, self.scales, self.group = values, scales, group
        self.name, self.shape = values.name, values.shape
        self.nbytes = values.nbytes + scales.nbytes

    def _read(self, start: int, stop: int) -> np.ndarray:
        n_cols = prod(self.shape[1:])
        first, last = start * n_cols // self.group, -(-stop * n_cols // self.group)
        scales = np.repeat(self.scales.read(first, last), self.group)
        begin = start * n_cols - first * self.group
        values = self.values.read(start, stop)
        return values * scales[begin : begin + values.size].reshape(values.shape)


def open_llama2c(path: Path) -> Checkpoint:
    """Open a model of llama2.c, of any of its versions.

    `config` has Meta's names (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
    max_seq_len), and shared_classifier: whether the embedding is the classifier too.
    Raises: ModelFileError.
    """
    part = Part(path)
    head = np.zeros(_HEADER_NBYTES, np.uint8)
    part.read(head[: part.size], 0, "the header")
    magic, version = struct.unpack_from("<Ii", head)
    if magic != _MAGIC:
        config = _config(part, head.tobytes(), 0)
        config["shared_classifier"] = config["vocab_size"] > 0
        config["vocab_size"] = abs(config["vocab_size"])
        at, version, group = 4 * len(_COUNTS), 0, 0
        plan = _plan_0(config)
    elif version in (1, 2):
        config = _config(part, head.tobytes(), 8)
        shared, group = struct.unpack_from("<Bi", head, 8 + 4 * len(_COUNTS))
        config["shared_classifier"] = bool(shared)
        at, group = _HEADER_NBYTES, group if version == 2 else 0
        if version == 2 and group <= 0:
            raise ModelFileError(f"{path.name} has groups of {group} weights; at least 1 is needed")
        plan = _plan_1(config)
    else:
        raise UnsupportedModelError(f"{path.name} is llama2.c version {version}; 0 to 2 are read")
    tensors: dict[str, SourceTensor] = {}
    for name, shape in plan:
        if group and len(shape) == 2:
            n = prod(shape)
            if n % group:
                raise ModelFileError(f"{path.name}: {name} is no whole number of groups of {group}")
            values = StoredTensor(part, name, "I8", shape, at)
            scales = StoredTensor(part, name, "F32", (n // group,), at + n)
            tensors[name] = GroupedTensor(values, scales, group)
        else:
            tensors[name] = StoredTensor(part, name, "F32", shape, at)
        at += tensors[name].nbytes
    if at != part.size:
        raise ModelFileError(
            f"{path.name} has {part.size} bytes; a model of llama2.c with this header has {at}"
        )
    for name in [name for name in tensors if name.startswith("freqs_")]:
        del tensors[name]  # RoPE's tables, which follow from the configuration
    config["version"] = version
    return Checkpoint("llama2c", config, tensors, path.parent)


def _config(part: Part, head: bytes, at: int) -> dict[str, Any]:
    counts = struct.unpack_from(f"<{len(_COUNTS)}i", head, at)
    config: dict[str, Any] = dict(zip(_COUNTS, counts, strict=True))
    seen = [abs(n) if name == "vocab_size" and not at else n for name, n in config.items()]
    dim, _, n_layers, n_heads, n_kv_heads, *_ = seen
    sound = all(0 < n <= _MAX_COUNT for n in seen) and n_layers <= _MAX_LAYERS
    if not sound or dim % n_heads or dim // n_heads % 2 or n_heads % n_kv_heads:
        raise ModelFileError(f"{part.path.name} is no model of llama2.c: its header says {config}")
    return config


def _shapes(config: dict[str, Any]) -> tuple[dict[str, _Shape], dict[str, _Shape]]:
    """Shapes of a layer's norms and matrices, in the order they have in all versions."""
    D, F = config["dim"], config["hidden_dim"]
    kv = D // config["n_heads"] * config["n_kv_heads"]
    attention = {"wq": (D, D), "wk": (kv, D), "wv": (kv, D), "wo": (D, D)}
    ffn = {"w1": (F, D), "w2": (D, F), "w3": (F, D)}
    return (
        {f"attention.{name}": shape for name, shape in attention.items()},
        {f"feed_forward.{name}": shape for name, shape in ffn.items()},
    )


def _layers(config: dict[str, Any], name: str, shape: _Shape) -> Iterator[tuple[str, _Shape]]:
    for i in range(config["n_layers"]):
        yield f"layers.{i}.{name}.weight", shape


def _plan_0(config: dict[str, Any]) -> Iterator[tuple[str, _Shape]]:
    """Names and shapes in the order of the file."""
    D, V = config["dim"], config["vocab_size"]
    attention, ffn = _shapes(config)
    yield "tok_embeddings.weight", (V, D)
    for norm, matrices in (("attention_norm", attention), ("ffn_norm", ffn)):
        yield from _layers(config, norm, (D,))
        for name, shape in matrices.items():
            yield from _layers(config, name, shape)
    yield "norm.weight", (D,)
    for table in ("freqs_cos", "freqs_sin"):
        yield table, (config["max_seq_len"], D // config["n_heads"] // 2)
    if not config["shared_classifier"]:
        yield "output.weight", (V, D)


def _plan_1(config: dict[str, Any]) -> Iterator[tuple[str, _Shape]]:
    D, V = config["dim"], config["vocab_size"]
    attention, ffn = _shapes(config)
    yield from _layers(config, "attention_norm", (D,))
    yield from _layers(config, "ffn_norm", (D,))
    yield "norm.weight", (D,)
    yield "tok_embeddings.weight", (V, D)
    for name, shape in (attention | ffn).items():
        yield from _layers(config, name, shape)
    if not config["shared_classifier"]:
        yield "output.weight", (V, D)
