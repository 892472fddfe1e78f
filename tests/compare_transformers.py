"""Compare our logits of every family with those of transformers; no part of CI.

Each of the small checkpoints of `checkpoints.py` is loaded by transformers, saved by it, planned and
converted by us, and evaluated by both in f32; a difference is relative to the largest logit.

    python tests/compare_transformers.py [FAMILY ...]

needs torch and transformers.  `compare_llama_cpp.py` does the same with llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import CONFIGS, config_of, make_checkpoint, random_weights, write_gguf
from naive_hf import NaiveCheckpoint
from test_families import IDS, open_engine

from edgellama.convert.families import plan


def unpacked(c: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of an InternLM 2 as those of the Llama that it is."""
    names = {
        "tok_embeddings": "embed_tokens", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    }  # fmt: skip
    K, E = c["num_key_value_heads"], c["hidden_size"] // c["num_attention_heads"]
    out = {}
    for name, values in weights.items():
        if "wqkv" in name:
            groups = values.reshape(K, -1, E, values.shape[1])
            parts = {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}
            for part, rows in parts.items():
                new = name.replace("attention.wqkv", f"self_attn.{part}_proj")
                out[new] = np.ascontiguousarray(rows).reshape(-1, values.shape[1])
            continue
        if name == "output.weight":
            name = "lm_head.weight"
        for old, new in names.items():
            name = name.replace(f".{old}.", f".{new}.")
        out[name] = values
    return out


def transformers_logits(
    folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]
) -> np.ndarray:
    """Load a checkpoint with transformers, save it again in `folder`, and return its logits."""
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    model, report = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: value for key, value in report.items() if value}
    assert not wrong, wrong
    model.save_pretrained(folder)
    with torch.no_grad():
        return np.asarray(model(torch.tensor([IDS])).logits[0])


def compare(family: str, folder: Path) -> str:
    """Return a line of figures."""
    from safetensors.numpy import load_file

    config = config_of(family)
    weights = random_weights(config)
    if family == "internlm2":
        as_llama = config | {"model_type": "llama"}
        theirs = transformers_logits(folder, as_llama, unpacked(config, weights))
        checkpoint = make_checkpoint(config, weights)
    else:
        theirs = transformers_logits(folder, config, weights)
        saved = json.loads((folder / "config.json").read_text())
        checkpoint = make_checkpoint(saved, load_file(folder / "model.safetensors"))
    path = write_gguf(folder / "m.gguf", plan(checkpoint))
    engine = open_engine(path)
    ours = engine.logits(IDS)
    engine.close()
    size = float(np.abs(theirs).max())

    def difference(a: np.ndarray, b: np.ndarray) -> str:
        return f"{np.abs(a - b).max():.1e} ({np.abs(a - b).max() / size:.1e})"

    oracle = NaiveCheckpoint(config, weights).logits(IDS)
    return f"| {family} | {size:.1f} | {difference(ours, theirs)} | {difference(oracle, theirs)} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(CONFIGS))
    arguments = parser.parse_args()
    print("| family | largest logit | ours - transformers | oracle - transformers |")
    print("|---|---|---|---|")
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(family, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
