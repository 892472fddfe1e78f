"""Attention and the KV cache: odd shapes against the oracle, and no bit depends on how work was cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_gguf import make_model
from naive import NaiveModel
from test_models import open_engine, relative_error

KV_TYPES = ["f16", "f32", "q8_0"]
N = 700  # tokens: three spans of positions
IDS = [int(i) for i in np.random.default_rng(7).integers(0, 256, N)]


def make(path: Path, arch: str = "llama", **options) -> Path:
    sizes = {"n_layers": 2, "format_name": "f32", "width": 64, "ffn": 64} | options
    return make_model(path / "m.gguf", arch, **sizes)


SHAPES = [
    {"head_size": 48, "n_heads": 5, "n_kv_heads": 1},
    {"head_size": 64, "n_heads": 6, "n_kv_heads": 2, "window": 300},
    {"head_size": 80, "n_heads": 2, "n_kv_heads": 2},
    {"head_size": 256, "n_heads": 4, "n_kv_heads": 2},
    {"head_size": 64, "n_heads": 8, "n_kv_heads": 1, "window": 70},
    {"head_size": 32, "n_heads": 7, "n_kv_heads": 1},
    {"head_size": 64, "n_heads": 4, "n_kv_heads": 2, "arch": "gemma3", "n_layers": 6, "window": 290,
     "keys": {"attn_logit_softcapping": 5.0}},
]  # fmt: skip


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['head_size']}x{s['n_heads']}")
def test_shapes_match_oracle(tmp_path, shape, kv_type):
    """Whole texts, and texts in steps of 1, 2, 7 and 100 tokens: short steps share their spans out."""
    path = make(tmp_path, **shape)
    with NaiveModel(path, kv_type=kv_type) as model:
        expected = model.logits(IDS)
    engine = open_engine(path, kv_type=kv_type)
    whole = engine.logits(IDS)
    # A value between two roundings may go either way, and then takes later layers with it.
    assert relative_error(whole, expected) < (1e-2 if kv_type == "q8_0" else 2e-3)
    sequence = engine.new_sequence()
    done = 0
    for n in (100, 1, 2, 150, 7, 1, 230, 7, 2, 1, 100, 7, 1):
        row = engine.evaluate(sequence, IDS[done : done + n])
        done += n
        assert np.array_equal(row, whole[done - 1]), done
    engine.close()


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("window", [0, 290])
def test_results_do_not_depend_on_the_cut(tmp_path, kv_type, window):
    """Threads, chunks of 7, token by token, company at other depths, a cached prefix: the same bits."""
    path = make(tmp_path, n_heads=6, n_kv_heads=2, window=window, format_name="q4_1", width=256)
    engine = open_engine(path, kv_type=kv_type)
    logits = engine.logits(IDS)
    cached = engine.new_sequence()
    engine.evaluate(cached, IDS)
    engine.free(cached)
    cached = engine.new_sequence()
    assert np.array_equal(engine.evaluate(cached, IDS), logits[-1])
    assert cached.n_reused == N - 1
    engine.close()

    engine = open_engine(path, kv_type=kv_type, n_threads=1, n_batch=7)
    assert np.array_equal(engine.logits(IDS), logits)
    engine.close()

    engine = open_engine(path, kv_type=kv_type, n_ctx=4096)
    deep, middle, fresh = (engine.new_sequence() for _ in range(3))
    engine.evaluate(deep, IDS[:500])
    engine.evaluate(middle, [i ^ 1 for i in IDS[:260]])
    for at in range(500, N):  # three sequences, one token each
        batch = [(fresh, [IDS[at - 500]]), (deep, [IDS[at]]), (middle, [IDS[at] ^ 1])]
        rows = engine.step(batch)
        assert np.array_equal(rows[1], logits[at])
        assert np.array_equal(rows[0], logits[at - 500])
    mixed = engine.step(
        [(middle, IDS[:5]), (engine.new_sequence(), IDS[:40]), (fresh, IDS[200:203])]
    )
    assert np.array_equal(mixed[1], logits[39])
    assert np.array_equal(mixed[2], logits[202])
    engine.close()


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_gemma_decodes_beyond_its_window(gemma3, kv_type):
    """Single tokens, whose spans are shared out, give the bits of one long step."""
    ids = [int(i) for i in np.random.default_rng(5).integers(1000, 200000, 640)]
    engine = open_engine(gemma3, kv_type=kv_type)
    sequence = engine.new_sequence()
    engine.evaluate(sequence, ids[:590])
    for i in ids[590:]:
        row = engine.evaluate(sequence, [i])
    engine.close()
    other = open_engine(gemma3, kv_type=kv_type, n_threads=1, n_batch=77)
    assert np.array_equal(other.evaluate(other.new_sequence(), ids), row)
    other.close()
