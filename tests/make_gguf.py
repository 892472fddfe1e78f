"""Small models of random weights, written with the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgellama.kernels.blocks import FORMATS

# Byte offsets of the f16 scales of a block, and about the largest code they multiply.
_SCALES = {
    "q4_0": ((0,), 8), "q4_1": ((0, 2), 8), "q5_0": ((0,), 16), "q5_1": ((0, 2), 16),
    "q8_0": ((0,), 127), "iq4_nl": ((0,), 127), "q2_k": ((80, 82), 30), "q3_k": ((108,), 64),
    "q4_k": ((0, 2), 500), "q5_k": ((0, 2), 1000), "q6_k": ((208,), 2000),
    "iq4_xs": ((0,), 2500),
}  # fmt: skip


def random_blocks(name: str, n_rows: int, n_cols: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of random bytes with sane scales, u8 (n_rows, row bytes): weights of about 0.1."""
    format_ = FORMATS[name]
    n_blocks = n_cols // format_.n_weights
    if name in ("f32", "f16", "bf16"):
        values = rng.normal(0, 0.08, (n_rows, n_cols)).astype(np.float32)
        if name == "bf16":
            return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        return values.astype("<f4" if name == "f32" else "<f2").view(np.uint8)
    blocks = rng.integers(0, 256, (n_rows, n_blocks, format_.nbytes), dtype=np.uint8)
    places, largest = _SCALES.get(name, ((), 1))
    for at in places:
        scales = rng.uniform(0.05, 0.2, (n_rows, n_blocks, 1)) / largest
        if name in ("q4_1", "q5_1") and at == 2:
            scales = scales * -0.5 * largest
        blocks[..., at : at + 2] = scales.astype("<f2").view(np.uint8)
    if name == "mxfp4":
        blocks[..., 0] = rng.integers(122, 125, (n_rows, n_blocks))
    return blocks.reshape(n_rows, -1)


def make_model(
    path: Path,
    arch: str = "llama",
    *,
    format_name: str = "q4_1",
    width: int = 256,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_size: int = 64,
    ffn: int = 512,
    n_vocab: int = 320,
    window: int = 0,
    tied: bool = True,
    biases: bool = False,
    keys: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    shapes: dict[str, tuple[int, int]] | None = None,
    seed: int = 0,
) -> Path:
    """Write a model; `keys` overrides metadata (None removes), `drop` leaves tensors out."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    metadata: dict[str, Any] = {
        "block_count": n_layers,
        "context_length": 2048,
        "embedding_length": width,
        "feed_forward_length": ffn,
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv_heads,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "attention.sliding_window": window or None,
    }
    metadata |= keys or {}
    for key, value in metadata.items():
        full = key if key.startswith(("split.", "general.")) else f"{arch}.{key}"
        if isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
    _add_tokenizer(writer, n_vocab)

    def matrix(name: str, n_rows: int, n_cols: int) -> None:
        if name in drop:
            return
        n_rows, n_cols = (shapes or {}).get(name, (n_rows, n_cols))
        data = random_blocks(format_name, n_rows, n_cols, rng)
        kind = gguf.GGMLQuantizationType(FORMATS[format_name].type_id)
        writer.add_tensor(name, data, raw_dtype=kind)

    def vector(name: str, n: int, around: float = 1.0) -> None:
        writer.add_tensor(name, (around + rng.normal(0, 0.1, n)).astype(np.float32))

    matrix("token_embd.weight", n_vocab, width)
    if not tied:
        matrix("output.weight", n_vocab, width)
    vector("output_norm.weight", width)
    q, kv = n_heads * head_size, n_kv_heads * head_size
    for layer in range(n_layers):
        blk = f"blk.{layer}"
        for name, n_rows, n_cols in (
            ("attn_q", q, width), ("attn_k", kv, width), ("attn_v", kv, width),
            ("attn_output", width, q), ("ffn_gate", ffn, width), ("ffn_up", ffn, width),
            ("ffn_down", width, ffn),
        ):  # fmt: skip
            matrix(f"{blk}.{name}.weight", n_rows, n_cols)
            if biases and name in ("attn_q", "attn_k", "attn_v"):
                vector(f"{blk}.{name}.bias", n_rows, 0.0)
        vector(f"{blk}.attn_norm.weight", width)
        vector(f"{blk}.ffn_norm.weight", width)
        if arch == "gemma3":
            vector(f"{blk}.post_attention_norm.weight", width)
            vector(f"{blk}.post_ffw_norm.weight", width)
            vector(f"{blk}.attn_q_norm.weight", head_size)
            vector(f"{blk}.attn_k_norm.weight", head_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """A byte-level vocabulary: 256 bytes, then words nobody writes."""
    from edgellama.tokenizer.bpe import byte_of_character

    tokens = list(byte_of_character()) + [f"word{i}" for i in range(n_vocab - 256)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (n_vocab - 1) + [3])
    writer.add_token_merges([])
    writer.add_eos_token_id(n_vocab - 1)
