"""The text layer on a model without weights: tokens are bytes, and the answer is known.

`install(monkeypatch, FakeEngine(answer))` puts it where `LLM` looks for files and engines; a real
model is at the end.
"""

from __future__ import annotations

import codecs
import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgellama import llm as llm_module
from edgellama.errors import ContextOverflowError, TemplateError, UsageError
from edgellama.generation import Completion
from edgellama.llm import LLM

BOS, END = 256, 257
N_VOCAB = 258


class FakeTokenizer:
    """One token per byte; <s> and <e> are special."""

    n_vocab, bos_id, eos_id, add_bos, add_eos = N_VOCAB, BOS, END, True, False
    eog_ids = frozenset({END})

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        ids = [BOS] if add_special else []
        if parse_special:
            for i, piece in enumerate(text.split("<s>")):
                ids += [BOS] * (i > 0) + list(piece.encode())
            return ids
        return ids + list(text.encode())

    def decode(self, ids: Any, skip_special: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def is_special(self, token: int) -> bool:
        return token >= 256

    def token_text(self, token: int) -> str:
        return {BOS: "<s>", END: "<e>"}.get(token, chr(token))

    def stream(self, shown: Any = ()) -> Any:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return SimpleNamespace(
            feed=lambda i: decoder.decode(bytes([i])) if i < 256 else "",
            flush=lambda: decoder.decode(b"", True),
        )


class FakeEngine:
    """Says `answer`, then ends; `flat` makes every byte of "abcd" equally likely instead."""

    def __init__(self, answer: str = "", *, n_ctx: int = 64, flat: bool = False) -> None:
        self.answer = [*answer.encode(), END]
        self.n_ctx, self.n_threads, self.flat = n_ctx, 1, flat
        self.live: list[Any] = []
        self.prompts: list[list[int]] = []
        self.interrupt_at = -1
        self.closed = False

    def new_sequence(self) -> Any:
        sequence = SimpleNamespace(tokens=[], n_reused=0)
        self.live.append(sequence)
        return sequence

    def free(self, sequence: Any) -> None:
        self.live.remove(sequence)

    def evaluate(self, sequence: Any, ids: list[int]) -> np.ndarray:
        if self.closed:
            raise UsageError("the model is closed")
        if not sequence.tokens:
            self.prompts.append(list(ids))
            sequence.n_prompt = len(ids)
        n_said = len(sequence.tokens) + len(ids) - sequence.n_prompt
        if n_said == self.interrupt_at:
            self.interrupt_at = -1
            raise KeyboardInterrupt
        sequence.tokens += ids
        assert len(sequence.tokens) <= self.n_ctx
        logits = np.full(N_VOCAB, -20.0, np.float32)
        if self.flat:
            logits[list(b"abcd")] = 0.0
        else:
            logits[self.answer[min(n_said, len(self.answer) - 1)]] = 20.0
        return logits

    def evaluate_each(self, sequence: Any, ids: list[int]) -> np.ndarray:
        return np.array([self.evaluate(sequence, [i]) for i in ids])

    def fork(self, sequence: Any) -> Any:
        self.live.append(copy.deepcopy(sequence))
        return self.live[-1]

    def step(self, batch: Any) -> np.ndarray:
        return np.array([self.evaluate(sequence, ids) for sequence, ids in batch])

    def truncate(self, sequence: Any, n_tokens: int) -> None:
        assert sequence.n_prompt <= n_tokens <= len(sequence.tokens)
        del sequence.tokens[n_tokens:]

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.zeros((len(ids), N_VOCAB), np.float32)

    def close(self) -> None:
        self.closed = True


def install(
    monkeypatch: pytest.MonkeyPatch,
    engine: FakeEngine,
    *,
    template: str | None = None,
    trained: int = 64,
) -> FakeEngine:
    """Make every model that is opened from here on the given one."""
    metadata = {} if template is None else {"tokenizer.chat_template": template}
    config = SimpleNamespace(n_vocab=N_VOCAB, context_length=trained, name="fake")

    def open_engine(gguf: Any, config: Any, *, n_ctx: int, **options: Any) -> FakeEngine:
        engine.n_ctx = n_ctx
        return engine

    monkeypatch.setattr(llm_module, "resolve", lambda model, *, offline: Path(model or "default"))
    monkeypatch.setattr(
        llm_module, "open_gguf", lambda _: nullcontext(SimpleNamespace(metadata=metadata))
    )
    monkeypatch.setattr(llm_module, "read_config", lambda _: config)
    monkeypatch.setattr(llm_module, "load_tokenizer", lambda *_: FakeTokenizer())
    monkeypatch.setattr(llm_module, "Engine", open_engine)
    return engine


# --- text --------------------------------------------------------------------------------------
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(params=[None, "lookup"])
def open_llm(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """Whether tokens are guessed or not, everything here must be the same."""

    def open_it(answer: str = "", *, options: Any = None, **fake: Any) -> tuple[LLM, FakeEngine]:
        flat = fake.pop("flat", False)
        engine = install(monkeypatch, FakeEngine(answer, flat=flat), **fake)
        return LLM("fake", draft=request.param, **(options or {})), engine

    return open_it


def generate(llm: LLM, prompt: Any = "p", **options: Any) -> Completion:
    done = llm.generate(prompt, temperature=0, **options)
    assert isinstance(done, Completion)
    return done


def test_generate(open_llm) -> None:
    llm, engine = open_llm("né世!")
    done = generate(llm, "ab")
    assert (done.text, done.finish_reason) == ("né世!", "stop")
    assert done.tokens == list("né世!".encode())  # the end-of-generation token is not text
    assert (done.timings.prompt_n, done.timings.predicted_n, done.timings.cached_n) == (3, 7, 0)
    assert engine.prompts == [[BOS, 97, 98]]
    assert engine.live == []


def test_stream_is_whole_characters_and_ends_with_a_reason(open_llm) -> None:
    llm, _ = open_llm("né世!")
    deltas = list(llm.stream("ab", temperature=0))
    assert "".join(d.text for d in deltas) == "né世!"
    assert all("\ufffd" not in d.text for d in deltas)
    assert [d.finish_reason for d in deltas] == [None] * 7 + ["stop"]
    assert [token for d in deltas for token in d.tokens] == list("né世!".encode())


@pytest.mark.parametrize(
    ("max_tokens", "text", "reason"),
    [(0, "", "length"), (3, "hel", "length"), (5, "hello", "length"), (6, "hello", "stop")],
)
def test_max_tokens(open_llm, max_tokens: int, text: str, reason: str) -> None:
    done = generate(open_llm("hello")[0], max_tokens=max_tokens)
    assert (done.text, done.finish_reason, len(done.tokens)) == (text, reason, len(text))


@pytest.mark.parametrize("max_tokens", [-1, 1.5, True, "3"])
def test_bad_max_tokens(open_llm, max_tokens: Any) -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        open_llm()[0].stream("x", max_tokens=max_tokens)  # at the call, not at the first piece


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_stops_when_the_context_is_full(open_llm, max_tokens: int | None) -> None:
    llm, _ = open_llm("x" * 100, options={"n_ctx": 16})
    done = generate(llm, "abc", max_tokens=max_tokens)
    assert (done.text, done.finish_reason) == ("x" * 13, "length")  # 4 + 12 cached, one more drawn
    full = generate(llm, "a" * 15)
    assert (full.text, full.finish_reason) == ("x", "length")


def test_overflow_names_both_numbers(open_llm) -> None:
    llm, _ = open_llm(options={"n_ctx": 16})
    with pytest.raises(ContextOverflowError, match=r"17 tokens.*16"):
        llm.generate("a" * 16)


def test_context_defaults_to_the_trained_one(open_llm, caplog) -> None:
    assert open_llm(trained=100)[0].n_ctx == 100
    assert open_llm(trained=100_000)[0].n_ctx == 4096
    assert caplog.text == ""
    assert open_llm(trained=100, options={"n_ctx": 200})[0].n_ctx == 200
    assert "trained for 100" in caplog.text


@pytest.mark.parametrize(
    ("stop", "text"),
    [(["lo w"], "hel"), (["xx", "world"], "hello "), ("o", "hell"), (["world!"], "hello world")],
)
def test_stop_strings(open_llm, stop: Any, text: str) -> None:
    llm, engine = open_llm("hello world")
    done = generate(llm, stop=stop)
    assert (done.text, done.finish_reason) == (text, "stop")
    assert engine.live == []


def test_cut_character_is_replaced(open_llm) -> None:
    assert generate(open_llm("世")[0], max_tokens=2).text == "\ufffd"


def test_prompt_of_ids_and_empty_prompt(open_llm) -> None:
    llm, engine = open_llm("ok")
    assert generate(llm, [97]).text == "ok"
    assert generate(llm, []).text == "ok"
    assert engine.prompts == [[97], [BOS]]


def test_seeds(open_llm) -> None:
    llm, _ = open_llm(flat=True)
    options = {"max_tokens": 30}
    one = llm.generate("p", seed=5, **options).text
    assert llm.generate("p", seed=5, **options).text == one
    several = llm.generate("p", seed=5, n=3, **options)
    assert several[0].text == one
    assert len({done.text for done in several}) == 3
    assert len({llm.generate("p", **options).text for _ in range(3)}) == 3
    texts = [open_llm(flat=True, options={"seed": 9})[0].generate("p").text for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_bad_n(open_llm, n: Any) -> None:
    with pytest.raises(UsageError, match="n is"):
        open_llm()[0].generate("p", n=n)


def test_unknown_options_are_errors(open_llm) -> None:
    with pytest.raises(UsageError, match="temprature"):
        open_llm()[0].generate("p", temprature=0)


@pytest.mark.parametrize("at", [0, 2])
def test_ctrl_c_leaves_the_model_usable(open_llm, at: int) -> None:
    llm, engine = open_llm("hello")
    engine.interrupt_at = at
    with pytest.raises(KeyboardInterrupt):
        generate(llm)
    assert engine.live == []
    assert generate(llm).text == "hello"


def test_a_dropped_stream_frees_its_sequence(open_llm) -> None:
    llm, engine = open_llm("hello")
    stream = llm.stream("p")
    assert engine.live == []
    next(stream)
    assert len(engine.live) == 1
    stream.close()
    assert engine.live == []


def test_close(open_llm) -> None:
    llm, engine = open_llm("hello")
    with llm:
        assert not engine.closed
    assert engine.closed
    llm.close()
    with pytest.raises(UsageError, match="closed"):
        generate(llm)


# --- chat -----------------------------------------------------------------------------------------
def test_chat(open_llm) -> None:
    llm, engine = open_llm("fine", template=TEMPLATE)
    done = llm.chat([{"role": "user", "content": "hi"}], temperature=0)
    assert (done.text, done.finish_reason) == ("fine", "stop")
    assert engine.prompts == [[BOS, *b"[user]hi"]]  # one BOS, not two


def test_chat_adds_the_bos_that_a_template_leaves_out(open_llm) -> None:
    llm, engine = open_llm("fine", template="{{ messages[0].content }}{{ more }}")
    llm.chat([{"role": "user", "content": "hi"}], chat_template_kwargs={"more": "!"})
    assert engine.prompts == [[BOS, *b"hi!"]]


@pytest.mark.parametrize("template", [None, "{% broken", "{{ raise_exception('no') }}"])
def test_without_a_sound_template_only_chat_fails(open_llm, template: str | None) -> None:
    llm, _ = open_llm("fine", template=template)
    with pytest.raises(TemplateError, match=r"--raw|no"):
        llm.stream_chat([{"role": "user", "content": "hi"}])
    assert generate(llm).text == "fine"


# --- a real model ---------------------------------------------------------------------------------
def test_real_model(smollm2) -> None:
    with LLM(smollm2, n_ctx=256) as llm:
        text = "The capital of France is"
        ids = llm.tokenize(text)
        assert llm.detokenize(ids) == text
        assert llm.logits(ids).shape == (len(ids), llm.config.n_vocab)
        first = generate(llm, text, max_tokens=8)
        assert "Paris" in first.text
        assert int(llm.logits(ids)[-1].argmax()) == first.tokens[0]
        sampled = [llm.generate(text, seed=1, max_tokens=8) for _ in range(2)]
        assert sampled[0].tokens == sampled[1].tokens
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = llm.chat(question, temperature=0, max_tokens=40)
        assert answer.text.startswith("L'Étoile, la")  # llama.cpp's words for this prompt too
        pieces = llm.stream_chat(question, temperature=0, max_tokens=40)
        assert "".join(delta.text for delta in pieces) == answer.text
