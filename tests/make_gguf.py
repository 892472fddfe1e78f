"""Small random models in GGUF, in any weight format: what the tests run on.

`make_model` writes a whole file of the `llama` or `gemma3` architecture with a toy vocabulary; shapes
and weights are those of `edgellama/gguf/synthetic.py`.  `benchmarks/make_shape.py` makes large files
with the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgellama.gguf.synthetic import Shape, random_blocks, random_vector
from edgellama.kernels.blocks import FORMATS


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


def add_matrix(writer: gguf.GGUFWriter, name: str, raw: np.ndarray, kind: str) -> None:
    """Add a matrix of any format from its bytes, u8 (n_rows, row bytes)."""
    if kind in ("f32", "f16"):
        writer.add_tensor(name, raw.view(np.float32 if kind == "f32" else np.float16))
    else:
        type_id = gguf.GGMLQuantizationType(FORMATS[kind].type_id)
        writer.add_tensor(name, raw, raw_dtype=type_id)


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
    freq_base, default_window = (1e6, 512) if arch == "gemma3" else (1e4, 0)
    shape = Shape(arch, window=window or default_window, tied=tied, freq_base=freq_base, **sizes)
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    metadata: dict[str, Any] = {"general.name": path.stem, **shape.metadata()}
    metadata |= VOCABULARIES[vocabulary](shape.n_vocab)
    for key, value in (keys or {}).items():
        known = key.startswith((f"{arch}.", "general.", "tokenizer.", "split."))
        metadata[key if known else f"{arch}.{key}"] = value
    add_metadata(writer, metadata)

    kinds = {"token_embd.weight": embedding, "output.weight": output}
    for name, size in shape.tensors().items():
        if len(size) == 1:
            if name not in drop:
                writer.add_tensor(name, random_vector(size[0], rng))
            continue
        if name not in drop:
            n_rows, n_cols = (shapes or {}).get(name, size)
            kind = kinds.get(name) or format_name
            raw = random_blocks(kind, n_rows, n_cols, rng, shape.gain(name))
            add_matrix(writer, name, raw, kind)
        bias = name.replace(".weight", ".bias")
        if biases and name.startswith("blk.") and bias not in drop:
            writer.add_tensor(bias, random_vector(size[0], rng, mean=0.0))
    if rope_freqs:
        n = (shape.n_dims or shape.head_size) // 2
        writer.add_tensor("rope_freqs.weight", np.linspace(1.0, 8.0, n, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
