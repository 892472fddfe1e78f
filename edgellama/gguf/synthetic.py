"""Models that nobody has trained: real shapes with random weights, in memory and without a file.

`random_blocks` makes valid bytes of every format in `edgellama.kernels.blocks.FORMATS`, `Shape` says
which tensors a model has, and `SyntheticFile` stands in for an open GGUF file.  What a model costs to
run does not depend on its numbers.  The tests' small files are made of the same parts.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import UsageError
from edgellama.kernels.blocks import FORMATS

from .reader import GGUFFile, Place, TensorBytes, TensorInfo


# --- blocks ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Scales:
    """Where a format keeps its f16 scales, and what makes its weights have standard deviation 1."""

    d: int  # byte offset
    deviation: float  # of the weights of random bytes when d is 1
    minimum: int = -1  # byte offset of the f16 minimum, or -1
    per_d: float = 0.0  # minimum / d that centres the weights
    signed: bool = True  # d may be negative


_SCALES = {
    "q4_0": _Scales(0, 4.6),
    "q4_1": _Scales(0, 4.6, 2, -7.5, signed=False),
    "q5_0": _Scales(0, 9.2),
    "q5_1": _Scales(0, 9.2, 2, -15.5, signed=False),
    "q8_0": _Scales(0, 74.0),
    "q2_k": _Scales(80, 14.0, 82, 1.5, signed=False),
    "q3_k": _Scales(108, 42.0),
    "q4_k": _Scales(0, 260.0, 2, 7.5, signed=False),
    "q5_k": _Scales(0, 530.0, 2, 15.5, signed=False),
    "q6_k": _Scales(208, 1360.0),
    "iq4_nl": _Scales(0, 70.0),
    "iq4_xs": _Scales(0, 1290.0),
}
_FLOATS = ("f32", "f16", "bf16")


def random_blocks(
    format_name: str, n_rows: int, n_cols: int, rng: np.random.Generator, gain: float = 1.0
) -> np.ndarray:
    """Return u8 (n_rows, row bytes): weights of standard deviation about gain / sqrt(n_cols).

    Every code, sub-scale and sign occurs; some blocks have a scale of zero.
    Raises: ValueError when a row is no whole number of blocks.
    """
    block = FORMATS[format_name]
    if n_cols % block.n_weights:
        raise ValueError(f"{n_cols} columns; {format_name} needs a multiple of {block.n_weights}")
    deviation = gain / np.sqrt(n_cols)
    if format_name in _FLOATS:
        values = rng.standard_normal((n_rows, n_cols), np.float32) * np.float32(deviation)
        if format_name == "bf16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(np.float16 if format_name == "f16" else np.float32).view(np.uint8)
    n_blocks = n_rows * n_cols // block.n_weights
    raw = np.frombuffer(rng.bytes(n_blocks * block.nbytes), np.uint8).copy()
    raw = raw.reshape(n_blocks, block.nbytes)
    if format_name == "mxfp4":  # e8m0 exponent; its codes have a standard deviation of 5.5 halves
        exponent = 128 + round(float(np.log2(deviation / 5.5)))
        raw[:, 0] = exponent + rng.integers(-1, 2, n_blocks)
        return raw.reshape(n_rows, -1)
    scales = _SCALES[format_name]
    d = (deviation / scales.deviation) * rng.uniform(0.5, 1.4, n_blocks)
    if scales.minimum >= 0:
        minimum = (d * scales.per_d * rng.uniform(0.8, 1.2, n_blocks)).astype(np.float16)
        raw[:, scales.minimum : scales.minimum + 2] = minimum[:, None].view(np.uint8)
    if scales.signed:
        d *= rng.choice([-1.0, 1.0], n_blocks)
    d[rng.random(n_blocks) < 0.01] = 0.0
    raw[:, scales.d : scales.d + 2] = d.astype(np.float16)[:, None].view(np.uint8)
    return raw.reshape(n_rows, -1)


# --- shapes ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """Sizes of a model.  The defaults are small and hold whole blocks of every format."""

    arch: str = "llama"
    width: int = 256
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_size: int = 64
    ffn: int = 512
    n_vocab: int = 328
    n_dims: int = 0  # rotated dimensions; 0: all, without saying so
    context_length: int = 4096
    freq_base: float = 10000.0
    window: int = 0
    tied: bool = True

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name to (rows, cols) of every matrix and (n,) of every vector."""
        d, e = self.width, self.head_size
        q, kv = self.n_heads * e, self.n_kv_heads * e
        layer: dict[str, tuple[int, ...]] = {
            "attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q),
            "ffn_gate": (self.ffn, d), "ffn_up": (self.ffn, d), "ffn_down": (d, self.ffn),
            "attn_norm": (d,), "ffn_norm": (d,),
        }  # fmt: skip
        if self.arch == "gemma3":
            layer |= {
                "attn_q_norm": (e,), "attn_k_norm": (e,), "post_attention_norm": (d,),
                "post_ffw_norm": (d,),
            }  # fmt: skip
        out: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.n_vocab, d)}
        if not self.tied:
            out["output.weight"] = (self.n_vocab, d)
        out["output_norm.weight"] = (d,)
        for i in range(self.n_layers):
            out |= {f"blk.{i}.{part}.weight": shape for part, shape in layer.items()}
        return out

    def gain(self, name: str) -> float:
        """The gain of a matrix; tied embeddings give logits a standard deviation of 4, or of 1."""
        if name == "output.weight":
            return 4.0
        if name == "token_embd.weight" and self.arch != "gemma3":
            return float(self.width**0.5 / 4)
        return 1.0

    def metadata(self) -> dict[str, Any]:
        """The hyper-parameters as GGUF keys; what is None is left out of a file."""
        keys = {
            "block_count": self.n_layers,
            "context_length": self.context_length,
            "embedding_length": self.width,
            "feed_forward_length": self.ffn,
            "attention.head_count": self.n_heads,
            "attention.head_count_kv": self.n_kv_heads,
            "attention.key_length": self.head_size,
            "attention.value_length": self.head_size,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.sliding_window": self.window or None,
            "rope.dimension_count": self.n_dims or None,
            "rope.freq_base": self.freq_base,
        }
        return {f"{self.arch}.{key}": value for key, value in keys.items()}


