"""Record which format llama.cpp's quantizer gives every tensor, for `tests/test_recipes.py`.

Run from the top of a checkout with a Python that has llama-cpp-python and gguf:

    PYTHONPATH=.:tests python tests/record_recipes.py
"""

from __future__ import annotations

import ctypes
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from make_gguf import make_model

from edgellama.convert.recipes import RECIPES
from edgellama.gguf import open_gguf

GOLDEN = Path(__file__).parent / "data" / "recipes.json"
MODELS: dict[str, dict[str, Any]] = {
    "untied, heads 4:1": {"n_layers": 18, "tied": False, "n_heads": 4, "n_kv_heads": 1},
    "tied, heads 2:1": {"n_layers": 18, "tied": True},
    "rows of 576": {"n_layers": 2, "width": 576, "n_heads": 9, "n_kv_heads": 3, "ffn": 1536},
    "rows of 176": {"n_layers": 2, "width": 176, "n_heads": 2, "n_kv_heads": 1, "ffn": 512},
}
"""Models by what is special of them; the arguments are those of `make_model`."""
UNLIKE = ("f32", "mxfp4")  # copies what is quantized; llama.cpp has it for experts only


def ask(source: Path, file_type: int, weights: bool) -> dict[str, str]:
    """Names to formats of the matrices after quantization."""
    out = source.with_name("out.gguf")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = file_type
    settings.nthread = 2
    keep = []
    if weights:
        with open_gguf(source) as gguf:
            entries = [(name, t.shape[0]) for name, t in gguf.tensors.items() if len(t.shape) > 1]
        array = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))()
        for i, (name, n_cols) in enumerate(entries):
            values = np.ones(n_cols, np.float32)
            keep.append(values)
            array[i].name = name.encode()
            array[i].data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            array[i].size = n_cols
        settings.imatrix = array
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), settings) == 0, (
        "llama.cpp refused"
    )
    with open_gguf(out) as gguf:
        return by_role({n: t.type_name for n, t in gguf.tensors.items() if len(t.shape) > 1})


def by_role(formats: dict[str, str]) -> dict[str, str]:
    """Formats by the name without the layer: one for all, or one for every layer in order."""
    layers: dict[str, dict[int, str]] = {}
    for name, kind in formats.items():
        match = re.match(r"blk\.(\d+)\.", name)
        role = name[match.end() :] if match else name
        layers.setdefault(role, {})[int(match[1]) if match else 0] = kind
    return {
        role: " ".join(kinds[i] for i in sorted(kinds))
        if len(set(kinds.values())) > 1
        else kinds[0]
        for role, kinds in sorted(layers.items())
    }


def main() -> None:
    """Write `tests/data/recipes.json`."""
    golden: dict[str, dict[str, dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, sizes in MODELS.items():
            source = make_model(Path(folder) / "in.gguf", format_name="f32", **sizes)
            for name, recipe in RECIPES.items():
                if name in UNLIKE:
                    continue
                for weights in (False, True):
                    if name == "q2_k_s" and not weights:
                        continue  # it insists
                    key = f"{name}, weighted" if weights else name
                    golden.setdefault(title, {})[key] = ask(source, recipe.file_type, weights)
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
