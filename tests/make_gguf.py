"""Small random models in GGUF, in any weight format: what the tests run on.

`random_blocks` makes valid bytes of every format in `edgellama.kernels.blocks.FORMATS`: every code,
sub-scale and sign occurs, and scales are such that a row of weights has about unit gain.
`make_model` writes a whole file of the `llama` or `gemma3` architecture with a toy vocabulary.
`benchmarks/synthetic.py` makes large files with the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgellama.kernels.blocks import FORMATS


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


def random_blocks(
    format_name: str, n_rows: int, n_cols: int, rng: np.random.Generator, gain: float = 1.0
) -> np.ndarray:
    """Return u8 (n_rows, row bytes): weights of standard deviation about gain / sqrt(n_cols).

    Some blocks have a scale of zero.  Raises: ValueError when a row is no whole number of blocks.
    """
    block = FORMATS[format_name]
    if n_cols % block.n_weights:
        raise ValueError(f"{n_cols} columns; {format_name} needs a multiple of {block.n_weights}")
    deviation = gain / np.sqrt(n_cols)
    if format_name in ("f32", "f16", "bf16"):
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


# --- vocabularies ---------------------------------------------------------------------------------
def bytes_to_text() -> dict[int, str]:
    """GPT-2's map of bytes to printable characters."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}


def bpe_vocabulary(n_vocab: int) -> dict[str, Any]:
    """Metadata of a byte-level BPE of `n_vocab` tokens: bytes, an end, a few merges, fillers."""
    text = bytes_to_text()
    space = text[ord(" ")]
    merges = [("t", "h"), ("th", "e"), (space, "the"), ("i", "n"), (space, "a"), ("e", "r")]
    tokens = [text[b] for b in range(256)] + ["<|end|>"]
    types = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL]
    if n_vocab >= len(tokens) + len(merges):
        tokens += ["".join(pair) for pair in merges]
        types += [gguf.TokenType.NORMAL] * len(merges)
    else:
        merges = []
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
        **_filled(tokens, types, n_vocab),
    }


def spm_vocabulary(n_vocab: int) -> dict[str, Any]:
    """Metadata of a SentencePiece BPE of `n_vocab` tokens with byte fallback."""
    tokens = ["<unk>", "<s>", "</s>"]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    tokens += [f"<0x{b:02X}>" for b in range(256)]
    types += [gguf.TokenType.BYTE] * 256
    words = ["\u2581t", "he", "\u2581the", "in", "er", "\u2581a"]
    letters = ["\u2581", *"etaoinsrhldcumfpgwybvkxqjz", *"ETAOINSRHLDCUMFPGWYBVKXQJZ", *".,!?'\""]
    pieces = words + letters
    tokens += pieces
    types += [gguf.TokenType.NORMAL] * len(pieces)
    metadata = _filled(tokens, types, n_vocab)
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    scores += [-1000.0] * (len(metadata["tokenizer.ggml.tokens"]) - len(scores))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
        **metadata,
    }


def _filled(tokens: list[str], types: list[int], n_vocab: int) -> dict[str, Any]:
    if n_vocab < len(tokens):
        raise ValueError(f"a vocabulary of {n_vocab}; the toy ones need at least {len(tokens)}")
    n_more = n_vocab - len(tokens)
    return {
        "tokenizer.ggml.tokens": tokens + [f"<unused{i}>" for i in range(n_more)],
        "tokenizer.ggml.token_type": [int(t) for t in types]
        + [int(gguf.TokenType.UNUSED)] * n_more,
    }


VOCABULARIES: dict[str, Callable[[int], dict[str, Any]]] = {
    "bpe": bpe_vocabulary,
    "spm": spm_vocabulary,
}