def random_vector(n: int, rng: np.random.Generator, mean: float = 1.0) -> np.ndarray:
    """Return f32 (n,) around `mean`: the weights of a norm."""
    return (mean + 0.2 * rng.standard_normal(n)).astype(np.float32)


SHAPES: dict[str, Shape] = {
    "smollm2-135m": Shape(
        "llama", 576, 30, 9, 3, 64, 1536, 49152, context_length=8192, freq_base=1e5
    ),
    "smollm2-360m": Shape(
        "llama", 960, 32, 15, 5, 64, 2560, 49152, context_length=8192, freq_base=1e5
    ),
    "llama-3.2-1b": Shape(
        "llama", 2048, 16, 32, 8, 64, 8192, 128256, context_length=131072, freq_base=5e5
    ),
    "llama-3.2-3b": Shape(
        "llama", 3072, 28, 24, 8, 128, 8192, 128256, context_length=131072, freq_base=5e5
    ),
    "llama-3.1-8b": Shape(
        "llama", 4096, 32, 32, 8, 128, 14336, 128256, context_length=131072, freq_base=5e5,
        tied=False,
    ),
    "gemma3-270m": Shape(
        "gemma3", 640, 18, 4, 1, 256, 2048, 262144, context_length=32768, freq_base=1e6, window=512
    ),
    "gemma3-1b": Shape(
        "gemma3", 1152, 26, 4, 1, 256, 6912, 262144, context_length=32768, freq_base=1e6, window=512
    ),
}  # fmt: skip
"""Shapes by name, from the published configurations."""

# What llama.cpp's quantizer falls back to where rows are no whole number of super-blocks.
_FALLBACK = {
    "q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1",
    "q6_k": "q8_0",
}  # fmt: skip
_POOL_ROWS = 64  # distinct rows of a matrix: filling 1 GB with random bytes would take seconds


# --- the stand-in ---------------------------------------------------------------------------------
class SyntheticFile(GGUFFile):
    """A shape with random weights of one format; embeddings and head are q8_0, or that float format.

    The bytes of a tensor follow from its name and are made when they are asked for.
    """

    def __init__(self, name: str, shape: Shape, format_name: str) -> None:
        super().__init__(Path(f"{name}-{format_name}"))
        self.metadata = {"general.architecture": shape.arch, "general.name": name}
        self.metadata |= {k: v for k, v in shape.metadata().items() if v is not None}
        self._shape = shape
        for tensor, size in shape.tensors().items():
            kind = "f32" if len(size) == 1 else _kind(tensor, size[1], format_name)
            block = FORMATS[kind]
            n_weights = int(np.prod(size))
            nbytes = n_weights // block.n_weights * block.nbytes
            self.tensors[tensor] = TensorInfo(tensor, size[::-1], block, n_weights, nbytes, 0)

    def data(self, name: str) -> np.ndarray:
        """Make the bytes of a tensor, u8 (nbytes,)."""
        info = self.tensors[name]
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if len(info.shape) == 1:
            return random_vector(info.shape[0], rng).view(np.uint8)
        n_cols, n_rows = info.shape
        gain = self._shape.gain(name)
        pool = random_blocks(info.type_name, min(n_rows, _POOL_ROWS), n_cols, rng, gain)
        return np.resize(pool, info.nbytes)

    def bytes_of(self, name: str) -> TensorBytes:
        """Make the bytes of a tensor, and return their reader."""
        return _MadeBytes(self, name)


class _MadeBytes(TensorBytes):
    """Bytes in memory with the face of a tensor in a file."""

    def __init__(self, file: SyntheticFile, name: str) -> None:
        self._file, self._name = file, name

    def place(self) -> Place:
        data = self._file.data(self._name)
        return Place(data.ctypes.data, data)

    def read_into(self, out: np.ndarray, at: int) -> None:
        out.reshape(-1)[:] = self._file.data(self._name)[at : at + out.size]


def synthetic(shape_name: str, format_name: str) -> SyntheticFile:
    """Return a stand-in for a file of one of `SHAPES` in any format that the kernels read.

    Raises: UsageError listing the known names.
    """
    if shape_name not in SHAPES:
        raise UsageError(f"no shape is called {shape_name!r}; shapes: {', '.join(SHAPES)}")
    if format_name not in FORMATS:
        raise UsageError(f"no format is called {format_name!r}; formats: {', '.join(FORMATS)}")
    return SyntheticFile(shape_name, SHAPES[shape_name], format_name)


def _kind(tensor: str, n_cols: int, format_name: str) -> str:
    if tensor in ("token_embd.weight", "output.weight"):
        return format_name if format_name in _FLOATS else "q8_0"
    if n_cols % FORMATS[format_name].n_weights:
        return _FALLBACK[format_name]
    return format_name
