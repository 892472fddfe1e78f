"""Guessing tokens ahead changes no token; what the cache holds stays what its tokens say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from make_gguf import make_model

from edgellama import llm as llm_module
from edgellama.errors import ContextOverflowError, ModelFileError, UsageError
from edgellama.generation import Completion
from edgellama.gguf import open_gguf
from edgellama.llm import LLM
from edgellama.models.config import read_config
from edgellama.runtime.engine import Aborted, Engine
from edgellama.runtime.kvcache import PAGE, KVCache
from edgellama.runtime.kvcache import Sequence as CacheSequence
from edgellama.sampling import Sampler, SamplingOptions
from edgellama.speculate import N_MOST, DraftModel, Lookup, Pace, Steps, check_same_vocabulary

GREEDY, SAMPLED = {"temperature": 0.0}, {"temperature": 0.8, "seed": 4}
NO_SAMPLER: Any = None


def answer(llm: LLM, prompt: Any, **options: Any) -> Completion:
    done = llm.generate(prompt, **options)
    assert isinstance(done, Completion)
    assert done.timings.accepted_n <= done.timings.drafted_n
    return done


def same(one: Completion, other: Completion) -> bool:
    return (one.text, one.tokens, one.finish_reason) == (
        other.text, other.tokens, other.finish_reason,
    )  # fmt: skip


class Hostile:
    """Always guesses as much as it may, at random."""

    def __init__(self, n_vocab: int) -> None:
        self.rng, self.n_vocab = np.random.default_rng(0), n_vocab

    def propose(self, text: Any, n_most: int, sampler: Any) -> list[int]:
        return self.rng.integers(0, self.n_vocab, min(n_most, N_MOST)).tolist()

    def learn(self, n_drafted: int, n_accepted: int) -> None: ...

    def close(self) -> None: ...


def all_free(llm: LLM) -> bool:
    return not any(llm._engine._cache._n_users)


# --- a real model ---------------------------------------------------------------------------------
PROMPTS = {
    "copy": "Copy the following text and change 'library' to 'museum':\n\nThe library on Mill Street was "
    "opened in 1931 by the mayor, Ada Penrose, who had collected the money for it herself.",
    "free": "Why do cats sleep so much?",
}


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Iterator[dict[str | None, LLM]]:
    """The same model without guesses, with its own text and with itself as draft model."""
    with LLM(smollm2, n_ctx=128) as plain, LLM(smollm2, n_ctx=128, draft="lookup") as lookup:
        with LLM(smollm2, n_ctx=128, draft=plain) as itself:
            yield {None: plain, "lookup": lookup, "itself": itself}


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_real_texts_are_the_same(
    real: dict[str | None, LLM], prompt: str, options: dict[str, Any]
) -> None:
    ids = real[None].render_chat([{"role": "user", "content": PROMPTS[prompt]}])
    plain = answer(real[None], ids, max_tokens=50, **options)
    assert plain.timings.drafted_n == 0
    guessed = answer(real["lookup"], ids, max_tokens=50, **options)
    assert same(guessed, plain)
    itself = answer(real["itself"], ids, max_tokens=50, **options)
    assert same(itself, plain)
    # The draft draws from the same logits with the same random stream.
    assert itself.timings.accepted_n == itself.timings.drafted_n > len(plain.tokens) // 2
    if prompt == "copy" and options is GREEDY:
        assert guessed.timings.accepted_n > len(plain.tokens) // 2
    assert all(all_free(llm) for llm in real.values())


def test_real_stops_are_the_same(real: dict[str | None, LLM]) -> None:
    plain, lookup = real[None], real["lookup"]
    ids = plain.tokenize("one two three one two three one two three one two three")
    whole = answer(plain, ids, max_tokens=40, **GREEDY)
    for n in (1, 2, 7, 20):
        short = answer(lookup, ids, max_tokens=n, **GREEDY)
        assert (short.tokens, short.finish_reason) == (whole.tokens[:n], "length")
    for stop in (whole.text[11:14], whole.text[30:36]):
        options = {"max_tokens": 40, "stop": [stop], **GREEDY}
        guessed = answer(lookup, ids, **options)
        assert same(guessed, answer(plain, ids, **options))
        assert guessed.finish_reason == "stop"
        assert guessed.timings.accepted_n > 0
    end = answer(lookup, ids, **GREEDY)  # the context's
    assert same(end, answer(plain, ids, **GREEDY))
    assert end.timings.accepted_n > 40


# --- made models ----------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["llama", "gemma3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of different weights and one vocabulary."""
    folder = tmp_path_factory.mktemp(request.param)
    return [
        make_model(folder / f"{seed}.gguf", request.param, window=40, seed=seed) for seed in (1, 2)
    ]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, {"temperature": 1.5, "seed": 1}])
