"""Guessing tokens ahead changes no token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from make_gguf import make_model

from edgellama import llm as llm_module
from edgellama.errors import ModelFileError, UsageError
from edgellama.generation import Completion
from edgellama.llm import LLM
from edgellama.runtime.kvcache import PAGE
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
    return not any(n for group in llm._engine._cache.groups for n in group._n_users)


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
        n_ctx=1000,
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
