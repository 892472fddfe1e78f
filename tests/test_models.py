"""Every format and family against the oracle, and the promise that results do not depend on the cut."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from make_gguf import make_model, random_blocks
from naive import NaiveModel

from edgellama.gguf import open_gguf
from edgellama.kernels.blocks import FORMATS
from edgellama.models.config import read_config
from edgellama.runtime.engine import Engine

IDS = [int(i) for i in np.random.default_rng(3).integers(0, 256, 45)]


def open_engine(path: Path, **options) -> Engine:
    with open_gguf(path) as gguf:
        return Engine(gguf, read_config(gguf), **{"n_ctx": 1024, "n_threads": 2} | options)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.sqrt(((ours - theirs) ** 2).mean() / (theirs**2).mean()))


@pytest.mark.parametrize("format_name", FORMATS)
def test_format_matches_oracle_and_is_bit_identical(tmp_path, format_name):
    path = make_model(tmp_path / "m.gguf", format_name=format_name)
    engine = open_engine(path)
    logits = engine.logits(IDS)
    # Float formats differ by f32 sums and the f16 cache; byte activations by their rounding.
    is_float = format_name in ("f32", "f16", "bf16", "q8_0", "iq4_nl", "iq4_xs")
    assert relative_error(logits, NaiveModel(path).logits(IDS)) < (2e-3 if is_float else 6e-2)

    alone = engine.new_sequence()
    one_by_one = np.array([engine.evaluate(alone, [i]) for i in IDS])
    assert np.array_equal(one_by_one, logits)
    engine.free(alone)
    again = engine.new_sequence()
    assert np.array_equal(engine.evaluate(again, IDS), logits[-1])
    assert again.n_reused == 32
    engine.close()

    with_one_thread = open_engine(path, n_threads=1, n_batch=7)
    assert np.array_equal(with_one_thread.logits(IDS), logits)
    first, second = with_one_thread.new_sequence(), with_one_thread.new_sequence()
    pair = with_one_thread.step([(first, IDS[:20]), (second, IDS)])
    assert np.array_equal(pair, logits[[19, -1]])
    with_one_thread.close()


@pytest.mark.parametrize("format_name", FORMATS)
def test_rows_dequantize_to_the_bit(tmp_path, format_name):
    """What the kernels read as a weight is what the gguf package reads."""
    import gguf as reference

    from edgellama.kernels import layout, targets, team
    from edgellama.kernels.repack import packed_nbytes, repack
    from edgellama.runtime.engine import load_pack

    if targets.detect().lowering.startswith("generic"):
        pytest.skip("the generic tier has no fused multiply-add: its last bit may differ")
    n_rows, n_cols = 43, 512
    raw = random_blocks(format_name, n_rows, n_cols, np.random.default_rng(1)).reshape(-1)
    kind = reference.GGMLQuantizationType(FORMATS[format_name].type_id)
    expected = reference.quants.dequantize(raw.reshape(n_rows, -1), kind).astype(np.float32)
    packed = np.zeros(packed_nbytes(format_name, n_rows, n_cols) + 4096, np.uint8)
    repack(format_name, raw, n_rows, n_cols, packed[:-4096])
    operation = f"matmul.embed[{format_name}]"
    pack = load_pack([operation, *team.NAMES], targets.detect())
    out = np.zeros((n_rows, n_cols), np.float32)
    arguments = {
        "out": out.ctypes.data, "out_stride": n_cols * 4, "w": packed.ctypes.data,
        "n_blocks": n_cols // 32, "factor": int(np.float32(1.0).view(np.int32)),
    }  # fmt: skip
    table = np.zeros((1, layout.RECORD_NBYTES // 8), np.int64)
    table[0, :4] = pack[operation].address, 1, 8, layout.STEP_N_TOKENS
    for i, name in enumerate(pack[operation].arguments, layout.RECORD_ARGUMENTS // 8):
        table[0, i] = arguments[name]
    ids = np.arange(n_rows, dtype=np.int32)
    step = np.zeros(layout.STEP_NBYTES // 8, np.int64)
    step[layout.STEP_N_TOKENS // 8], step[layout.STEP_IDS // 8] = n_rows, ids.ctypes.data
    threads = team.Team(pack, 2, 4096)
    threads.use(table)
    threads.run(step, 0, 1)
    threads.close()
    assert np.array_equal(out, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"tied": False, "biases": True},
        {"n_heads": 8, "n_kv_heads": 1, "head_size": 32},
        {"window": 40},
        {"format_name": "f32", "width": 72, "ffn": 172, "head_size": 8, "n_heads": 9,
         "n_kv_heads": 3, "n_vocab": 300},
        {"format_name": "f16", "head_size": 80},
    ],
)  # fmt: skip
def test_llama_shapes_match_oracle(tmp_path, options):
    path = make_model(tmp_path / "m.gguf", **options)
    engine = open_engine(path)
    ids = (IDS * 3)[:100]
    assert relative_error(engine.logits(ids), NaiveModel(path).logits(ids)) < 4e-2
    engine.close()


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_gemma_matches_oracle(tmp_path, kv_type):
    path = make_model(
        tmp_path / "m.gguf", "gemma3", format_name="f16", n_layers=7, window=40,
        keys={"rope.freq_base": 1000000.0},
    )  # fmt: skip
    engine = open_engine(path, kv_type=kv_type)
    ids = (IDS * 3)[:100]
    assert relative_error(engine.logits(ids), NaiveModel(path).logits(ids)) < 5e-3
    engine.close()


def test_fusion_changes_no_bit(tmp_path):
    for arch in ("llama", "gemma3"):
        path = make_model(tmp_path / f"{arch}.gguf", arch, window=40)
        fused, plain = open_engine(path), open_engine(path, fuse=False)
        assert np.array_equal(fused.logits(IDS), plain.logits(IDS))
        fused.close()
        plain.close()


def test_gemma_beyond_its_window_is_bit_identical(gemma3):
    rng = np.random.default_rng(5)
    ids = [int(i) for i in rng.integers(1000, 200000, 600)]
    engine = open_engine(gemma3)
    sequence = engine.new_sequence()
    whole = engine.evaluate(sequence, ids)
    engine.close()
    other = open_engine(gemma3, n_threads=1, n_batch=77)
    assert np.array_equal(other.evaluate(other.new_sequence(), ids), whole)
    other.close()


def test_two_engines_and_fork(tmp_path):
    path = make_model(tmp_path / "m.gguf")
    a, b = open_engine(path), open_engine(path, n_threads=1)
    expected = a.logits(IDS)
    assert np.array_equal(b.logits(IDS), expected)
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            os._exit(0 if np.array_equal(a.logits(IDS), expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    a.close()
    b.close()


def test_an_aborted_step_changes_nothing(tmp_path):
    from edgellama.runtime.engine import Aborted

    engine = open_engine(make_model(tmp_path / "m.gguf"))
    expected = engine.logits(IDS)
    sequence = engine.new_sequence()
    engine.evaluate(sequence, IDS[:10])
    engine.abort()
    with pytest.raises(Aborted):
        engine.evaluate(sequence, IDS[10:])
    assert sequence.tokens == IDS[:10]
    assert np.array_equal(engine.evaluate(sequence, IDS[10:]), expected[-1])
    engine.close()