def test_drafts_change_nothing(made: list[Path], options: dict[str, Any]) -> None:
    prompt = list(b"abcabcabc xyz")
    kinds: list[Any] = [None, "lookup", made[0], made[1]]
    done = []
    for draft in kinds:
        with LLM(made[0], n_ctx=128, draft=draft) as llm:
            done.append(answer(llm, prompt, **options))
            assert all_free(llm)
    with LLM(made[0], n_ctx=128) as llm:
        llm._new_drafter = lambda: Hostile(256)  # type: ignore[method-assign]
        done.append(answer(llm, prompt, **options))
        assert done[-1].timings.drafted_n > 100
    assert all(same(each, done[0]) for each in done)
    assert done[2].timings.drafted_n == done[2].timings.accepted_n > 10


def test_a_draft_with_a_smaller_context(made: list[Path]) -> None:
    with LLM(made[0], n_ctx=40) as small, LLM(made[0], n_ctx=96, draft=small) as llm:
        with LLM(made[0], n_ctx=96) as plain:
            guessed = answer(llm, b"abcd" * 6, **SAMPLED)
            assert same(guessed, answer(plain, b"abcd" * 6, **SAMPLED))
        assert 0 < guessed.timings.drafted_n < 20
        long = answer(llm, b"abcd" * 12, max_tokens=5, **SAMPLED)
        assert long.timings.drafted_n == 0
        assert all_free(llm)
        assert all_free(small)


def test_guesses_need_no_room_that_is_not_there(made: list[Path]) -> None:
    """The cache is full but for one page; guesses would need a second."""
    with LLM(made[0], n_ctx=2 * PAGE) as llm:
        plain = answer(llm, b"abc", max_tokens=20, **SAMPLED)
        llm._new_drafter = lambda: Hostile(256)  # type: ignore[method-assign]
        engine = llm._engine
        others = [engine.new_sequence() for _ in range(3)]
        for i, other in enumerate(others):
            engine.evaluate(other, [i])
        pieces = llm.stream(b"abc", **SAMPLED)
        tokens = [
            token for _, piece in zip(range(20), pieces, strict=False) for token in piece.tokens
        ]
        assert tokens == plain.tokens
        pieces.close()


