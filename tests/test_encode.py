"""Encoding weights: against the oracle's decoding, llama.cpp's bytes and losses, and at the edges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import naive
import numpy as np
import pytest

from edgellama.gguf.synthetic import random_blocks
from edgellama.kernels import targets, team
from edgellama.kernels.blocks import FORMATS
from edgellama.kernels.compiler import Pack
from edgellama.kernels.encode import (
    SCRATCH_NBYTES,
    dequantize,
    encode,
    operations,
    squared_error,
)
from edgellama.kernels.team import Team
from edgellama.runtime.engine import load_pack

GOLDEN = Path(__file__).parent / "data" / "encode.npz"
THRESHOLDS = Path(__file__).parents[2] / "shared" / "data" / "cases" / "quantize_thresholds.json"
NAMES = [name for name in FORMATS if name != "f32"]
BLOCKS = [name for name in NAMES if FORMATS[name].n_weights > 1]
EXACT = ("f16", "bf16", "q8_0", "q4_0")

# Error of normal weights, squared and relative: what a bit less or a wrong plane would exceed at once.
BOUNDS = {
    "f16": 1e-7, "bf16": 4e-6, "q8_0": 4e-5, "q6_k": 3.5e-4, "q5_k": 1.5e-3, "q5_1": 1.4e-3,
    "q5_0": 2e-3, "q4_k": 6e-3, "q4_1": 6e-3, "iq4_nl": 6e-3, "iq4_xs": 6.2e-3, "q4_0": 8.5e-3,
    "mxfp4": 1.5e-2, "q3_k": 2.3e-2, "q2_k": 8e-2,
}  # fmt: skip


def make_pack(target: targets.Target, names: list[str]) -> Pack:
    return load_pack([*(op for name in names for op in operations(name)), *team.NAMES], target)


@pytest.fixture(scope="module")
def pack() -> Pack:
    return make_pack(targets.detect(), NAMES)


@pytest.fixture(scope="module")
def threads(pack: Pack) -> Iterator[Team]:
    team = Team(pack, 2, SCRATCH_NBYTES)
    yield team
    team.close()


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def decoded(format_name: str, blocks: np.ndarray, n_cols: int) -> np.ndarray:
    return naive.dequantize(blocks, FORMATS[format_name].type_id, len(blocks), n_cols)


def normal(n_rows: int, n_cols: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n_rows, n_cols), np.float32) * np.float32(0.02)


# --- decoding -------------------------------------------------------------------------------------
@pytest.mark.parametrize("format_name", NAMES)
def test_decoding_is_exact(threads: Team, format_name: str) -> None:
    raw = random_blocks(format_name, 5, 768, np.random.default_rng(3))
    assert np.array_equal(dequantize(threads, format_name, raw), decoded(format_name, raw, 768))


@pytest.mark.parametrize("format_name", BLOCKS)
def test_every_bit_of_a_block_is_decoded(threads: Team, format_name: str) -> None:
    """Blocks of zeros, ones, and every single bit."""
    format_ = FORMATS[format_name]
    n_bits = format_.nbytes * 8
    bits = np.packbits(np.eye(n_bits, dtype=np.uint8), axis=1, bitorder="little")
    blocks = np.concatenate([bits, ~bits, bits[:1] * 0])
    for at in format_.float_places:
        if format_.float_type == "f16":
            blocks[:, at : at + 2] = np.array([0.75], np.float16).view(np.uint8)
        else:
            blocks[:, at] = np.minimum(blocks[:, at], 250)
    blocks = np.ascontiguousarray(blocks)
    ours = dequantize(threads, format_name, blocks)
    assert np.array_equal(ours, decoded(format_name, blocks, format_.n_weights))


# --- beside llama.cpp -----------------------------------------------------------------------------
@pytest.mark.parametrize("format_name", EXACT)
def test_bytes_are_those_of_llama_cpp(
    threads: Team, golden: dict[str, np.ndarray], format_name: str
) -> None:
    for rows in ("edges", "weights"):
        ours = encode(threads, format_name, golden[rows])
        assert np.array_equal(ours, golden[f"{rows}_{format_name}"]), rows


@pytest.mark.parametrize("format_name", BLOCKS)
@pytest.mark.parametrize("important", [False, True])
def test_loses_no_more_than_llama_cpp(
    threads: Team, golden: dict[str, np.ndarray], format_name: str, important: bool
) -> None:
    rows = golden["weights"]
    importance = golden["importance"] if important else None
    theirs = golden[f"{'important' if important else 'weights'}_{format_name}"]
    ours = dequantize(threads, format_name, encode(threads, format_name, rows, importance))
    loss = squared_error(rows, ours, importance)
    assert loss <= squared_error(rows, decoded(format_name, theirs, 512), importance)
    assert loss > 0


@pytest.mark.skipif(not THRESHOLDS.exists(), reason="../shared/data is not beside the project")
@pytest.mark.parametrize("format_name", NAMES)
def test_errors_stay_below_llama_cpps_thresholds(threads: Team, format_name: str) -> None:
    """Source: llama.cpp's tests/test-quantize-fns.cpp."""
    limits = json.loads(THRESHOLDS.read_text())["thresholds"]
    total, product = {
        "q2_k": ("_2BITS", "_LOWBIT"), "q3_k": ("_3BITS", "_LOWBIT"), "mxfp4": ("_FP4", "_FP4"),
    }.get(format_name, ("", ""))  # fmt: skip
    n = 32 * 128
    x, y = (0.1 + 2 * np.cos(np.arange(n) + offset) for offset in (0.0, 1.0))
    rows = x[None].astype(np.float32)
    ours = dequantize(threads, format_name, encode(threads, format_name, rows))[0].astype(float)
    assert np.sqrt(((ours - x) ** 2).sum()) / n <= limits[f"MAX_QUANTIZATION_TOTAL_ERROR{total}"]
    assert abs(ours @ y - x @ y) / n <= limits[f"MAX_DOT_PRODUCT_ERROR{product}"]


