"""The benchmark as a user meets it, on a shape that takes a second; what a step costs, by hand."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from make_gguf import make_model

from edgellama import bench, cli, cpu, report
from edgellama.errors import UsageError
from edgellama.gguf import open_gguf, synthetic
from edgellama.gguf.synthetic import SHAPES, Shape
from edgellama.kernels.blocks import FORMATS
from edgellama.models.config import read_config
from edgellama.runtime.ceiling import Ceilings, measure
from edgellama.runtime.cost import Cost, CostModel
from edgellama.runtime.engine import Engine

TINY = ("bench", "--shape", "tiny", "--type", "q4_1", "-r", "2", "-t", "1")
LLAMA_BENCH_KEYS = {
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename",
    "model_type", "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k",
    "type_v", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts",
    "stddev_ts", "samples_ns", "samples_ts",
}  # fmt: skip


@pytest.fixture
def edgellama(monkeypatch, capsys):
    """Run the command in this process, with known ceilings: (status, stdout, stderr)."""
    monkeypatch.setitem(synthetic.SHAPES, "tiny", Shape())
    monkeypatch.setattr(
        bench, "measure", lambda n: Ceilings(n, 10e9, {"f32": 20e9, "i16": 20e9, "i8": 40e9})
    )

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgellama", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


# --- options --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["512"], [512]),
        (["1,2", "8"], [1, 2, 8]),
        (["3-5"], [3, 4, 5]),
        (["128-512+128"], [128, 256, 384, 512]),
        (["128-1000*2,7"], [128, 256, 512, 7]),
        (["0"], [0]),
    ],
)
def test_numbers(texts, expected):
    assert bench.numbers("-p", texts, 0) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "5-3", "1-9+0", "1-9*1", "0-9*2", "1,,2", "1.5", "9999999", "1-2-3"]
)
def test_bad_numbers(text):
    with pytest.raises(UsageError, match="-p"):
        bench.numbers("-p", [text], 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-p", "many"],
        ["-p", "0", "-n", "0"],
        ["-pg", "512"],
        ["-pg", "0,0"],
        ["-r", "0"],
        ["-r", "1,2"],
        ["-t", "0"],
        ["-t", "300"],
        ["-o", "sql"],
        ["-ctk", "f32"],
        ["-ctk", "q3_k", "-ctv", "q3_k"],
        ["--type", "q4_k"],
        ["--shape", "gpt-5"],
        ["--shape", "tiny", "--type", "q9"],
        ["--shape", "tiny", "smollm2-135m"],
        ["--shape", "tiny", "--profile", "-p", "600"],
        ["--shape", "tiny", "--profile", "--plot", "a.png"],
        ["--plot", "a.gif"],
        ["--plot", "no/such/folder/a.png"],
        ["absent-model"],
        ["/dev/null"],
    ],
    ids=" ".join,
)
def test_a_bad_option_is_one_line(edgellama, arguments):
    status, out, err = edgellama("bench", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("edgellama: ")
    assert err.count("\n") == 1


def test_plot_without_matplotlib(edgellama, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    status, out, err = edgellama(*TINY, "--plot", tmp_path / "a.svg")
    assert (status, out) == (2, "")
    assert "edgellama[plot]" in err
    assert err.count("\n") == 1


# --- tables ---------------------------------------------------------------------------------------
def test_json(edgellama):
    status, out, err = edgellama(
        *TINY, "-p", "8", "-n", "4", "-pg", "8,4", "-d", "0,40", "-o", "json"
    )
    assert status == 0
    rows = json.loads(out)
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in rows] == [
        (8, 0, 0), (0, 4, 0), (8, 4, 0), (8, 0, 40), (0, 4, 40), (8, 4, 40),
    ]  # fmt: skip
    for row in rows:
        assert set(row) >= LLAMA_BENCH_KEYS
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == 2
        assert row["avg_ts"] == pytest.approx(np.mean(row["samples_ts"]))
        assert row["stddev_ns"] == pytest.approx(np.std(row["samples_ns"], ddof=1), abs=1)
        assert row["peak_nbytes"] > 1 << 20
        assert row["ceiling_share"] > 0
        assert (row["gmac_s"] is None) == (row["n_prompt"] == 0)
        assert (row["read_gb_s"] is None) == (row["n_gen"] == 0)
    tg = rows[1]
    assert tg["read_gb_s"] == pytest.approx(tg["read_nbytes"] / tg["avg_ns"], rel=0.01)
    assert tg["model_type"] == "llama 1M Q4_1"
    assert tg["backends"] == "CPU"
    assert "ceilings" in err


def test_markdown(edgellama):
    status, out, _ = edgellama(
        *TINY, "-p", "8", "-n", "4", "-d", "32", "-ub", "4", "-ctk", "f32", "-ctv", "f32"
    )
    assert status == 0
    head, rule, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines())
    known = "model, size, params, backend, threads, n_ubatch, type_k, type_v, test, t/s"
    assert head[:10] == known.split(", ")
    assert rule[9].endswith(":")
    assert [row[8] for row in rows] == ["pp8 @ d32", "tg4 @ d32"]
    assert [row[5:8] for row in rows] == [["4", "f32", "f32"]] * 2
    assert all("±" in row[9] for row in rows)
    assert {len(row) for row in rows} == {len(head)}


def test_csv_and_jsonl(edgellama):
    _, out, _ = edgellama(*TINY, "-p", "4-8*2", "-n", "0", "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["n_prompt"] for row in rows] == ["4", "8"]
    assert float(rows[0]["avg_ts"]) > 0
    assert "samples_ns" not in rows[0]
    _, out, _ = edgellama(*TINY, "-p", "0", "-n", "2,3", "-o", "jsonl")
    assert [json.loads(line)["n_gen"] for line in out.splitlines()] == [2, 3]


def test_profile(edgellama):
    status, out, _ = edgellama(*TINY, "-p", "8", "-n", "4", "-d", "33", "--profile", "-o", "json")
    assert status == 0
    rows = json.loads(out)
    assert {row["test"] for row in rows} == {"pp8 @ d33", "tg1 @ d33"}
    for test in ("pp8 @ d33", "tg1 @ d33"):
        kinds = {row["operation"]: row for row in rows if row["test"] == test}
        assert kinds["project[q4_1]"]["count"] == 14
        assert kinds["attend[f16]"]["count"] == 2
        assert kinds["rms_norm"]["gmac_s"] is None
        shares = [kinds[kind]["time_share"] for kind in kinds if kind not in ("the step",)]
        assert sum(shares) == pytest.approx(2.0)  # each kind, and all of them
    status, out, _ = edgellama(*TINY, "-p", "0", "-n", "1", "--profile")
    assert "project[q8_0]" in out


def test_plot(edgellama, tmp_path):
    pytest.importorskip("matplotlib")
    status, out, _ = edgellama(
        *TINY, "-p", "4", "-n", "2", "-d", "0,8", "--plot", tmp_path / "a.svg"
    )
    assert status == 0
    assert len(out.splitlines()) == 6
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


# --- what is behind the figures -------------------------------------------------------------------
def test_ceilings_are_measured():
    ceilings = measure(1)
    for rate in (ceilings.read, *ceilings.macs.values()):
        assert 1e7 < rate < 1e14
    twice = Cost(ceilings.read, {"f32": 0, "i16": ceilings.macs["i16"], "i8": ceilings.macs["i8"]})
    assert ceilings.shortest_s(twice) == pytest.approx(2.0)


def costs_of(path: Path, kv_type: str = "f16") -> CostModel:
    with open_gguf(path) as gguf:
        return CostModel(gguf, read_config(gguf), kv_type)


def test_cost_of_a_step(tmp_path):
    costs = costs_of(make_model(tmp_path / "m.gguf", format_name="q4_1", embedding="q8_0"))
    kv, q, d, f, v = 128, 256, 256, 512, 328
    in_layer = 2 * q * d + 2 * kv * d + 3 * f * d
    vectors = 4 * (5 * d)
    matrices = 2 * (in_layer // 256 * 160) + FORMATS["q8_0"].packed_nbytes(v, d)
    embedded_row = FORMATS["q8_0"].group_nbytes(d)
    page = 2 * 32 * 64 * 2 * 2  # keys and values of 32 positions, 2 heads of 64 f16
    step = costs.step(0, 1)
    assert step.nbytes == matrices + vectors + embedded_row + 2 * page
    assert step.macs == {"i8": 2 * in_layer, "i16": d * v, "f32": 2 * (2 * q * 1)}
    assert costs.step(31, 1).nbytes == step.nbytes
    assert costs.step(32, 1).nbytes == step.nbytes + 2 * page
    prompt = costs.steps(0, 100, 0, 64)
    assert [s.macs["i8"] for s in prompt] == [2 * in_layer * 64, 2 * in_layer * 36]
    seen = 100 * 101 // 2
    assert sum(s.macs["i16"] for s in prompt) == d * v
    assert sum(s.macs["f32"] for s in prompt) == 2 * (2 * q * seen)


def test_cost_within_a_window(tmp_path):
    path = make_model(tmp_path / "m.gguf", "gemma3", n_layers=6, window=40)
    costs = costs_of(path, "f32")
    near, far = costs.step(1000, 1), costs.step(1000 + 32, 1)
    assert far.nbytes - near.nbytes == 2 * 32 * 64 * 4 * 2  # one layer of six looks everywhere


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_valid_models_in_every_format(name):
    for format_name in FORMATS:
        gguf = synthetic.synthetic(name, format_name)
        read_config(gguf)
        for tensor in ("blk.0.attn_q.weight", "blk.1.attn_norm.weight"):
            assert gguf.data(tensor).nbytes == gguf.tensors[tensor].nbytes


def test_synthetic_logits_are_finite_and_repeat():
    def logits() -> np.ndarray:
        with synthetic.SyntheticFile("tiny", Shape(n_layers=4, tied=False), "q4_1") as gguf:
            engine = Engine(gguf, read_config(gguf), n_ctx=64, n_threads=1)
        try:
            return engine.logits(range(40))
        finally:
            engine.close()

    first = logits()
    assert np.isfinite(first).all()
    assert first.std() > 0.1
    assert np.array_equal(first, logits())


def test_peak_memory():
    before = cpu.peak_memory_nbytes()
    block = np.ones(64 << 20, np.uint8)
    after = cpu.peak_memory_nbytes()
    assert before is not None
    assert after is not None
    assert after >= before
    assert after > block.nbytes
    cpu.reset_peak_memory()


def test_doctor_bounds_a_model(edgellama, tmp_path, monkeypatch):
    monkeypatch.setattr("edgellama.runtime.ceiling.measure", bench.measure)
    path = make_model(tmp_path / "m.gguf")
    status, out, _ = edgellama("doctor", path)
    assert status == 0
    rows = {line[:14].strip(): line[14:] for line in out.splitlines()}
    assert rows["reads"].startswith("10.0 GB/s")
    step = costs_of(path).step(0, 1)
    assert rows["decode"].startswith(f"at most {10e9 / step.nbytes:.0f} tokens/s")
    assert rows["prefill"].startswith("at most ")
    assert edgellama("doctor", "absent-model")[0] == 2
