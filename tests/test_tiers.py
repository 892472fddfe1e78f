"""CPU tiers: which one a machine gets, and what instructions the kernels of each are made of."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from edgellama.kernels import targets
from edgellama.kernels.compiler import build, missing_objects

BYTES, WORDS = "matmul.project[q6_k]", "matmul.project[q8_0]"
PROGRAM = """
import sys
from edgellama.kernels.builder import compile_module
from edgellama.kernels.targets import TARGETS
for name in sys.argv[2:]:
    _, machine, module = compile_module(name, TARGETS[sys.argv[1]])
    print("# operation", machine.emit_assembly(module), sep="\\n")
"""
PRODUCTS = {
    "x86-64-v3": ({"vpmaddubsw": 48, "vpmaddwd": 12}, {"vpmaddwd"}),
    "x86-64-avxvnni": ({"vpdpbusd": 48}, {"vpdpwssd"}),
    "x86-64-avx512vnni": ({"vpdpbusd": 48}, {"vpdpwssd"}),
    "arm64-neon": ({"smull": 24, "smull2": 24, "smlal": 72, "smlal2": 72}, {"smlal", "smlal2"}),
    "arm64-dotprod": ({"sdot": 96}, {"smlal", "smlal2"}),
}
"""Of bytes: what stands in the tile's inner loop (8 rows x 6 tokens x 32 columns); of words: anywhere."""
PRODUCT = re.compile(r"\t(?:\{vex\}\s+)?(vpdp\w+|vpmadd\w+|[su]dot|[su]ml\wl2?|[su]mull2?)\t")


def products(assembly: str) -> Counter[str]:
    return Counter(PRODUCT.findall(assembly))


@pytest.mark.parametrize("tier", targets.TARGETS)
def test_every_tier_builds_here(tier: str, tmp_path: Path) -> None:
    """Cross-built objects need nothing from outside."""
    names = ["matmul.project[q4_1]", "step.launch"]
    build(names, targets.TARGETS[tier], tmp_path, n_processes=2)
    assert missing_objects(names, targets.TARGETS[tier], tmp_path) == []


@pytest.mark.parametrize("tier", PRODUCTS)
def test_products_are_the_instructions_the_tier_is_for(tier: str) -> None:
    command = [sys.executable, "-c", PROGRAM, tier, BYTES, WORDS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    of_bytes, of_words = done.stdout.split("# operation\n")[1:]
    loops = [products(part) for part in re.split(r"^\.L\w+:.*$", of_bytes, flags=re.MULTILINE)]
    assert max(loops, key=Counter.total) == PRODUCTS[tier][0]
    assert products(of_bytes).keys() == PRODUCTS[tier][0].keys()
    assert products(of_words).keys() == PRODUCTS[tier][1]
    text = of_bytes + of_words
    assert "zmm" not in text  # rows are packed by eight
    if tier.endswith("vnni"):
        vex = len(re.findall(r"\{vex\}\s+vpdp", text))
        assert vex == (products(text).total() if tier == "x86-64-avxvnni" else 0)
    if "avx512" not in tier:
        assert not re.search(r"%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b", text)
    if tier == "arm64-dotprod":  # activations come by lane, not by a broadcast of their own
        assert len(re.findall(r"\tsdot\t.*\.4b\[\d\]", text)) == products(text)["sdot"]


def test_the_best_tier_a_machine_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    v3 = set(targets.TARGETS["x86-64-v3"].features)
    avx512 = set(targets.TARGETS["x86-64-avx512vnni"].features)
    for machine, features, expected in (
        ("x86_64", v3 | {"sse4_2"}, "x86-64-v3"),
        ("x86_64", v3 - {"bmi2"}, "x86-64-generic"),
        ("AMD64", v3 | {"avxvnni"}, "x86-64-avxvnni"),
        ("x86_64", avx512 | {"avxvnni"}, "x86-64-avx512vnni"),
        ("x86_64", avx512 - {"avx512vl"} | {"avxvnni"}, "x86-64-avxvnni"),
        ("aarch64", {"neon"}, "arm64-neon"),
        ("arm64", {"neon", "dotprod"}, "arm64-dotprod"),
    ):
        monkeypatch.delenv("EDGELLAMA_TARGET", raising=False)
        monkeypatch.setattr(targets.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(targets, "host_features", lambda f=features: frozenset(f))
        targets.detect.cache_clear()
        assert targets.detect().name == expected
        monkeypatch.setenv("EDGELLAMA_TARGET", "x86-64-avx512vnni")
        targets.detect.cache_clear()
        if expected != "x86-64-avx512vnni":
            with pytest.raises(RuntimeError, match="EDGELLAMA_TARGET"):
                targets.detect()
    targets.detect.cache_clear()


def test_flags_are_told_as_llvm_spells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Linux says of an Alder Lake and what a tier asks for are the same words."""
    text = "processor\t: 0\nflags\t\t: avx2 fma f16c bmi1 bmi2 abm popcnt movbe avx_vnni\n"
    monkeypatch.setattr(targets.Path, "read_text", lambda path: text)
    assert targets._x86_features().issuperset(targets.TARGETS["x86-64-avxvnni"].features)
