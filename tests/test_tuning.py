"""How many threads a step runs on: candidates, the choice, and what is remembered."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from make_gguf import make_model
from test_models import open_engine

from edgellama import cpu
from edgellama.cli import doctor
from edgellama.runtime.tuning import Threads, Tuning


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with three numbers of threads to choose from; kernels stay where they are."""
    monkeypatch.setattr("edgellama.runtime.tuning.home", lambda: tmp_path)
    monkeypatch.setattr("edgellama.runtime.engine.thread_counts", lambda: [1, 2, 3])
    monkeypatch.setattr(cpu, "n_usable_cores", lambda: 2)
    return [1, 2, 3]


@pytest.mark.parametrize(
    ("seconds", "choice"),
    [
        ({1: 2.0, 2: 1.0, 3: 0.8}, 3),
        ({1: 2.0, 2: 1.0, 3: 0.95}, 2),  # not clearly better than the default
        ({1: 0.5, 2: 1.0, 3: 2.0}, 1),
    ],
)
def test_the_fastest(tmp_path: Path, counts: list[int], seconds, choice: int) -> None:
    make_model(tmp_path / "m.gguf")
    noise = iter([5.0, 1.0, 1.0, 1.0] * 3)
    tuning = Tuning(engine_program(tmp_path), "tier", counts)
    assert tuning._fastest(lambda n: seconds[n] * next(noise)) == choice


def engine_program(folder: Path):
    from edgellama.gguf import open_gguf
    from edgellama.models.config import read_config
    from edgellama.runtime.lowering import compile_program

    with open_gguf(folder / "m.gguf") as gguf:
        return compile_program(read_config(gguf), gguf.tensors, "f16")


def test_measured_once_and_the_same_results(tmp_path: Path, counts, monkeypatch) -> None:
    path = make_model(tmp_path / "m.gguf")
    ids = list(range(30))
    expected = open_engine(path, n_threads=1).logits(ids)
    monkeypatch.setattr(cpu, "busy_s", lambda: None)
    engine = open_engine(path, n_threads=None)
    assert engine.n_threads == 2
    assert np.array_equal(engine.logits(ids), expected)  # measures first
    known = json.loads((tmp_path / "tuning.json").read_text())
    assert list(known.values()) == [engine._threads._asdict()]
    assert np.array_equal(engine.logits(ids), expected)
    for threads in (Threads(1, 3), Threads(3, 1), Threads(2, 2)):
        (key,) = known
        (tmp_path / "tuning.json").write_text(json.dumps({key: threads._asdict()}))
        again = open_engine(path, n_threads=None)
        assert (again._threads, again.n_threads) == (threads, max(threads))
        assert np.array_equal(again.logits(ids), expected)
        assert np.array_equal(again.evaluate(again.new_sequence(), [0]), expected[0])
        assert not any(again._cache.groups[0]._n_users[2:])
        again.close()
    engine.close()


def test_on_a_busy_machine_nothing_is_remembered(tmp_path: Path, counts, monkeypatch) -> None:
    busy = itertools.count(5, 1000)
    monkeypatch.setattr(cpu, "busy_s", lambda: float(next(busy)))
    engine = open_engine(make_model(tmp_path / "m.gguf"), n_threads=None)
    engine.logits([1, 2])
    assert engine._threads == (2, 2)
    assert not (tmp_path / "tuning.json").exists()
    engine.close()


def test_a_given_number_always_wins(tmp_path: Path, counts) -> None:
    engine = open_engine(make_model(tmp_path / "m.gguf"), n_threads=2)
    assert engine.logits([1]).any()
    assert engine._threads == (2, 2)
    assert not (tmp_path / "tuning.json").exists()
    engine.close()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '{"KEY": 3}', '{"KEY": {"decode": 2}}', '{"KEY": {"decode": 99, "prefill": 2}}',
     '{"KEY": {"decode": "2", "prefill": 2}}', '{"KEY": {"decode": [], "prefill": 2}}', "\x00" * 100],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(tmp_path: Path, counts, text: str) -> None:
    make_model(tmp_path / "m.gguf")
    tuning = Tuning(engine_program(tmp_path), "tier", counts)
    path = tmp_path / "tuning.json"
    path.write_text(text.replace("KEY", tuning._key))
    assert tuning.recall() is None
    tuning._remember(Threads(1, 2))
    assert tuning.recall() == (1, 2)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("tuning")] == ["tuning.json"]


def test_it_is_kept_by_machine_and_shape(tmp_path: Path, counts, monkeypatch) -> None:
    make_model(tmp_path / "m.gguf")
    program = engine_program(tmp_path)
    Tuning(program, "tier", counts)._remember(Threads(1, 2))
    assert Tuning(program, "other", counts).recall() is None
    make_model(tmp_path / "m.gguf", n_layers=3)
    assert Tuning(engine_program(tmp_path), "tier", counts).recall() is None
    monkeypatch.setattr(cpu, "cpu_name", lambda: "another")
    assert Tuning(program, "tier", counts).recall() is None


def test_a_folder_that_cannot_be_written(tmp_path: Path, counts, monkeypatch) -> None:
    monkeypatch.setattr("edgellama.runtime.tuning.home", lambda: tmp_path / "absent")
    make_model(tmp_path / "m.gguf")
    tuning = Tuning(engine_program(tmp_path), "tier", counts)
    tuning._remember(Threads(1, 2))
    assert tuning.recall() is None


@pytest.mark.parametrize(
    ("usable", "allowed", "fast", "quota", "expected"),
    [
        (2, 2, None, None, [1, 2]),
        (1, 1, None, None, [1]),
        (1, 2, None, None, [1, 2]),  # two siblings of one core
        (8, 16, None, None, [4, 8, 16]),
        (8, 8, 4, None, [4, 8]),  # four of them small
        (14, 20, 6, None, [6, 7, 14, 20]),
        (3, 16, None, 2.5, [1, 3]),
        (400, 800, None, None, [200, 256]),
    ],
)
def test_candidates(monkeypatch, usable, allowed, fast, quota, expected) -> None:
    monkeypatch.setattr(cpu, "n_usable_cores", lambda: usable)
    monkeypatch.setattr(cpu, "allowed_cpus", lambda: list(range(allowed)))
    monkeypatch.setattr(cpu, "n_fast_cores", lambda: fast)
    monkeypatch.setattr(cpu, "cgroup_quota", lambda: quota)
    assert cpu.thread_counts() == expected


def test_busy_time_counts_our_own() -> None:
    before = cpu.busy_s()
    if before is None:
        pytest.skip("the system does not tell")
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = cpu.busy_s()
    assert after is not None
    assert after - before > 0.2


def test_warmup_measures_and_doctor_tells(tmp_path: Path, counts, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "busy_s", lambda: None)
    monkeypatch.setattr(cpu, "thread_counts", lambda: counts)
    path = str(make_model(tmp_path / "m.gguf"))

    def its_threads() -> str:
        done = CliRunner().invoke(doctor.doctor, [path])
        (row,) = (line for line in done.stdout.splitlines() if line.startswith("its threads"))
        return row[14:]

    assert "first used" in its_threads()
    done = CliRunner().invoke(doctor.warmup, [path])
    assert done.exit_code == 0
    chosen = done.stdout.splitlines()[-1].removeprefix("threads: ")
    assert its_threads() == chosen