# --- how good -------------------------------------------------------------------------------------
@pytest.mark.parametrize("format_name", NAMES)
def test_error_of_normal_weights(threads: Team, format_name: str) -> None:
    rows = normal(16, 512)
    blocks = encode(threads, format_name, rows)
    assert blocks.shape == (16, FORMATS[format_name].row_nbytes(512))
    ours = decoded(format_name, blocks, 512)
    assert squared_error(rows, ours) < BOUNDS[format_name]
    assert squared_error(rows, ours) > BOUNDS[format_name] / 3  # the bound binds


@pytest.mark.parametrize("format_name", BLOCKS)
def test_what_is_on_the_grid_stays(threads: Team, format_name: str) -> None:
    """Weights that a format can hold come back almost as they are: no better scale is overlooked."""
    raw = random_blocks(format_name, 8, 512, np.random.default_rng(4))
    rows = decoded(format_name, raw, 512)
    ours = dequantize(
        threads, format_name, encode(threads, format_name, rows, np.ones(512, np.float32))
    )
    # Super-blocks share d between sub-blocks whose scales are random here: the harder case.
    limit = {"q8_0": 4e-5, "q2_k": 0.05, "q3_k": 0.02}.get(format_name, 2e-3)
    assert squared_error(rows, ours) < limit


@pytest.mark.parametrize("format_name", [name for name in BLOCKS if name != "q8_0"])
def test_importance_moves_the_error(threads: Team, format_name: str) -> None:
    rows = normal(8, 512)
    importance = np.zeros(512, np.float32)
    importance[::4] = 7.0
    plain = dequantize(
        threads, format_name, encode(threads, format_name, rows, np.ones(512, np.float32))
    )
    ours = dequantize(threads, format_name, encode(threads, format_name, rows, importance))
    ratio = squared_error(rows, ours, importance) / squared_error(rows, plain, importance)
    assert ratio < (0.99 if format_name == "mxfp4" else 0.9)
    # Columns of no importance get the nearest value all the same.
    assert squared_error(rows, ours) < 4 * BOUNDS[format_name]
    # It is relative, and where there is none all columns weigh the same.
    for other in (importance * np.float32(1e-20), importance * np.float32(1e20)):
        again = encode(threads, format_name, rows, other)
        assert squared_error(
            rows, dequantize(threads, format_name, again), importance
        ) == pytest.approx(squared_error(rows, ours, importance), rel=1e-3)
    nothing = encode(threads, format_name, rows, np.zeros(512, np.float32))
    assert np.array_equal(nothing, encode(threads, format_name, rows, np.ones(512, np.float32)))


def test_importance_belongs_to_columns_of_odd_rows(threads: Team) -> None:
    """Rows of 5 blocks: eight blocks at a time begin anywhere in a row."""
    rows = normal(7, 160)
    importance = np.random.default_rng(5).gamma(0.5, 1.0, 160).astype(np.float32)
    whole = encode(threads, "q4_1", rows, importance)
    for i, row in enumerate(rows):
        assert np.array_equal(whole[i], encode(threads, "q4_1", row[None], importance)[0])