# --- files ----------------------------------------------------------------------------------------
def add_metadata(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Add keys whose GGUF type follows from the Python type; None leaves a key out."""
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None and len(value):  # the format has no way to say an empty array's type
            writer.add_array(key, value)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.  The defaults hold whole blocks of every format."""

    width: int = 256
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_size: int = 64
    ffn: int = 512
    n_vocab: int = 328
    n_dims: int = 0  # rotated dimensions; 0: all, without saying so
    context_length: int = 4096

    def matrices(self, layer: int) -> dict[str, tuple[int, int]]:
        """Name to (rows, cols) of the matrices of a layer."""
        d, q, kv = self.width, self.n_heads * self.head_size, self.n_kv_heads * self.head_size
        parts = {
            "attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q),
            "ffn_gate": (self.ffn, d), "ffn_up": (self.ffn, d),
            "ffn_down": (d, self.ffn),
        }  # fmt: skip
        return {f"blk.{layer}.{part}": shape for part, shape in parts.items()}

    def metadata(self, arch: str) -> dict[str, Any]:
        """The hyper-parameters as GGUF keys."""
        return {
            f"{arch}.block_count": self.n_layers,
            f"{arch}.context_length": self.context_length,
            f"{arch}.embedding_length": self.width,
            f"{arch}.feed_forward_length": self.ffn,
            f"{arch}.attention.head_count": self.n_heads,
            f"{arch}.attention.head_count_kv": self.n_kv_heads,
            f"{arch}.attention.key_length": self.head_size,
            f"{arch}.attention.value_length": self.head_size,
            f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{arch}.rope.dimension_count": self.n_dims or None,
            f"{arch}.rope.freq_base": 1e6 if arch == "gemma3" else 10000.0,
        }


def make_model(
    path: Path,
    arch: str = "llama",
    *,
    format_name: str = "q4_1",
    embedding: str | None = None,
    output: str | None = None,
    tied: bool = True,
    vocabulary: str = "bpe",
    window: int = 0,
    biases: bool = False,
    rope_freqs: bool = False,
    keys: Mapping[str, Any] | None = None,
    drop: Collection[str] = (),
    shapes: Mapping[str, tuple[int, int]] | None = None,
    seed: int = 1,
    **sizes: int,
) -> Path:
    """Write a random model and return its path.

    `format_name` is that of the matrices; `embedding` and `output` default to it.  `keys` adds or
    replaces metadata ("rope.freq_base" stands for "llama.rope.freq_base"; None removes), `drop`
    leaves tensors out, and `shapes` gives some another (rows, cols).  `sizes` are the fields of
    `Shape`.
    """
    shape = Shape(**sizes)
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    metadata: dict[str, Any] = {"general.name": path.stem, **shape.metadata(arch)}
    metadata |= VOCABULARIES[vocabulary](shape.n_vocab)
    if window or arch == "gemma3":
        metadata[f"{arch}.attention.sliding_window"] = window or 512
    for key, value in (keys or {}).items():
        known = key.startswith((f"{arch}.", "general.", "tokenizer.", "split."))
        metadata[key if known else f"{arch}.{key}"] = value
    add_metadata(writer, metadata)

    def matrix(name: str, kind: str, n_rows: int, n_cols: int, gain: float = 1.0) -> None:
        if f"{name}.weight" in drop:
            return
        n_rows, n_cols = (shapes or {}).get(f"{name}.weight", (n_rows, n_cols))
        raw = random_blocks(kind, n_rows, n_cols, rng, gain)
        type_id = gguf.GGMLQuantizationType(FORMATS[kind].type_id)
        if kind == "f32":
            writer.add_tensor(f"{name}.weight", raw.view(np.float32))
        elif kind == "f16":
            writer.add_tensor(f"{name}.weight", raw.view(np.float16))
        else:
            writer.add_tensor(f"{name}.weight", raw, raw_dtype=type_id)

    def vector(name: str, n: int, *, mean: float = 1.0) -> None:
        if name not in drop:
            writer.add_tensor(name, (mean + 0.2 * rng.standard_normal(n)).astype(np.float32))

    # Tied embeddings are also the head: this gain gives logits a standard deviation of 4 or 1.
    gain = 1.0 if arch == "gemma3" else shape.width**0.5 / 4
    matrix("token_embd", embedding or format_name, shape.n_vocab, shape.width, gain)
    if not tied:
        matrix("output", output or format_name, shape.n_vocab, shape.width, 4.0)
    vector("output_norm.weight", shape.width)
    for layer in range(shape.n_layers):
        blk = f"blk.{layer}"
        for name, (n_rows, n_cols) in shape.matrices(layer).items():
            matrix(name, format_name, n_rows, n_cols)
            if biases:
                vector(f"{name}.bias", n_rows, mean=0.0)
        vector(f"{blk}.attn_norm.weight", shape.width)
        vector(f"{blk}.ffn_norm.weight", shape.width)
        if arch == "gemma3":
            vector(f"{blk}.attn_q_norm.weight", shape.head_size)
            vector(f"{blk}.attn_k_norm.weight", shape.head_size)
            vector(f"{blk}.post_attention_norm.weight", shape.width)
            vector(f"{blk}.post_ffw_norm.weight", shape.width)
    if rope_freqs:
        n = (shape.n_dims or shape.head_size) // 2
        writer.add_tensor("rope_freqs.weight", np.linspace(1.0, 8.0, n, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
