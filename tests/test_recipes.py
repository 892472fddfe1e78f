"""Recipes: the formats that llama.cpp's quantizer chooses, recorded by `record_recipes.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edgellama.convert.recipes import ALIASES, RECIPES, Choices, choose_formats, find_recipe
from edgellama.errors import UsageError
from edgellama.gguf.synthetic import Shape
from edgellama.gguf.writer import NewTensor
from edgellama.kernels.blocks import FORMATS

GOLDEN = json.loads((Path(__file__).parent / "data" / "recipes.json").read_text())
SHAPES = {
    "untied, heads 4:1": Shape(n_layers=18, tied=False, n_heads=4, n_kv_heads=1),
    "tied, heads 2:1": Shape(n_layers=18),
    "rows of 576": Shape(n_layers=2, width=576, n_heads=9, n_kv_heads=3, ffn=1536),
    "rows of 176": Shape(n_layers=2, width=176, n_heads=2, n_kv_heads=1, ffn=512),
}
CASES = [(title, key) for title, recipes in GOLDEN.items() for key in recipes]


def tensors(shape: Shape, source: str = "f32") -> list[NewTensor]:
    return [
        NewTensor(name, size[::-1], FORMATS[source if len(size) > 1 else "f32"])
        for name, size in shape.tensors().items()
    ]


def by_role(chosen: list[NewTensor]) -> dict[str, str]:
    layers: dict[str, list[str]] = {}
    for t in chosen:
        if len(t.shape) > 1:
            layers.setdefault(re.sub(r"^blk\.\d+\.", "", t.name), []).append(t.format.name)
    return {
        role: kinds[0] if len(set(kinds)) == 1 else " ".join(kinds)
        for role, kinds in layers.items()
    }


@pytest.mark.parametrize(("title", "key"), CASES, ids=[f"{t}: {k}" for t, k in CASES])
def test_the_mix_is_llama_cpps(title, key):
    shape = SHAPES[title]
    name, _, weighted = key.partition(", ")
    chosen = choose_formats(
        tensors(shape), RECIPES[name], wide_groups=shape.n_heads >= 4 * shape.n_kv_heads,
        importance=["blk.0.attn_q.weight"] if weighted else [],
    )  # fmt: skip
    assert by_role(chosen) == GOLDEN[title][key]


def test_every_recipe_was_recorded():
    recorded = {key for recipes in GOLDEN.values() for key in recipes}
    assert RECIPES.keys() - recorded == {"f32", "mxfp4", "q2_k_s"}


def test_vectors_and_what_is_kept_stay_as_they_are():
    chosen = choose_formats(
        tensors(Shape(tied=False), "bf16"), RECIPES["q4_0"], Choices(keep_output=True),
        wide_groups=False,
    )  # fmt: skip
    kinds = {t.name: t.format.name for t in chosen}
    assert kinds["output.weight"] == "bf16"
    assert kinds["output_norm.weight"] == "f32"
    assert kinds["blk.0.attn_q.weight"] == "q4_0"


def test_pure_and_overrides():
    chosen = choose_formats(
        tensors(Shape(tied=False)), RECIPES["q4_k_m"],
        Choices([("ffn_(up|gate)", "q8_0"), ("ffn", "q5_k")], pure=True), wide_groups=False,
    )  # fmt: skip
    kinds = {t.name: t.format.name for t in chosen}
    assert kinds["output.weight"] == kinds["blk.0.attn_v.weight"] == "q4_k"
    assert kinds["blk.1.ffn_up.weight"] == "q8_0"
    assert kinds["blk.1.ffn_down.weight"] == "q5_k"


def test_names():
    assert find_recipe("Q4_K_M") == ("q4_k_m", RECIPES["q4_k_m"])
    assert all(full in RECIPES for full in ALIASES.values())
    with pytest.raises(UsageError, match=r"no type is called 'q9'; types: f32, f16, .*mxfp4"):
        find_recipe("q9")
    for bad, message in ((("(", "q4_0"), "no regular expression"), (("x", "q9"), "no format")):
        with pytest.raises(UsageError, match=message):
            choose_formats(tensors(Shape()), RECIPES["q4_0"], Choices([bad]), wide_groups=False)