# --- edges ----------------------------------------------------------------------------------------
def edge_rows(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    spike = np.zeros(n, np.float32)
    spike[n // 2] = 5.0
    return {
        "zeros": np.zeros(n, np.float32),
        "negative zeros": -np.zeros(n, np.float32),
        "positive constant": np.full(n, 0.75, np.float32),
        "negative constant": np.full(n, -0.75, np.float32),
        "spike": spike,
        "negative spike": -spike,
        "subnormal": (rng.standard_normal(n) * 1e-40).astype(np.float32),
        "tiny": (rng.standard_normal(n) * 1e-20).astype(np.float32),
        "large": (rng.standard_normal(n) * 1e4).astype(np.float32),
        "ties": (rng.integers(-15, 16, n) / 2).astype(np.float32),
        "positive": rng.uniform(1.0, 2.0, n).astype(np.float32),
        "two values": np.where(rng.random(n) < 0.5, -1.0, 1.0).astype(np.float32),
    }


@pytest.mark.parametrize("format_name", NAMES)
@pytest.mark.parametrize("important", [False, True])
def test_edges(threads: Team, format_name: str, important: bool) -> None:
    for name, row in edge_rows(512).items():
        importance = np.linspace(0, 1, 512, dtype=np.float32) if important else None
        ours = dequantize(threads, format_name, encode(threads, format_name, row[None], importance))
        assert np.isfinite(ours).all(), name
        largest = np.abs(row).max()
        if name.endswith("zeros"):
            assert not ours.any(), name
        elif name.endswith("constant") and not important:
            assert np.abs(ours - row).max() < 0.08 * largest, name
        elif largest > 1e-6:
            limit = 0.45 if format_name == "q2_k" else 0.25
            assert np.abs(ours - row).max() <= limit * largest, name
        else:
            assert np.abs(ours).max() <= max(2 * largest, 1e-6), name


@pytest.mark.parametrize("format_name", NAMES)
def test_what_cannot_be_encoded_is_an_error(threads: Team, format_name: str) -> None:
    rows = normal(3, 512)
    for bad in (np.nan, np.inf, -np.inf):
        broken = rows.copy()
        broken[2, 511] = bad
        with pytest.raises(ValueError, match="NaN"):
            encode(threads, format_name, broken)
    for large in (3e35, 1e20, 1e10):
        broken = rows.copy()
        broken[1, 300] = large
        if format_name != "bf16" and not (format_name == "mxfp4" and large == 1e10):
            with pytest.raises(ValueError, match=r"too large to be encoded as " + format_name):
                encode(threads, format_name, broken)


def test_bad_arguments_are_named(threads: Team) -> None:
    rows = normal(2, 96)
    with pytest.raises(ValueError, match="rows of 96 columns; q4_k needs a multiple of 256"):
        encode(threads, "q4_k", rows)
    with pytest.raises(ValueError, match="rows of 80 columns; q8_0 needs a multiple of 32"):
        encode(threads, "q8_0", np.ascontiguousarray(rows[:, :80]))
    with pytest.raises(ValueError, match=r"q9.*there are f16, q4_0"):
        encode(threads, "q9", rows)
    with pytest.raises(ValueError, match=r"importance of shape \(95,\); rows have 96 columns"):
        encode(threads, "q4_0", rows, np.ones(95, np.float32))
    for bad in (-1.0, np.nan, np.inf):
        importance = np.ones(96, np.float32)
        importance[3] = bad
        with pytest.raises(ValueError, match="importance holds"):
            encode(threads, "q4_0", rows, importance)
    assert encode(threads, "q4_0", rows[:0]).shape == (0, 54)


# --- the same result, however ---------------------------------------------------------------------
@pytest.mark.parametrize("format_name", NAMES)
def test_results_do_not_depend_on_threads_or_rows(
    pack: Pack, threads: Team, format_name: str
) -> None:
    n_cols = 256 if FORMATS[format_name].n_weights == 256 else 96
    rows = normal(1001, n_cols)  # several parts, and a tile that is not full
    importance = np.random.default_rng(7).gamma(0.5, 1.0, n_cols).astype(np.float32)
    for weights in (None, importance):
        whole = encode(threads, format_name, rows, weights)
        for n_threads in (1, 3):
            others = Team(pack, n_threads, SCRATCH_NBYTES)
            assert np.array_equal(whole, encode(others, format_name, rows, weights))
            others.close()
        pieces = [
            encode(threads, format_name, rows[i : i + 77], weights) for i in range(0, 1001, 77)
        ]
        assert np.array_equal(whole, np.concatenate(pieces))


@pytest.mark.parametrize("format_name", ["q4_k", "q8_0"])
def test_results_do_not_depend_on_the_cpu(threads: Team, format_name: str) -> None:
    if threads.pack.target.machine != "x86_64":
        pytest.skip("this machine has one tier")
    generic = make_pack(targets.TARGETS["x86-64-generic"], [format_name])
    others = Team(generic, 1, SCRATCH_NBYTES)
    rows = np.concatenate([normal(8, 512), normal(2, 512) * np.float32(1e-5)])
    assert np.array_equal(encode(others, format_name, rows), encode(threads, format_name, rows))
    others.close()
