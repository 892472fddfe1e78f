"""Write a checkpoint of Hugging Face in a real shape, with random BF16 weights in shards.

    python benchmarks/make_folder.py llama-3.2-1b FOLDER

For conversions that take as long as real ones.  Shapes are those of `edgellama bench --shape` that are
Llamas; the tokenizer is a toy.  Tensors are written one by one, so that memory holds one of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from edgellama.gguf.synthetic import SHAPES, Shape, random_blocks, random_vector
from tests.make_tokenizer import byte_level

SHARD_NBYTES = 1 << 30
_POOL_ROWS = 512  # distinct rows of a matrix: drawing all would take a minute
_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "token_embd": "model.embed_tokens",
    "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip


def config_of(shape: Shape) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": shape.width, "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads, "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_size, "intermediate_size": shape.ffn, "vocab_size": shape.n_vocab,
        "max_position_embeddings": shape.context_length, "rope_theta": shape.freq_base,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": shape.tied, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def published(name: str) -> str:
    """Hugging Face's name of a tensor."""
    *layer, part, kind = name.removeprefix("blk.").split(".")
    return ".".join([*(f"model.layers.{i}" for i in layer), _NAMES[part], kind])


def shards(shape: Shape) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """Published name to name and shape of the tensors in each file."""
    out: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    used = 0
    for name, size in shape.tensors().items():
        nbytes = 2 * int(np.prod(size))
        if used and used + nbytes > SHARD_NBYTES:
            out.append({})
            used = 0
        out[-1][published(name)] = name, size
        used += nbytes
    return out


def write_shard(path: Path, shape: Shape, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write one file of safetensors."""
    at, header = 0, {}
    for published_name, (_, size) in tensors.items():
        end = at + 2 * int(np.prod(size))
        header[published_name] = {"dtype": "BF16", "shape": size, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for seed, (name, size) in enumerate(tensors.values()):
            rng = np.random.default_rng(seed)
            if len(size) == 1:
                file.write((random_vector(size[0], rng).view(np.uint32) >> 16).astype("<u2").data)
                continue
            pool = random_blocks("bf16", _POOL_ROWS, size[1], rng, shape.gain(name))
            for start in range(0, size[0], _POOL_ROWS):
                file.write(pool[: size[0] - start].data)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name, shape in SHAPES.items() if shape.arch == "llama"]
    parser.add_argument("shape", choices=known)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    shape, folder = SHAPES[arguments.shape], arguments.folder
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    byte_level(folder, "llama3")
    parts, weight_map = shards(shape), {}
    for i, tensors in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        write_shard(folder / file, shape, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
