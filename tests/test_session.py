"""Sessions come back bit for bit or are refused in one line; forks and threads do not disturb each other."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from command_line import command
from make_gguf import make_model

from edgellama import LLM
from edgellama.errors import EdgeLlamaError, SessionError, UsageError
from edgellama.runtime import session
from edgellama.runtime.kvcache import PAGE

PROMPT = [int(i) for i in np.random.default_rng(3).integers(0, 256, 300)]
OPTIONS = {"max_tokens": 20, "temperature": 0.8, "seed": 5, "ignore_eos": True}
HEADER = session._HEADER


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    return make_model(folder / "m.gguf", request.param, window=72, n_layers=6)


def saved(model: Path, path: Path, **options) -> list[int]:
    with LLM(model, **{"n_ctx": 512} | options) as llm:
        llm.generate(PROMPT, **OPTIONS)
        llm.save_session(path)
        return llm._last_text


@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
def test_a_session_comes_back_bit_for_bit(model, tmp_path, kv_type):
    path = tmp_path / "s.session"
    options = {"n_ctx": 512, "kv_type": kv_type}
    text = saved(model, path, kv_type=kv_type)
    more = [*text, 1, 2, 3]
    with LLM(model, **options) as llm:
        expected = llm.generate(more, **OPTIONS)
        assert expected.timings.cached_n == 0
    with LLM(model, **options) as llm:
        assert llm.load_session(path) == text
        done = llm.generate(more, **OPTIONS)
        assert (done.text, done.tokens) == (expected.text, expected.tokens)
        assert done.timings.cached_n == len(text) // PAGE * PAGE
        assert not any(n for group in llm._engine._cache.groups for n in group._n_users)
        again = tmp_path / "again.session"
        llm.load_session(path)
        llm.save_session(again)
        assert again.read_bytes() == path.read_bytes()
    assert {*os.listdir(tmp_path)} == {"s.session", "again.session"}


def test_windows_do_not_depend_on_the_context(tmp_path):
    """Saved where the window never slides, loaded where it does."""
    model = make_model(tmp_path / "m.gguf", "gemma3", window=400, n_layers=6)
    text = saved(model, tmp_path / "s", n_ctx=350)
    with LLM(model, n_ctx=2048) as llm:
        assert len(llm._engine._cache.groups) == 2
        expected = llm.generate([*text, 1], **OPTIONS)
    with LLM(model, n_ctx=2048) as llm:
        llm.load_session(tmp_path / "s")
        done = llm.generate([*text, 1], **OPTIONS)
        assert done.tokens == expected.tokens
        assert done.timings.cached_n == len(text) // PAGE * PAGE


def resealed(data: bytes) -> bytes:
    return data[:-32] + hashlib.blake2b(data[:-32], digest_size=32).digest()


def with_field(data: bytes, i: int, value: object) -> bytes:
    fields = [*HEADER.unpack_from(data)]
    fields[i] = value
    return resealed(HEADER.pack(*fields) + data[HEADER.size :])


@pytest.fixture(scope="module")
def llm_and_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    model = make_model(folder / "m.gguf", n_layers=2)
    text = saved(model, folder / "s")
    with LLM(model, n_ctx=512) as llm:
        yield llm, (folder / "s").read_bytes(), len(text)


DAMAGE = {
    "empty": (lambda d: b"", "no session file"),
    "of 3 bytes": (lambda d: d[:3], "no session file"),
    "foreign": (lambda d: b"GGUF" * 100, "no session file"),
    "of another version": (lambda d: with_field(d, 0, b"edgellama session 2\n"), "another version"),
    "another model": (lambda d: with_field(d, 1, b"x" * 16), "another model"),
    "another rotation": (lambda d: with_field(d, 2, b"x" * 16), "rotation"),
    "another kv_type": (lambda d: with_field(d, 3, b"q8_0"), "kv_type"),
    "0 tokens": (lambda d: with_field(d, 4, 0), "claims 0 tokens"),
    "513 tokens": (lambda d: with_field(d, 4, 513), "larger n_ctx"),
    "2^63 tokens": (lambda d: with_field(d, 4, 1 << 63), "larger n_ctx"),
    "fewer tokens": (lambda d: with_field(d, 4, 100), "damaged"),
    "one token more": (lambda d: with_field(d, 4, HEADER.unpack_from(d)[4] + 1), "damaged"),
    "cut in the header": (lambda d: d[: HEADER.size - 1], "no session file"),
    "cut in the tokens": (lambda d: d[: HEADER.size + 9], "damaged"),
    "cut in the pages": (lambda d: d[:-5000], "damaged"),
    "a byte short": (lambda d: d[:-1], "damaged"),
    "a byte long": (lambda d: d + b"\0", "damaged"),
    "an id too large": (
        lambda d: resealed(d[: HEADER.size] + struct.pack("<i", 1 << 30) + d[HEADER.size + 4 :]),
        "token id 1073741824",
    ),
    "a negative id": (
        lambda d: resealed(d[: HEADER.size] + struct.pack("<i", -1) + d[HEADER.size + 4 :]),
        "token id -1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_wrong_is_refused_and_changes_nothing(llm_and_data, tmp_path, kind):
    llm, data, _ = llm_and_data
    damage, message = DAMAGE[kind]
    (tmp_path / "s").write_bytes(damage(data))
    last = [7, 8, 9]
    llm._last_text = last
    known = dict(llm._engine._cache.groups[0]._by_key)
    with pytest.raises(SessionError, match=message) as caught:
        llm.load_session(tmp_path / "s")
    assert "\n" not in str(caught.value)
    assert llm._last_text is last
    assert llm._engine._cache.groups[0]._by_key == known


def test_any_flipped_bit_is_noticed(llm_and_data, tmp_path):
    llm, data, _ = llm_and_data
    rng = np.random.default_rng(1)
    for at in [*range(0, HEADER.size, 3), *rng.integers(0, len(data), 60).tolist(), len(data) - 1]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "s").write_bytes(flipped)
        with pytest.raises(SessionError):
            llm.load_session(tmp_path / "s")


def test_other_models_types_and_paths(llm_and_data, tmp_path):
    llm, data, n_tokens = llm_and_data
    path = tmp_path / "s"
    path.write_bytes(data)
    other = make_model(tmp_path / "m.gguf", n_layers=2, seed=9)
    for options, message in (
        ({"model": other}, "another model"),
        ({"model": llm._engine._source.path, "kv_type": "f32"}, "kv_type"),
        ({"model": llm._engine._source.path, "n_ctx": n_tokens - 1}, "larger n_ctx"),
    ):
        with LLM(**options) as another, pytest.raises(SessionError, match=message):
            another.load_session(path)
    places = [tmp_path, tmp_path / "absent"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        places.append(tmp_path / "fifo")
    llm._last_text = [1, 2, 3]
    for place in places:
        with pytest.raises(SessionError):
            llm.load_session(place)
    for place in (tmp_path, tmp_path / "absent" / "s", *places[2:]):
        with pytest.raises(EdgeLlamaError):
            llm.save_session(place)
    assert {*os.listdir(tmp_path)} <= {"s", "m.gguf", "fifo"}
    with LLM(other, n_ctx=64) as fresh, pytest.raises(UsageError, match="no text"):
        fresh.save_session(path)
    assert path.read_bytes() == data


def test_a_model_that_was_replaced_is_noticed(tmp_path):
    model = make_model(tmp_path / "m.gguf", n_layers=1)
    with LLM(model, n_ctx=64) as llm:
        llm.generate([1, 2, 3], max_tokens=1)
        make_model(tmp_path / "new.gguf", n_layers=1, seed=4)
        shutil.move(tmp_path / "new.gguf", model)
        with pytest.raises(SessionError, match="has changed"):
            llm.save_session(tmp_path / "s")


def test_a_full_cache_refuses_a_session(llm_and_data, tmp_path):
    llm, data, _ = llm_and_data
    (tmp_path / "s").write_bytes(data)
    engine = llm._engine
    others = [engine.new_sequence() for _ in range(2)]
    for i, other in enumerate(others):
        engine.evaluate(other, [i] * 400)
    with pytest.raises(EdgeLlamaError, match="positions of the KV cache are in use"):
        llm.load_session(tmp_path / "s")
    for other in others:
        engine.free(other)
    llm.load_session(tmp_path / "s")


# --- forks and threads ----------------------------------------------------------------------------
def test_forks_share_what_is_evaluated_and_nothing_else(model):
    with LLM(model, n_ctx=512, seed=1) as llm:
        first = llm.generate(PROMPT, max_tokens=8, ignore_eos=True)
        fork = llm.fork(seed=1)
        assert fork._engine is llm._engine
        done = fork.generate(PROMPT, max_tokens=8, ignore_eos=True)
        assert done.tokens == first.tokens
        assert done.timings.cached_n == len(PROMPT) - 1
        assert fork._last_text == llm._last_text
        fork.generate([1, 2, 3], max_tokens=2)
        assert llm._last_text[:3] == PROMPT[:3]
        grandchild = fork.fork()
        fork.close()
        fork.close()
        for call in (lambda: fork.logits([1]), fork.fork, lambda: fork.generate([1])):
            with pytest.raises(UsageError, match="fork is closed"):
                call()
        grandchild.generate([4], max_tokens=1)
        assert llm.generate([1], max_tokens=1).tokens
    with pytest.raises(UsageError, match="the model is closed"):
        grandchild.generate([1])


def test_threads_on_forks_answer_as_if_alone(model):
    prompts = [PROMPT[: 40 + 30 * i] for i in range(4)]
    with LLM(model, n_ctx=512) as llm:
        alone = [llm.generate(prompt, **OPTIONS).tokens for prompt in prompts]
    with LLM(model, n_ctx=512) as llm:
        together: dict[int, list[int]] = {}

        def answer(i: int, view: LLM) -> None:
            for _ in range(3):
                together[i] = view.generate(prompts[i], **OPTIONS).tokens

        views = [llm, llm, llm.fork(), llm.fork()]
        threads = [threading.Thread(target=answer, args=pair) for pair in enumerate(views)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [together[i] for i in range(4)] == alone


def test_run_keeps_a_session(model, tmp_path, capsys):
    path = tmp_path / "s"
    arguments = ["run", str(model), "--raw", "--temp", "0", "-n", "40", "--session", str(path)]
    prompt = "abcdefgh" * 10
    status, first, errors = command(capsys, *arguments, "-p", prompt, "--stats")
    assert status == 0, errors
    assert ", 0 cached" in errors
    status, second, errors = command(capsys, *arguments, "-p", prompt, "--stats")
    assert (status, second) == (0, first)
    assert ", 0 cached" not in errors
    path.write_bytes(path.read_bytes()[:-1])
    status, out, errors = command(capsys, *arguments, "-p", prompt)
    assert (status, out) == (2, "")
    assert errors.startswith("edgellama: ")
    assert errors.count("\n") == 1