def test_ctrl_c_leaves_the_model_usable(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(made[0], n_ctx=128, draft=made[1]) as llm:
        expected = answer(llm, b"abcabc", max_tokens=30, **GREEDY)
        draft = llm._draft
        assert draft is not None
        for engine in (llm._engine, draft._engine):
            run, countdown = engine._run, iter([0] * 9 + [1])

            def interrupted(first: int, last: int, run: Any = run, countdown: Any = countdown):
                if next(countdown, 0):
                    raise KeyboardInterrupt
                run(first, last)

            with monkeypatch.context() as patch:
                patch.setattr(engine, "_run", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    llm.generate(b"abcabc", max_tokens=30, **GREEDY)
            assert all_free(llm)
            assert all_free(draft)
        assert same(answer(llm, b"abcabc", max_tokens=30, **GREEDY), expected)


def test_close(made: list[Path]) -> None:
    yours = LLM(made[1], n_ctx=64)
    with LLM(made[0], n_ctx=64, draft=yours) as llm:
        stream = llm.stream(b"abcabc", **GREEDY)
        next(stream)
    stream.close()
    assert len(answer(yours, b"a", max_tokens=3).tokens) <= 3
    yours.close()
    with LLM(made[0], n_ctx=64, draft=made[1]) as llm:
        assert llm._draft is not None
        draft = llm._draft._engine
    with pytest.raises(UsageError, match="closed"):
        draft.evaluate(draft.new_sequence(), [1])


def test_drafts_that_do_not_fit(
    made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    close = LLM.close
    monkeypatch.setattr(llm_module.LLM, "close", lambda llm: (closed.append(llm), close(llm))[0])
    other = make_model(tmp_path / "other.gguf", n_vocab=320)
    with pytest.raises(UsageError, match=r"other has 320 tokens, 1 \d+"):
        LLM(made[0], n_ctx=64, draft=other)
    assert [llm.config.name for llm in closed] == ["1", "other"]
    with pytest.raises(ModelFileError):
        LLM(made[0], n_ctx=64, draft=tmp_path / "nowhere.gguf")
    assert len(closed) == 3


def test_vocabularies() -> None:
    check_same_vocabulary("big", ["a", "b"], "small", ["a", "b"])
    with pytest.raises(UsageError, match="token 1 is 'c' in small, 'b' in big"):
        check_same_vocabulary("big", ["a", "b"], "small", ["a", "c"])


# --- guesses --------------------------------------------------------------------------------------
def test_lookup_is_what_a_search_finds() -> None:
    rng = np.random.default_rng(1)
    n_found = 0
    for alphabet in (1, 2, 5, 40):
        lookup, text = Lookup(), list[int]()
        for _ in range(60):
            text += rng.integers(0, alphabet, rng.integers(1, 6)).tolist()
            guess = lookup.propose(text, 4, NO_SAMPLER)
            for n in (3, 2):
                ends = [e for e in range(n, len(text)) if text[e - n : e] == text[-n:]]
                if len(text) > n and ends:
                    naive = text[ends[-1] :]
                    assert guess == (naive * 4)[: len(guess)]
                    n_found += len(guess)
                    break
            else:
                assert guess == []
    assert n_found > 300


def test_lookup_stops_before_an_end() -> None:
    text = [1, 2, 3, 4, 9, 5, 1, 2]
    assert Lookup().propose(text, 3, NO_SAMPLER) == [3, 4]
    assert Lookup({4}).propose(text, 3, NO_SAMPLER) == [3]
    assert Lookup({3}).propose(text, 3, NO_SAMPLER) == []
    assert Lookup().propose([], 3, NO_SAMPLER) == Lookup().propose([7], 3, NO_SAMPLER) == []


def test_pace() -> None:
    pace = Pace(0.5)
    assert pace.choose() == 2
    for _ in range(40):
        pace.learn(pace.choose(), pace.choose())
    assert pace.choose() == N_MOST
    n_tries = 0
    for _ in range(200):
        n = pace.choose()
        n_tries += n > 0
        if n:
            pace.learn(n, 0)
    assert pace.choose() <= 1
    assert 20 < n_tries < 60  # it tries again now and then


def test_steps_ask_for_no_more_than_is_wanted() -> None:
    """The tokens that are evaluated, step by step."""
    steps_taken: list[list[int]] = []

    def evaluate_each(sequence: Any, ids: list[int]) -> np.ndarray:
        steps_taken.append(list(ids))
        sequence.tokens += ids
        return np.array([[i] for i in ids])

    engine: Any = SimpleNamespace(
        new_sequence=lambda: SimpleNamespace(tokens=[], n_reused=0),
        evaluate=lambda sequence, ids: evaluate_each(sequence, ids)[-1],
        evaluate_each=evaluate_each,
        truncate=lambda sequence, n: sequence.tokens.__delitem__(slice(n, None)),
    )
    steps = Steps(engine, NO_SAMPLER, Lookup())
    assert steps.begin([1, 2, 3, 4, 5, 1]) == [1]
    assert steps.follow(2, 9) == [2]  # 3, 4 guessed
    assert steps.follow(3, 8) == [3]
    assert steps.follow(7, 7) == [7]  # not 4
    assert steps.follow(1, 6) == [1]
    assert steps.follow(2, 1) == [2]
    assert steps.follow(3, 0) == [3]
    assert steps_taken == [[1, 2, 3, 4, 5, 1], [2, 3, 4], [7], [1], [2, 3]]
    assert (steps.n_drafted, steps.n_accepted) == (3, 2)


# --- the cache ------------------------------------------------------------------------------------
class CheckedCache:
    """A cache whose "keys and values" say which tokens they are of: every read can be checked."""

    def __init__(self) -> None:
        self.cache = KVCache(n_layers=2, n_kv_heads=1, head_size=32, n_pages=6, kv_type="f32")
        self.content: dict[bytes, list[int]] = {}

    def slots(self, page: int) -> np.ndarray:
        return self.cache._bytes[1, page].view(np.int64)

    def append(self, sequence: CacheSequence, ids: list[int]) -> bool:
        """Evaluate tokens, or, where there is no room, change nothing and say so."""
        before = len(sequence.tokens)
        skip = 0 if sequence.tokens else self.cache.reuse_prefix(sequence, ids)
        ids = ids[skip:]
        try:
            self.cache.reserve(sequence, len(sequence.tokens) + len(ids))
        except ContextOverflowError:
            self.cache.truncate(sequence, before)
            return False
        text = [*sequence.tokens, *ids]
        for i in range(len(sequence.tokens), len(text)):
            page = int(sequence.table[i // PAGE])
            assert page not in self.cache._key_of, "what is known was written"
            self.slots(page)[i % PAGE] = hash(tuple(text[: i + 1]))
        self.cache.commit(sequence, ids)
        for i, key in enumerate(sequence.keys):
            ends = range(i * PAGE + 1, (i + 1) * PAGE + 1)
            self.content[key] = [hash(tuple(text[:end])) for end in ends]
        return True

    def check(self, sequences: list[CacheSequence]) -> None:
        cache = self.cache
        used = [page for sequence in sequences for page in sequence.pages]
        assert [used.count(page) for page in range(cache.n_pages)] == cache._n_users
        assert sorted({*used, *cache._free, *cache._idle}) == list(range(cache.n_pages))
        assert len({*used}) + len(cache._free) + len(cache._idle) == cache.n_pages
        assert {page: key for key, page in cache._by_key.items()} == cache._key_of
        assert {*cache._idle} <= {*cache._key_of}
        for page, key in cache._key_of.items():
            assert self.slots(page)[:PAGE].tolist() == self.content[key]
        for sequence in sequences:
            n = len(sequence.tokens)
            assert len(sequence.pages) == -(-n // PAGE)
            assert len(sequence.keys) == n // PAGE
            assert sequence.table[: len(sequence.pages)].tolist() == sequence.pages
            for i in range(n):
                value = self.slots(sequence.pages[i // PAGE])[i % PAGE]
                assert value == hash(tuple(sequence.tokens[: i + 1]))
            if n % PAGE:  # the next token goes there
                assert cache._n_users[sequence.pages[-1]] == 1
                assert sequence.pages[-1] not in cache._key_of


@pytest.mark.parametrize("seed", range(12))
def test_random_cuts_and_growth_keep_the_cache_true(seed: int) -> None:
    rng = np.random.default_rng(seed)
    checked = CheckedCache()
    sequences = [CacheSequence(4 * PAGE) for _ in range(3)]
    n_cut = n_shared = n_full = 0
    for _ in range(150):
        sequence = sequences[rng.integers(3)]
        kind = rng.choice(["anew", "append", "cut back", "cut"], p=[0.25, 0.35, 0.25, 0.15])
        if kind == "anew":
            checked.cache.truncate(sequence, 0)
        n_before = len(sequence.tokens)
        if kind in ("anew", "append"):
            n = int(rng.integers(1, 4 * PAGE if kind == "anew" else 9))
            ids = [0] * min(n, 4 * PAGE - n_before)
            if rng.random() < 0.3 and ids:
                ids[rng.integers(len(ids))] = 1
            n_full += not checked.append(sequence, ids)
            n_shared += max(checked.cache._n_users) > 1
        else:
            most = min(n_before, 7) if kind == "cut back" else n_before
            keep = n_before - int(rng.integers(0, most + 1))
            try:
                checked.cache.truncate(sequence, keep)
                n_cut += keep % PAGE > 0
            except ContextOverflowError:
                keep = n_before
            assert len(sequence.tokens) == keep
        checked.check(sequences)
    assert n_cut > 10
    assert n_shared > 5
    assert n_full > 0


def test_a_shared_page_is_copied_and_a_private_one_is_not() -> None:
    checked = CheckedCache()
    first, second = CacheSequence(4 * PAGE), CacheSequence(4 * PAGE)
    checked.append(first, [0] * (PAGE + 1))
    checked.append(second, [0] * (PAGE + 3))
    assert first.pages[0] == second.pages[0]
    shared = first.pages[0]
    checked.cache.truncate(second, PAGE - 3)
    assert second.pages[0] != shared == first.pages[0]
    checked.append(second, [1])
    checked.check([first, second])
    checked.cache.truncate(first, PAGE - 3)
    assert first.pages == [shared]
    checked.append(first, [2] * 3)
    checked.check([first, second])


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_random_cuts_against_a_fresh_engine(tmp_path: Path, arch: str) -> None:
    path = make_model(tmp_path / "m.gguf", arch, window=40)
    with open_gguf(path) as gguf:
        engine, fresh = (
            Engine(gguf, read_config(gguf), n_ctx=96, n_batch=48, n_threads=2) for _ in range(2)
        )
    rng = np.random.default_rng(7)
    sequences = [engine.new_sequence() for _ in range(2)]
    for _ in range(60):
        sequence = sequences[rng.integers(2)]
        n = int(rng.integers(1, 20))
        if len(sequence.tokens) + n > 96 or rng.random() < 0.3:
            engine.truncate(sequence, int(rng.integers(0, len(sequence.tokens) + 1)))
            continue
        ids = rng.integers(0, 3, n).tolist()
        if rng.random() < 0.2:
            engine.abort()
            with pytest.raises(Aborted):
                engine.evaluate_each(sequence, ids)
        expected = fresh.logits([*sequence.tokens, *ids])[-n:]
        if rng.random() < 0.5:
            assert np.array_equal(engine.evaluate_each(sequence, ids), expected)
        else:
            assert np.array_equal(engine.evaluate(sequence, ids), expected[-1])
    engine.close()
    fresh.close()


def test_an_abort_in_a_later_chunk_forgets_what_the_first_made_known(tmp_path: Path) -> None:
    with open_gguf(make_model(tmp_path / "m.gguf")) as gguf:
        engine = Engine(gguf, read_config(gguf), n_ctx=128, n_batch=64, n_threads=1)
    ids = [1] * 10 + [2] * 100
    expected = engine.logits(ids)[-1]
    sequence = engine.new_sequence()
    engine.evaluate(sequence, ids[:10])
    run, calls = engine._run, iter([0, 1])

    def stop_second(first: int, last: int) -> None:
        if next(calls):
            raise KeyboardInterrupt
        run(first, last)

    engine._run = stop_second  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.evaluate(sequence, ids[10:])
    engine._run = run  # type: ignore[method-assign]
    engine.evaluate(sequence, [3] * 40)
    other = engine.new_sequence()
    assert np.array_equal(engine.evaluate(other, ids), expected)
    engine.close()


def test_a_draft_model_keeps_its_place() -> None:
    """Its sequence is the text and the guesses, whatever was accepted or skipped in between."""
    engine: Any = SimpleNamespace(n_ctx=1000, new_sequence=lambda: SimpleNamespace(tokens=[]))
    calls: list[tuple[int, list[int]]] = []

    def evaluate(sequence: Any, ids: list[int]) -> np.ndarray:
        calls.append((len(sequence.tokens), list(ids)))
        sequence.tokens += ids
        return np.eye(10, dtype=np.float32)[(sequence.tokens[-1] + 1) % 10]

    engine.evaluate = evaluate
    engine.truncate = lambda sequence, n: sequence.tokens.__delitem__(slice(n, None))
    draft = DraftModel(engine, 0.1)
    greedy = Sampler(SamplingOptions(temperature=0.0))
    text = [0, 1, 2]
    assert draft.propose(text, 3, greedy) == [3, 4, 5]
    text += [3, 4, 5, 6]  # all right, and one more
    assert draft.propose(text, 2, greedy) == [7, 8]
    text += [7, 0]  # one right, one wrong
    assert draft.propose(text, 2, greedy) == [1, 2]
    text += [5, 5, 5]  # wrong, and not asked for a while
    assert draft.propose(text, 1, greedy) == [6]
    assert calls == [
        (0, [0, 1, 2]), (3, [3]), (4, [4]),
        (5, [5, 6]), (7, [7]),
        (8, [0]), (9, [1]),
        (9, [5, 5, 5]),
    ]  # fmt: skip
