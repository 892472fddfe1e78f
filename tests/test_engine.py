"""Steps that end early, and what is left of them: nothing."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from make_gguf import make_model
from test_models import open_engine

from edgellama.errors import UsageError
from edgellama.kernels import team
from edgellama.runtime.engine import Aborted, Engine

SOON_S = 0.5  # chunks are milliseconds; the machine may be busy


def after(seconds: float, action: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    return timer


def users(engine: Engine) -> list[int]:
    return [n for group in engine._cache.groups for n in group._n_users]


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_launches_of_one_chunk_compute_the_same(tmp_path: Path, monkeypatch, n_threads) -> None:
    engine = open_engine(make_model(tmp_path / "m.gguf"), n_threads=n_threads)
    ids = list(range(60))
    expected = engine.logits(ids)
    launch, n_calls = engine._team._launch, 0

    def counted(*arguments: int) -> int:
        nonlocal n_calls
        n_calls += 1
        return launch(*arguments)

    monkeypatch.setattr(team, "_LAUNCH_S", 0.0)
    monkeypatch.setattr(engine._team, "_launch", counted)
    assert np.array_equal(engine.logits(ids), expected)
    assert n_calls > 100 / n_threads
    row = engine.new_sequence()
    for i in ids[:20]:
        last = engine.evaluate(row, [i])
    assert np.array_equal(last, expected[19])
    engine.close()


def test_aborts_at_any_time_leave_nothing(tmp_path: Path) -> None:
    engine = open_engine(make_model(tmp_path / "m.gguf", n_layers=4), n_ctx=512, n_batch=128)
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 60, 400).tolist()
    sequence = engine.new_sequence()
    first, second = engine.evaluate(sequence, ids[:40]), engine.evaluate(sequence, ids[40:])
    engine.truncate(sequence, 40)
    before, n_aborted = users(engine), 0
    for _ in range(40):
        timer = after(rng.random() * 0.03, engine.abort)
        try:
            assert np.array_equal(engine.evaluate(sequence, ids[40:]), second)
            engine.truncate(sequence, 40)
        except Aborted:
            n_aborted += 1
        timer.join()
        with suppress(Aborted):  # that came too late
            engine.logits([1])
        assert sequence.tokens == ids[:40]
        assert users(engine) == before
    assert n_aborted
    assert np.array_equal(engine.evaluate(sequence, ids[40:]), second)
    assert np.array_equal(engine.evaluate(engine.new_sequence(), ids[:40]), first)
    engine.close()


@pytest.fixture(scope="module")
def loaded(smollm2: Path):
    engine = open_engine(smollm2, n_ctx=2048, n_threads=2)
    yield engine
    engine.close()


LONG = [1 + i % 1000 for i in range(2000)]  # seconds


def test_abort_is_prompt(loaded: Engine) -> None:
    expected = loaded.logits(LONG[:20])[-1]
    sequence, before = loaded.new_sequence(), users(loaded)
    asked: list[float] = []
    after(0.3, lambda: (asked.append(time.perf_counter()), loaded.abort()))
    with pytest.raises(Aborted):
        loaded.evaluate(sequence, LONG)
    assert time.perf_counter() - asked[0] < SOON_S
    assert (sequence.tokens, users(loaded)) == ([], before)
    assert np.array_equal(loaded.evaluate(sequence, LONG[:20]), expected)
    loaded.free(sequence)


def test_ctrl_c_is_prompt(loaded: Engine) -> None:
    expected = loaded.logits(LONG[:20])[-1]
    sequence, before = loaded.new_sequence(), users(loaded)
    asked: list[float] = []
    after(0.3, lambda: (asked.append(time.perf_counter()), _thread.interrupt_main()))
    with pytest.raises(KeyboardInterrupt):
        loaded.evaluate(sequence, LONG)
    assert time.perf_counter() - asked[0] < SOON_S
    assert (sequence.tokens, users(loaded)) == ([], before)
    assert np.array_equal(loaded.evaluate(sequence, LONG[:20]), expected)
    loaded.free(sequence)


def test_close_from_another_thread(smollm2: Path) -> None:
    engine = open_engine(smollm2, n_ctx=2048, n_threads=2)
    closing: list[float] = []

    def close() -> None:
        start = time.perf_counter()
        engine.close()
        closing.append(time.perf_counter() - start)

    timer = after(0.3, close)
    with pytest.raises(Aborted, match="closed"):
        engine.evaluate(engine.new_sequence(), LONG)
    timer.join(10)
    assert closing[0] < SOON_S
    with pytest.raises(UsageError, match="closed"):
        engine.evaluate(engine.new_sequence(), [1])
    with pytest.raises(UsageError, match="closed"):
        engine.truncate(engine.new_sequence(), 0)
    engine.free(engine.new_sequence())
    engine.close()


def test_close_from_a_signal_handler(smollm2: Path) -> None:
    """It comes in the middle of a step of the same thread, which holds the lock."""
    engine = open_engine(smollm2, n_ctx=2048, n_threads=2)
    handler = signal.signal(signal.SIGINT, lambda *_: engine.close())
    try:
        after(0.3, _thread.interrupt_main)
        with pytest.raises(Aborted, match="closed"):
            engine.evaluate(engine.new_sequence(), LONG)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not hasattr(engine, "_weights")
