"""Answers on a real engine: seeds, several at once, log probabilities, processors, beams."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from make_gguf import make_model

from edgellama.errors import ContextOverflowError, ModelFileError, UsageError
from edgellama.generation import Completion
from edgellama.llm import LLM

PROMPT = list(range(40, 110))  # two pages and a part
EVERYTHING: dict[str, Any] = {
    "seed": 11, "max_tokens": 24, "top_k": 30, "typical_p": 0.95, "top_n_sigma": 3.0, "min_p": 0.01,
    "xtc_probability": 0.4, "xtc_threshold": 0.01, "dynatemp_range": 0.4, "repeat_penalty": 1.2,
    "presence_penalty": 0.2, "frequency_penalty": 0.1, "dry_multiplier": 0.8,
    "logit_bias": {65: 1.5, "the": 2, 66: False},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "default": {"seed": 3, "max_tokens": 24},
    "everything": EVERYTHING,
    "mirostat1": {"seed": 5, "max_tokens": 24, "mirostat": 1, "mirostat_tau": 3.0},
    "mirostat2": {"seed": 5, "max_tokens": 24, "mirostat": 2, "mirostat_tau": 3.0},
    "greedy with penalties": {"temperature": 0, "max_tokens": 24, "repeat_penalty": 1.5},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("generation") / "m.gguf")


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(path, n_ctx=128, n_threads=2) as llm:
        yield llm


def one(llm: LLM, prompt: Any = PROMPT, **options: Any) -> Completion:
    done = llm.generate(prompt, **options)
    assert isinstance(done, Completion)
    return done


def several(llm: LLM, n: int, prompt: Any = PROMPT, **options: Any) -> list[Completion]:
    done = llm.generate(prompt, n=n, **options)
    assert isinstance(done, list)
    return done


def all_free(llm: LLM) -> bool:
    return not any(n for group in llm._engine._cache.groups for n in group._n_users)


# --- the same seed --------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
def test_same_seed_same_text(path: Path, llm: LLM, way: str) -> None:
    """Whatever the threads, the size of steps, the cache, the company and the guesses."""
    options = WAYS[way]
    expected = one(llm, **options)
    assert len(set(expected.tokens)) > 1
    again = one(llm, **options)
    assert again.tokens == expected.tokens
    assert again.timings.cached_n == again.timings.prompt_n - 1
    with LLM(path, n_ctx=128, n_threads=1, n_batch=7, draft="lookup") as other:
        assert one(other, **options).tokens == expected.tokens
    with LLM(path, n_ctx=128, n_threads=1, draft=llm) as other:
        guessed = one(other, **options)
        assert guessed.tokens == expected.tokens
        # The draft draws with a fork of the very sampler: its guesses are right.
        assert guessed.timings.accepted_n == guessed.timings.drafted_n > 5
    together = several(llm, 3, **options)
    assert together[0].tokens == expected.tokens
    if "seed" in options:
        third = one(llm, **{**options, "seed": options["seed"] + 2})
        assert together[2].tokens == third.tokens != expected.tokens
    assert all_free(llm)


# --- several at once ------------------------------------------------------------------------------
def test_completions_share_steps_and_pages(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[int]] = []
    step = llm._engine.step

    def note(batch: Any) -> np.ndarray:
        out = step(batch)
        pages = {page for sequence, _ in batch for page in sequence.tables[0, :2]}
        steps.append([len(batch), len(pages)])
        return out

    monkeypatch.setattr(llm._engine, "step", note)
    done = several(llm, 4, max_tokens=10, seed=1)
    assert steps[0][0] == 1  # the prompt
    assert steps[1:] == [[4, 2]] * 9
    assert all(each.timings.prompt_n == 70 for each in done)
    assert all(each.timings.predicted_n == len(each.tokens) == 10 for each in done)


def test_when_the_cache_is_full_some_wait(path: Path, llm: LLM) -> None:
    options: dict[str, Any] = {"seed": 2, "max_tokens": 58, "temperature": 1.0}
    expected = [one(llm, **{**options, "seed": 2 + i}).tokens for i in range(6)]
    with LLM(path, n_ctx=128, n_threads=1) as small:  # 8 pages: two are the prompt's, two each more
        done = several(small, 6, **options)
        assert [each.tokens for each in done] == expected
        assert all_free(small)
        held = small._engine.new_sequence()
        small._engine.evaluate(held, [7] * 128)  # leaves one at a time
        assert [each.tokens for each in several(small, 3, **options)] == expected[:3]
        more = small._engine.new_sequence()
        small._engine.evaluate(more, [8] * 70)
        with pytest.raises(ContextOverflowError):
            several(small, 3, **options)
        small._engine.free(held)
        small._engine.free(more)
        assert all_free(small)


def test_completions_end_one_by_one(llm: LLM) -> None:
    texts = [one(llm, seed=i, max_tokens=20, temperature=1.5).text for i in range(3)]
    stop = texts[1][4:6]
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5, "stop": stop}
    alone = [one(llm, seed=i, **options) for i in range(3)]
    together = several(llm, 3, seed=0, **options)
    assert together[1].finish_reason == "stop"
    for a, b in zip(alone, together, strict=True):
        assert (a.text, a.tokens, a.finish_reason) == (b.text, b.tokens, b.finish_reason)


def test_nothing_to_say(llm: LLM) -> None:
    assert [each.tokens for each in several(llm, 2, max_tokens=0)] == [[], []]
    assert all_free(llm)


# --- log probabilities ----------------------------------------------------------------------------
@pytest.mark.parametrize("draft", [None, "lookup"])
def test_logprobs_are_the_models_own(path: Path, draft: str | None) -> None:
    prompt = PROMPT + PROMPT[:30]  # more than one chunk
    with LLM(path, n_ctx=128, n_threads=2, draft=draft) as llm:
        done = one(llm, prompt, max_tokens=8, temperature=0, top_logprobs=3, prompt_logprobs=True,
                   repeat_penalty=1.3)  # fmt: skip
        logits = llm.logits(prompt + done.tokens).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert done.logprobs is not None
    assert done.prompt_logprobs is not None
    assert done.prompt_logprobs[0] is None
    entries = [*done.prompt_logprobs, *done.logprobs]
    assert [entry.token for entry in entries if entry] == (prompt + done.tokens)[1:]
    for row, entry in zip(logprobs, entries[1:], strict=False):
        assert entry is not None
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-5)
        best = np.argsort(-row, kind="stable")[:3]
        assert [other.token for other in entry.top] == best.tolist()
        np.testing.assert_allclose([o.logprob for o in entry.top], row[best], atol=1e-5)
    assert done.logprobs[0].text == llm.tokenizer.token_bytes(done.tokens[0]).decode(
        errors="replace"
    )


def test_logprobs_of_several(llm: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 5, "logprobs": True, "prompt_logprobs": True}
    done = several(llm, 2, seed=4, **options)
    for i, each in enumerate(done):
        alone = one(llm, seed=4 + i, **options)
        assert (each.logprobs, each.prompt_logprobs) == (alone.logprobs, alone.prompt_logprobs)
    assert one(llm, max_tokens=3).logprobs is None


# --- the row of logits ----------------------------------------------------------------------------
@pytest.mark.parametrize("returns", [False, True])
def test_a_processor_sees_the_text_and_decides(llm: LLM, returns: bool) -> None:
    texts = []

    def only_after(ids: Any, logits: np.ndarray) -> np.ndarray | None:
        texts.append(list(ids))
        assert logits.dtype == np.float32
        wanted = (ids[-1] + 1) % 200
        if returns:
            return np.where(np.arange(len(logits)) == wanted, np.float32(0), -np.inf)
        logits[:wanted] = logits[wanted + 1 :] = -np.inf
        return None

    done = one(llm, max_tokens=5, processors=[only_after])
    assert done.tokens == [110, 111, 112, 113, 114]
    assert texts == [PROMPT + done.tokens[:i] for i in range(5)]


def test_a_processor_is_told_of_tokens_and_not_of_guesses(path: Path, llm: LLM) -> None:
    class Listener:
        def __init__(self) -> None:
            self.heard: list[int] = []

        def __call__(self, ids: Any, logits: np.ndarray) -> None:
            assert list(ids)[len(PROMPT) :] == self.heard

        def accept(self, token: int) -> None:
            self.heard.append(token)

    with LLM(path, n_ctx=128, n_threads=1, draft=llm) as guessing:
        listener = Listener()
        done = one(guessing, max_tokens=20, seed=1, processors=[listener])
    assert done.timings.accepted_n > 0
    assert listener.heard == done.tokens


def test_bias(llm: LLM) -> None:
    assert one(llm, max_tokens=3, logit_bias={70: 1000}).tokens == [70] * 3
    usual = one(llm, max_tokens=1, temperature=0).tokens
    assert one(llm, max_tokens=1, temperature=0, logit_bias={usual[0]: False}).tokens != usual
    the = llm.tokenize("the")
    assert one(llm, max_tokens=1, logit_bias={"the": 1000}).tokens[0] in the
    with pytest.raises(UsageError, match="no token can follow"):
        one(llm, max_tokens=1, logit_bias=dict.fromkeys(range(llm.config.n_vocab), False))
    for bad in ({9**9: 1}, {-1: 1}, {1: float("nan")}, {1: "x"}, {1: True}, {1.5: 1}, [1]):
        with pytest.raises(UsageError, match="logit_bias"):
            one(llm, max_tokens=1, logit_bias=bad)


def test_a_compiled_processor(llm: LLM) -> None:
    """A function compiled by Numba sees the very arrays."""
    numba = pytest.importorskip("numba")

    @numba.njit
    def no_repetition(ids: Any, row: Any) -> None:
        for token in ids:
            row[token] = -np.inf

    def same(ids: Any, row: np.ndarray) -> None:
        row[ids] = -np.inf

    done = one(llm, max_tokens=20, seed=1, processors=[no_repetition])
    assert len({*PROMPT, *done.tokens}) == len(PROMPT) + len(done.tokens)
    assert one(llm, max_tokens=20, seed=1, processors=[same]).tokens == done.tokens


def test_errors_of_a_processor_are_its_own(llm: LLM) -> None:
    def broken(ids: Any, row: np.ndarray) -> None:
        raise ZeroDivisionError("mine")

    for n in (1, 2):
        with pytest.raises(ZeroDivisionError, match="mine"):
            llm.generate(PROMPT, n=n, max_tokens=2, processors=[broken])
    assert all_free(llm)
    with pytest.raises(ValueError, match="shape"):
        llm.generate(PROMPT, processors=[lambda ids, row: np.zeros(3, np.float32)])
    with pytest.raises(UsageError, match="processors"):
        llm.generate(PROMPT, processors=[3])  # type: ignore[list-item]


# --- ends -----------------------------------------------------------------------------------------
def test_ends_can_be_ignored(llm: LLM) -> None:
    end = min(llm.tokenizer.eog_ids)
    wanted = {"max_tokens": 5, "temperature": 0, "logit_bias": {end: 1000}}
    assert one(llm, **wanted).tokens == []
    assert len(one(llm, ignore_eos=True, **wanted).tokens) == 5
    banned = {i: False for i in range(llm.config.n_vocab) if i not in llm.tokenizer.eog_ids}
    with pytest.raises(UsageError, match="ignore_eos"):
        one(llm, ignore_eos=True, logit_bias=banned)


@pytest.mark.parametrize("n", [1, 2])
def test_time_runs_out(llm: LLM, n: int) -> None:
    def slow(ids: Any, row: np.ndarray) -> None:
        time.sleep(0.05)

    options: dict[str, Any] = {"seed": 1, "processors": [slow], "ignore_eos": True}
    start = time.perf_counter()
    done = llm.generate(PROMPT, n=n, max_time_s=0.2, **options)
    for each in done if isinstance(done, list) else [done]:
        assert 1 <= len(each.tokens) <= 5
        assert each.finish_reason == "length"
    assert time.perf_counter() - start < 2
    assert len(one(llm, max_time_s=0, seed=1, ignore_eos=True).tokens) == 1


# --- what the file says ---------------------------------------------------------------------------
def test_a_file_has_defaults(tmp_path: Path) -> None:
    keys = {"general.sampling.temp": 0.0, "general.sampling.penalty_repeat": 1.5}
    path = make_model(tmp_path / "m.gguf", keys=keys)
    with LLM(path, n_ctx=128, n_threads=1) as llm:
        expected = one(llm, max_tokens=10, temperature=0, repeat_penalty=1.5).tokens
        assert one(llm, max_tokens=10).tokens == expected
        assert one(llm, max_tokens=10, temperature=None).tokens == expected
        assert one(llm, max_tokens=10, temperature=5.0, seed=1).tokens != expected


def test_a_file_has_bad_defaults(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", keys={"general.sampling.temp": float("nan")})
    with LLM(path, n_ctx=64, n_threads=1) as llm:
        with pytest.raises(ModelFileError, match=r"general\.sampling\.temp"):
            llm.generate("x", max_tokens=1)
        one(llm, "x", max_tokens=1, temperature=0.5)


# --- beams ----------------------------------------------------------------------------------------
def test_a_single_beam_is_greedy(llm: LLM) -> None:
    best = one(llm, max_tokens=12, beam_width=1)
    greedy = one(llm, max_tokens=12, temperature=0)
    assert (best.text, best.tokens) == (greedy.text, greedy.tokens)


def test_beams_against_the_definition(llm: LLM) -> None:
    """Every text of the best five, prolonged by every token, five of them kept; four times."""
    ends, prompt = llm.tokenizer.eog_ids, PROMPT[:3]
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(4):
        grown = []
        for score, text in beams:
            row = llm.logits([*prompt, *text])[-1].astype(np.float64)
            row -= np.log(np.exp(row).sum())
            grown += [(score + row[token], (*text, token)) for token in range(len(row))]
        grown.sort(reverse=True)
        beams = [(score, text) for score, text in grown if text[-1] not in ends][:5]
        ended += [each for each in grown if each[1][-1] in ends and each[0] > beams[-1][0]]
    best = sorted(beams + ended, reverse=True)[:5]
    found = several(llm, 5, prompt, beam_width=5, max_tokens=4, length_penalty=0.0)
    assert [tuple(b.tokens) for b in found] == [
        tuple(token for token in text if token not in ends) for _, text in best
    ]
    assert all_free(llm)


def test_beams_over_pages(llm: LLM) -> None:
    done = several(llm, 3, beam_width=3, max_tokens=40, logprobs=True)
    scores = []
    for each in done:
        assert each.logprobs is not None
        rows = llm.logits(PROMPT + each.tokens)[len(PROMPT) - 1 : -1].astype(np.float64)
        expected = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        given = [entry.logprob for entry in each.logprobs]
        np.testing.assert_allclose(
            given, [row[t] for row, t in zip(expected, each.tokens, strict=True)], atol=1e-5
        )
        scores.append(sum(given) / len(given))
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(each.tokens) for each in done}) == 3
    assert all_free(llm)


def test_beams_end_at_stop_strings(llm: LLM) -> None:
    plain = several(llm, 3, beam_width=3, max_tokens=12)
    assert one(llm, beam_width=3, max_tokens=12) == plain[0]._replace(timings=ANY)
    stop = plain[0].text[2:4]
    done = several(llm, 3, beam_width=3, max_tokens=12, stop=[stop])
    assert not any(stop in each.text for each in done)
    ended = [each for each in done if each.finish_reason == "stop"]
    assert ended
    for each in ended:
        assert llm.detokenize(each.tokens).startswith(each.text + stop)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beam_width": 0}, "beam_width"), ({"beam_width": True}, "beam_width"),
        ({"beam_width": 2, "n": 3}, "beam_width is 2; it must be a whole number 3 or more"),
        ({"beam_width": 2, "max_tokens": -1}, "max_tokens"), ({"beam_width": 2, "stop": ""}, "stop"),
        ({"beam_width": 2, "temperature": 0.5}, "temperature"), ({"beam_width": 2, "seed": 5}, "seed"),
        ({"beam_width": 2, "length_penalty": float("nan")}, "length_penalty"),
    ],
)  # fmt: skip
def test_bad_beams(llm: LLM, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        llm.generate("x", **options)


# --- options --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 3}, {"prompt_logprobs": 1}, {"top_logprobs": -1}, {"samplers": "top_k;magic"},
        {"mirostat": 3}, {"mirostat": 1.0}, {"repeat_penalty": 0}, {"dry_base": 0.5},
        {"dry_sequence_breakers": [""]}, {"typical_p": 2}, {"xtc_threshold": "a"}, {"topk": 3},
        {"max_time_s": -1}, {"max_time_s": "1"}, {"ignore_eos": 1},
        {"repeat_last_n": -2}, {"dynatemp_range": -1.0}, {"temperature": True},
    ],
)  # fmt: skip
def test_bad_options(llm: LLM, options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(UsageError, match="sampler" if name == "samplers" else name):
        llm.generate("x", **options)


def test_every_option_reaches_its_sampler(llm: LLM) -> None:
    strong: dict[str, Any] = {
        "top_k": 2, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.1, "top_n_sigma": 0.5,
        "xtc_probability": 1.0, "dynatemp_range": 1.4, "mirostat": 2, "repeat_penalty": 3.0,
        "presence_penalty": 5.0, "frequency_penalty": 5.0, "samplers": "top_k",
    }  # fmt: skip
    usual: dict[str, Any] = {
        "max_tokens": 12, "temperature": 1.5, "min_p": 0, "top_p": 1, "xtc_threshold": 0.001,
    }  # fmt: skip

    def texts(**options: Any) -> list[list[int]]:
        return [one(llm, [i], seed=i, **{**usual, **options}).tokens for i in range(1, 9)]

    plain = texts()
    assert plain == texts()
    assert [name for name, value in strong.items() if texts(**{name: value}) == plain] == []
