"""Texts that outgrow the context: keys that move, what is left of the text, and who else sees it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from make_gguf import make_model
from test_models import open_engine, relative_error

from edgellama import LLM
from edgellama.errors import ContextOverflowError, UsageError
from edgellama.runtime.engine import Aborted, Engine
from edgellama.runtime.kvcache import PAGE, Sequence

IDS = [int(i) for i in np.random.default_rng(7).integers(0, 256, 600)]
SHAPES = [
    {},
    {"head_size": 48, "n_dims": 16},
    {"head_size": 80, "n_heads": 4, "n_kv_heads": 1},
    {"arch": "gemma3", "head_size": 256, "window": 72, "n_layers": 7},
    {"rope_freqs": True},
    {"keys": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}},
    {"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
              "rope.scaling.original_context_length": 64}},
]  # fmt: skip


def keys_of(engine: Engine, sequence: Sequence, layer: int) -> np.ndarray:
    """Keys f32 (K, E, positions) of the pages a sequence has for a layer."""
    cache = engine._cache
    g, i = cache._layers[layer]
    group, table = cache.groups[g], sequence.tables[g]
    kv = cache.n_kv_heads
    pages = group.bytes[i * kv : (i + 1) * kv][:, table[table >= 0]]
    n_pages, head = pages.shape[1], engine.config.head_size
    wide = -(-head // 32) * 32
    kind = {"f16": np.float16, "f32": np.float32, "q8_0": np.int8}[engine._kv_type]
    n = wide * PAGE * np.dtype(kind).itemsize
    keys = np.ascontiguousarray(pages[..., :n]).view(kind).reshape(kv, n_pages, wide, PAGE)
    keys = keys.astype(np.float32)
    if kind is np.int8:
        scales = np.ascontiguousarray(pages[..., 2 * n : 2 * n + wide // 32 * PAGE * 4])
        scales = scales.view(np.float32).reshape(kv, n_pages, wide // 32, PAGE)
        keys *= np.repeat(scales, 32, axis=2)
    return keys[:, :, :head].transpose(0, 2, 1, 3).reshape(kv, head, -1)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_moved_keys_are_those_of_the_new_position(tmp_path, shape, kv_type):
    """In the first layer keys depend on nothing but token and position."""
    path = make_model(tmp_path / "m.gguf", **{"format_name": "f32", "n_layers": 2} | shape)
    engine = open_engine(path, kv_type=kv_type, n_ctx=1024)
    sequence = engine.new_sequence()
    engine.evaluate(sequence, IDS)
    n = engine.shift(sequence, 40)
    assert n == (600 // PAGE - 2 + 1) // 2 * PAGE
    assert sequence.tokens == IDS[:64] + IDS[64 + n :]
    fresh = engine.new_sequence()
    engine.evaluate(fresh, sequence.tokens)
    moved, expected = keys_of(engine, sequence, 0), keys_of(engine, fresh, 0)
    n_last = min(moved.shape[2], expected.shape[2]) // PAGE * PAGE - PAGE
    last = slice(-n_last, -PAGE)  # the last page is not full
    bound = {"f32": 1e-5, "f16": 1e-3, "q8_0": 1e-2}[kv_type]
    assert relative_error(moved[..., last], expected[..., last]) < bound
    # It would not pass without the turn.
    if shape.get("n_dims", 32) > 16:
        again = engine.new_sequence()
        engine.evaluate(again, [1] * PAGE + sequence.tokens)
        wrong = keys_of(engine, again, 0)
        assert relative_error(wrong[..., last], moved[..., last]) > 10 * bound
    engine.close()


def test_a_shift_leaves_others_and_what_is_known_alone(tmp_path):
    engine = open_engine(make_model(tmp_path / "m.gguf", "gemma3", window=72), n_ctx=512)
    text = engine.new_sequence()
    engine.evaluate(text, IDS[:500])
    expected = engine.logits(IDS[:503])[500:]
    fork = engine.fork(text)
    n = engine.shift(text, 0)
    assert len(text.tokens) == 500 - n
    engine.evaluate(text, IDS[500:560])
    for i in range(3):
        assert np.array_equal(engine.evaluate(fork, [IDS[500 + i]]), expected[i])
    # What was shifted is not taken for what it says.
    ids = [*text.tokens, 5]
    again = engine.new_sequence()
    row = engine.evaluate(again, ids)
    assert again.n_reused < PAGE
    assert np.array_equal(row, engine.logits(ids)[-1])
    engine.truncate(text, 0)  # and then it is a sequence like any other
    assert np.array_equal(engine.evaluate(text, IDS[:503]), expected[2])
    for sequence in (text, fork, again):
        engine.free(sequence)
    assert not any(count for group in engine._cache.groups for count in group._n_users)
    engine.close()


def test_kept_tokens_come_into_a_window_again(tmp_path):
    """The context is little longer than the window: pages that had been given back are needed."""
    path = make_model(tmp_path / "m.gguf", "gemma3", window=300, n_layers=6)
    engine = open_engine(path, n_ctx=512)
    text = engine.new_sequence()
    engine.evaluate(text, IDS[:512])
    assert (text.tables[1] < 0).any()
    engine.shift(text, 100)
    assert engine._cache.holds(text, len(text.tokens))
    ids = text.tokens.copy()
    assert np.array_equal(engine.evaluate(text, [3]), engine.logits([*ids, 3])[-1])
    engine.close()


def test_an_abort_leaves_the_kept_tokens(tmp_path):
    engine = open_engine(make_model(tmp_path / "m.gguf"), n_ctx=512)
    text = engine.new_sequence()
    engine.evaluate(text, IDS[:512])
    engine._shift.load(engine._pack, engine._target, engine.config.head_size)
    engine.abort()
    with pytest.raises(Aborted):
        engine.shift(text, 40)
    assert text.tokens == IDS[:64]
    assert np.array_equal(engine.evaluate(text, [9]), engine.logits([*IDS[:64], 9])[-1])
    engine.close()


def test_there_may_be_nothing_to_drop(tmp_path):
    engine = open_engine(make_model(tmp_path / "m.gguf"), n_ctx=128)
    text = engine.new_sequence()
    engine.evaluate(text, IDS[:20])
    for n_keep in (0, 20, 1000):
        with pytest.raises(ContextOverflowError, match="nothing to drop"):
            engine.shift(text, n_keep)
    assert text.tokens == IDS[:20]
    engine.close()


# --- LLM ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("draft", [None, "lookup", "itself"])
def test_answers_beyond_the_context(tmp_path: Path, arch: str, draft: str | None) -> None:
    """With guesses or without, the text is the same until the first shift, and goes on after it."""
    path = make_model(tmp_path / "m.gguf", arch, window=40, n_layers=6)
    options = {"max_tokens": 400, "temperature": 0.8, "seed": 2, "ignore_eos": True}
    with LLM(path, n_ctx=128, draft=path if draft == "itself" else draft) as llm:
        plain = llm.generate(IDS[:50], **options)
        assert (plain.finish_reason, len(plain.tokens)) == ("length", 128 - 50 + 1)
        done = llm.generate(IDS[:50], context_shift=True, n_keep=20, **options)
        assert len(done.tokens) == 400
        assert done.tokens[:79] == plain.tokens
        assert llm._last_text[:PAGE] == IDS[:PAGE]
        assert len(llm._last_text) <= 128
        assert llm._last_text[-5:] == done.tokens[-6:-1]
        view = llm.fork()
        view._context_shift = True
        pieces = list(itertools.islice(view.stream(IDS[:100], ignore_eos=True), 200))
        assert len(pieces) == 200
        assert not any(n for group in llm._engine._cache.groups for n in group._n_users)


def test_bad_options(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf")
    with LLM(path, n_ctx=128, context_shift=True) as llm:
        for n_keep in (-1, 65, 1 << 40, 1.5, "3"):
            with pytest.raises(UsageError, match="n_keep is"):
                llm.generate("a", n_keep=n_keep)
        with pytest.raises(UsageError, match="context_shift is"):
            llm.generate("a", context_shift=3)
        with pytest.raises(UsageError, match="one answer at a time"):
            llm.generate("a", n=2, context_shift=True, max_tokens=1)
        assert len(llm.generate("a", n=2, max_tokens=2)) == 2
        off = llm.generate("a", context_shift=False, ignore_eos=True, temperature=0)
        assert off.finish_reason == "length"
        with pytest.raises(ContextOverflowError):
            llm.generate([1] * 129)
    with LLM(path, n_ctx=63) as llm, pytest.raises(UsageError, match="a context of 64"):
        llm.generate("a", context_shift=True)


def test_a_real_text_goes_on(smollm2: Path) -> None:
    """Four contexts long, and still English: its words are likely by a fresh evaluation of its end."""
    with LLM(smollm2, n_ctx=256, context_shift=True) as llm:
        done = llm.generate(
            "Once upon a time there was a lighthouse keeper who", max_tokens=1000, temperature=0.7,
            seed=3, ignore_eos=True, repeat_penalty=1.1,
        )  # fmt: skip
        assert len(done.tokens) == 1000
        tail = done.tokens[-200:]
        logits = llm.logits(tail)[99:-1].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        mean = logits[np.arange(len(logits)), tail[100:]].mean()
        assert mean > -4.5, done.text[-800:]
