"""Greedy texts of real models: what llama.cpp says, as recorded by `benchmarks/record_golden.py`.

Two engines may part where llama.cpp's token leads by little.  Up to there the tokens must be equal; and
given the recorded text, every step that leads clearly, for llama.cpp and for a float evaluation of the
weights, must choose the recorded token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA

from edgellama import LLM
from edgellama.gguf import open_gguf
from edgellama.tokenizer import load_tokenizer

GOLDEN = json.loads((DATA / "golden.json").read_text(encoding="ascii"))
TOKEN_IDS = json.loads((DATA / "token_ids.json").read_text(encoding="utf-8"))
LEAD = 0.3  # nats

TINY = Path(__file__).parents[2] / "shared" / "data" / "tiny_models" / "stories260K"

MODELS = [("smollm2", "SmolLM2-135M-Instruct.Q4_1"), ("gemma3", "gemma-3-270m-q4_k_m")]


def clear_steps(answer: dict[str, Any]) -> list[bool]:
    """Say of every step whether its token leads clearly."""
    pairs = zip(answer["margins"], answer["float_margins"], strict=True)
    return [min(pair) >= LEAD for pair in pairs]


@pytest.mark.parametrize(("fixture", "name"), MODELS)
def test_greedy_text(fixture: str, name: str, request: pytest.FixtureRequest) -> None:
    answers: list[dict[str, Any]] = GOLDEN["models"][name]
    with LLM(request.getfixturevalue(fixture), n_ctx=256) as llm:
        for answer in answers:
            ids, prompt, clear = answer["ids"], answer["prompt_ids"], clear_steps(answer)
            assert llm.tokenize(answer["prompt"], parse_special=True) == prompt
            close = next((i for i, m in enumerate(answer["margins"]) if m < LEAD), len(ids))

            said = llm.generate(prompt, max_tokens=len(ids), temperature=0)
            said_ids = said.tokens
            if said.finish_reason == "stop":
                said_ids = [*said_ids, ids[-1] if answer["ends"] else None]
            assert said_ids[:close] == ids[:close], answer["prompt"]
            if said_ids == ids:
                assert said.text == answer["text"]

            rows = llm.logits([*prompt, *ids[:-1]])[len(prompt) - 1 :]
            for step, (row, token) in enumerate(zip(rows, ids, strict=True)):
                if clear[step]:
                    assert int(row.argmax()) == token, f"step {step} of {answer['prompt']!r}"


@pytest.mark.parametrize(("fixture", "name"), MODELS)
def test_token_ids(fixture: str, name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(fixture)
    with open_gguf(path) as gguf:
        tokenizer = load_tokenizer(gguf.metadata)
    ids = TOKEN_IDS["models"][path.name]
    for text, plain, special in zip(
        TOKEN_IDS["strings"], ids["plain"], ids["special"], strict=True
    ):
        assert tokenizer.encode(text, add_special=False) == plain, ascii(text)
        assert tokenizer.encode(text, parse_special=True) == special, ascii(text)


def test_golden_is_worth_it() -> None:
    """Enough of what was recorded is clear."""
    for answers in GOLDEN["models"].values():
        assert len(answers) >= 8
        assert sum(sum(clear_steps(answer)) for answer in answers) > 250


@pytest.mark.skipif(not TINY.exists(), reason="stories260K is not beside this checkout")
def test_stories_greedy_text() -> None:
    """The text that llama2.c prints for its smallest model."""
    expected = json.loads((TINY / "expected.json").read_text(encoding="utf-8"))
    with LLM(TINY / "stories260K.f32.gguf", n_ctx=512, kv_type="f32") as llm:
        for n_steps in (200, 256):
            case = expected[f"greedy_{n_steps}_steps"]
            said = llm.generate("", max_tokens=n_steps, temperature=0)
            assert said.text.strip() == case["text"].strip()
            assert said.tokens == case.get("ids", said.tokens)
