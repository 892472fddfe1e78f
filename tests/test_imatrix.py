"""Importance matrices: what a model multiplies, against NumPy; files; bad input."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from command_line import command, refused
from make_gguf import make_model

from edgellama.convert.importance import Sums, read_importance, write_importance
from edgellama.errors import ModelFileError
from edgellama.gguf import open_gguf
from edgellama.models.config import read_config
from edgellama.runtime.engine import Engine

TEXT = "the in a er the quick brown fox " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("imatrix") / "m.gguf", format_name="f32")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("imatrix") / "text"
    path.write_text(TEXT)
    return path


def test_every_projection_is_observed_and_nothing_changes(model):
    ids = [5, 9, 200, 7, 7, 31]
    with open_gguf(model) as gguf:
        config = read_config(gguf)
        engine = Engine(gguf, config, n_ctx=64, n_threads=2)
        matrices = {n for n, t in gguf.tensors.items() if len(t.shape) == 2}
    seen = {}
    sequence = engine.new_sequence()
    engine.observe(sequence, ids, lambda name, rows: seen.update({name: rows.copy()}))
    after = engine.evaluate(sequence, [3])
    plain = engine.evaluate(engine.new_sequence(), [*ids, 3])
    engine.close()
    assert (after == plain).all()
    assert seen.keys() == matrices
    assert seen["token_embd.weight"].shape == (1, 256)
    for layer in range(2):
        one, *others = (seen[f"blk.{layer}.attn_{x}.weight"] for x in "qkv")
        assert one.shape == (6, 256)
        assert all((one == other).all() for other in others)
        assert seen[f"blk.{layer}.ffn_down.weight"].shape == (6, 512)


def test_the_first_input_is_the_papers(model):
    """RMS norm of the embedding, by NumPy."""
    with open_gguf(model) as gguf:
        engine = Engine(gguf, read_config(gguf), n_ctx=64, n_threads=1)
        embedding = naive.dequantize(gguf.data("token_embd.weight"), 0, 328, 256)
        weight = gguf.data("blk.0.attn_norm.weight").view(np.float32)
    seen = {}
    ids = [1, 2, 3, 250]
    engine.observe(engine.new_sequence(), ids, lambda n, rows: seen.setdefault(n, rows.copy()))
    engine.close()
    x = embedding[ids].astype(np.float64)
    expected = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(seen["blk.0.attn_q.weight"], expected, rtol=2e-5, atol=1e-6)


def test_collected_on_a_text(capsys, model, text, tmp_path):
    out = tmp_path / "i.gguf"
    status, stdout, stderr = command(
        capsys, "imatrix", model, "-f", text, "-o", out, "-c", 64, "--chunks", 3
    )
    assert (status, stdout, "3 chunks of 64 tokens" in stderr) == (0, "", True), stderr
    importance = read_importance(out)
    with open_gguf(model) as gguf:
        layers = {n for n, t in gguf.tensors.items() if n.startswith("blk") and len(t.shape) == 2}
        assert importance.keys() == layers
        assert all(len(v) == gguf.tensors[n].shape[0] for n, v in importance.items())
    # The norm makes the mean square of a column that of its weight, about.
    with open_gguf(model) as gguf:
        weight = gguf.data("blk.0.attn_norm.weight").view(np.float32)
    ratio = importance["blk.0.attn_q.weight"].sum() / np.square(weight).sum()
    assert 0.8 < ratio < 1.2
    with open_gguf(out) as file:
        assert file.metadata["general.type"] == "imatrix"
        assert file.metadata["imatrix.datasets"] == ["text"]
        assert file.metadata["imatrix.chunk_count"] == 3
        counts = file.data("blk.0.attn_q.weight.counts").view(np.float32)
        assert counts == [3 * 64]
    status, _, stderr = command(
        capsys, "quantize", model, tmp_path / "q.gguf", "q4_0", "--imatrix", out
    )
    assert status == 0, stderr
    with open_gguf(tmp_path / "q.gguf") as file:
        assert file.metadata["quantize.imatrix.entries_count"] == len(importance)
    plain = tmp_path / "plain.gguf"
    assert command(capsys, "quantize", model, plain, "q4_0")[0] == 0
    with open_gguf(tmp_path / "q.gguf") as a, open_gguf(plain) as b:
        assert (a.data("blk.0.attn_q.weight") != b.data("blk.0.attn_q.weight")).any()


def test_bad_input(capsys, model, text, tmp_path):
    out = tmp_path / "i.gguf"
    short = tmp_path / "short"
    short.write_text("the")
    said = refused(capsys, "imatrix", model, "-f", short, "-o", out)
    assert "a chunk needs 512: give more text, or a smaller -c" in said
    short.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 at byte 0" in refused(capsys, "imatrix", model, "-f", short, "-o", out)
    missing = tmp_path / "missing"
    assert "cannot be read" in refused(capsys, "imatrix", model, "-f", missing, "-o", out)
    out.write_text("mine")
    assert "exists" in refused(capsys, "imatrix", model, "-f", text, "-o", out)
    assert out.read_text() == "mine"
    wrong = tmp_path / "wrong.gguf"
    write_importance(
        wrong, {"blk.0.attn_q.weight": Sums(np.ones(7), 1)}, dataset="", n_chunks=1, chunk_size=1
    )
    said = refused(capsys, "quantize", model, tmp_path / "q.gguf", "q4_0", "--imatrix", wrong)
    assert "7 columns for blk.0.attn_q.weight, which has 256; it is of another model" in said
    said = refused(capsys, "quantize", model, tmp_path / "q.gguf", "q4_0", "--imatrix", model)
    assert "holds no importance matrix" in said
    assert not (tmp_path / "q.gguf").exists()


def test_the_older_form(tmp_path):
    values = np.array([2.0, 4.0, 6.0], "<f4")
    name = b"blk.0.attn_q.weight"
    data = b"\x01\0\0\0" + len(name).to_bytes(4, "little") + name
    data += (2).to_bytes(4, "little") + (3).to_bytes(4, "little") + values.tobytes()
    path = tmp_path / "i.dat"
    path.write_bytes(data)
    assert list(read_importance(path)[name.decode()]) == [1.0, 2.0, 3.0]
    path.write_bytes(data[:-4])
    with pytest.raises(ModelFileError, match="is cut off in 'blk"):
        read_importance(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelFileError, match="is no importance matrix, or damaged"):
        read_importance(path)
