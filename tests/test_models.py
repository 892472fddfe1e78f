"""Every format and family against the oracle; results do not depend on how the work was cut."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from kernel_calls import pack_rows
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


def tolerance(format_name: str) -> float:
    """Float formats differ by f32 sums and the f16 cache; byte activations by their rounding."""
    return 4e-2 if FORMATS[format_name].activation == "i8" else 2e-3


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_format_matches_oracle(tmp_path, arch, format_name):
    more = {"n_layers": 6, "window": 40} if arch == "gemma3" else {}
    path = make_model(tmp_path / "m.gguf", arch, format_name=format_name, **more)
    ids = (IDS * 2)[:80]
    engine = open_engine(path, kv_type="f32")
    with NaiveModel(path) as model:
        assert relative_error(engine.logits(ids), model.logits(ids)) < tolerance(format_name)
    # Given the same rounding of activations, a row is equal but for f32 sums, unless a value of it
    # lies so near the middle of two integers that it goes the other way: of bytes one in a few rows
    # (an error of about 5e-3), of words some in every row (of about 5e-5).
    with NaiveModel(path, rounds=True) as model:
        errors = [relative_error(engine.logits([i]), model.logits([i])) for i in IDS[:5]]
    assert np.median(errors) < (2e-4 if FORMATS[format_name].activation == "i16" else 2e-6)
    engine.close()


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_results_do_not_depend_on_the_cut(tmp_path, arch, format_name):
    """Bit-identical: threads, chunks, batch, cached prefix, company in the step."""
    path = make_model(tmp_path / "m.gguf", arch, format_name=format_name, window=40)
    two_threads = open_engine(path)
    logits = two_threads.logits(IDS)
    assert np.isfinite(logits).all()

    one_by_one = two_threads.new_sequence()
    rows = np.array([two_threads.evaluate(one_by_one, [i]) for i in IDS])
    assert one_by_one.n_reused == 0
    assert np.array_equal(rows, logits)
    two_threads.free(one_by_one)
    cached = two_threads.new_sequence()
    assert np.array_equal(two_threads.evaluate(cached, IDS), logits[-1])
    assert cached.n_reused == len(IDS) - 1
    two_threads.close()

    one_thread = open_engine(path, n_threads=1, n_batch=7)
    assert np.array_equal(one_thread.logits(IDS), logits)
    one_thread.close()

    engine = open_engine(path)
    sevens = engine.new_sequence()
    ends = [engine.evaluate(sevens, IDS[at : at + 7]) for at in range(0, len(IDS), 7)]
    assert np.array_equal(np.array(ends), logits[[6, 13, 20, 27, 34, 41, 44]])
    engine.close()

    engine = open_engine(path)
    first, second, third = (engine.new_sequence() for _ in range(3))
    others = [i ^ 1 for i in IDS]
    engine.evaluate(first, others[:3])
    both = engine.step([(first, others[3:40]), (second, IDS[:20]), (third, others[:1])])
    assert np.array_equal(both[1], logits[19])
    both = engine.step([(third, others[1:2]), (first, others[40:]), (second, IDS[20:])])
    assert np.array_equal(both[2], logits[-1])
    engine.close()


@pytest.mark.parametrize("format_name", FORMATS)
def test_rows_dequantize_to_the_bit(tmp_path, format_name):
    """What the kernels read as a weight is what the gguf package reads."""
    import gguf as reference

    from edgellama.kernels import layout, targets, team
    from edgellama.runtime.packs import load_pack

    if targets.detect().lowering.startswith("generic"):
        pytest.skip("the generic tier has no fused multiply-add: its last bit may differ")
    n_rows, n_cols = 43, 512
    raw = random_blocks(format_name, n_rows, n_cols, np.random.default_rng(1)).reshape(-1)
    kind = reference.GGMLQuantizationType(FORMATS[format_name].type_id)
    expected = reference.quants.dequantize(raw.reshape(n_rows, -1), kind).astype(np.float32)
    operation = f"matmul.embed[{format_name}]"
    names = [operation, f"repack.repack[{format_name}]", *team.NAMES]
    pack = load_pack(names, targets.detect())
    packed = pack_rows(pack, format_name, raw.reshape(n_rows, -1), n_cols)
    out = np.zeros((n_rows, n_cols), np.float32)
    arguments = {
        "out": out.ctypes.data, "out_stride": n_cols * 4, "w": packed.ctypes.data,
        "n_blocks": n_cols // 32, "factor": 1.0,
    }  # fmt: skip
    table = np.zeros((1, layout.RECORD_NBYTES // 8), np.int64)
    team.fill_record(table[0], pack[operation], arguments, tokens=8)
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
        {"tied": False, "format_name": "q4_0", "embedding": "q8_0", "output": "q6_k"},
        {"n_heads": 8, "n_kv_heads": 1, "head_size": 32},
        {"window": 40},
        {"format_name": "f32", "width": 72, "ffn": 172, "head_size": 8, "n_heads": 9,
         "n_kv_heads": 3, "n_vocab": 300},
        {"format_name": "f16", "head_size": 80},
        {"format_name": "f16", "head_size": 48, "n_dims": 16},
        {"format_name": "f32", "rope_freqs": True, "vocabulary": "spm"},
        {"format_name": "f32", "keys": {"rope.scaling.type": "linear",
                                        "rope.scaling.factor": 4.0}},
        {"format_name": "f32", "keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                                        "rope.scaling.original_context_length": 64}},
    ],
)  # fmt: skip
def test_llama_shapes_match_oracle(tmp_path, options):
    path = make_model(tmp_path / "m.gguf", **options)
    engine = open_engine(path)
    ids = (IDS * 3)[:100]
    with NaiveModel(path) as model:
        error = relative_error(engine.logits(ids), model.logits(ids))
    assert error < tolerance(options.get("format_name", "q4_1"))
    engine.close()


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize(
    "options",
    [
        {"n_layers": 7, "window": 40},
        {"n_layers": 6, "window": 512},
        {"keys": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0}},
        {"n_layers": 6, "keys": {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}},
    ],
)
def test_gemma_matches_oracle(tmp_path, kv_type, options):
    """The text is longer than the usual window of 512."""
    path = make_model(tmp_path / "m.gguf", "gemma3", format_name="f16", **options)
    engine = open_engine(path, kv_type=kv_type)
    ids = (IDS * 14)[:600]
    with NaiveModel(path) as model:
        assert relative_error(engine.logits(ids), model.logits(ids)) < 2e-3
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


def test_weights_are_the_same_without_pread(tmp_path, monkeypatch):
    """As on Windows, where the kernels cannot read the file themselves."""
    path = make_model(tmp_path / "m.gguf", tied=False)
    engine = open_engine(path)
    expected = engine.logits(IDS)
    engine.close()
    monkeypatch.setattr("edgellama.runtime.weights.pread_address", lambda: 0)
    engine = open_engine(path)
    assert np.array_equal(engine.logits(IDS), expected)
    engine.close()


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
