"""`edgellama batch`: every task, lines that are wrong, and runs that were stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import command

from edgellama import LLM, batch
from edgellama.errors import UsageError

GREEDY = {"temperature": 0, "max_tokens": 12}
LINES = [
    {"id": "a", "prompt": "The capital of France is", **GREEDY},
    {"messages": [{"role": "user", "content": "Say hello."}], **GREEDY},
    {"text": "A wonderful film", "labels": ["negative", "positive"]},
    {"prompt": "One, two,", "continuation": " three"},
    {"text": "\u732b\u304c\u5bdd\u3066\u3044\u308b", "pooling": "last"},
    {"text": "Good morning", "to": "French", "max_tokens": 8},
    {"question": "Who?", "context": "Ada did it.", "max_tokens": 8},
    {"prompt": "Once upon a time", "max_tokens": 30, "seed": 7},
    {"text": "Two", "pooling": "last"},
]


def write(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def llm(smollm2):
    with LLM(smollm2, n_ctx=256) as llm:
        yield llm


def test_every_task_as_if_it_were_alone(capsys, tmp_path, smollm2, llm):
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    status, stdout, stderr = command(
        capsys, "batch", str(source), str(out), "-m", str(smollm2), "-c", "256"
    )
    assert (status, stdout) == (0, ""), stderr
    results = read(out)
    assert [r["id"] for r in results] == ["a", 1, 2, 3, 4, 5, 6, 7, 8]
    assert results[0]["text"] == llm.generate("The capital of France is", **GREEDY).text
    assert results[1]["text"] == llm.chat(LINES[1]["messages"], **GREEDY).text
    assert (
        results[2]["probabilities"]
        == llm.classify("A wonderful film", ["negative", "positive"]).probabilities
    )
    assert results[3]["logprob"] == llm.score("One, two,", " three").logprob
    assert results[4]["embedding"] == llm.embed(LINES[4]["text"], "last").tolist()
    assert results[5]["text"] == llm.translate("Good morning", "French", max_tokens=8).text
    assert results[6]["text"] == llm.answer("Who?", "Ada did it.", max_tokens=8).text
    assert results[7]["text"] == llm.generate("Once upon a time", max_tokens=30, seed=7).text
    assert results[7]["finish_reason"] == "length"
    assert {*tmp_path.iterdir()} == {source, out}


BAD = [
    ("not json", "no JSON"),
    ([1], "a JSON object is needed"),
    ({}, "has no task; it must be one of chat, generate"),
    ({"task": "sing"}, "the task is 'sing'"),
    (
        {"task": "answer", "question": "x"},
        "answer needs question, context; the line has no context",
    ),
    ({"prompt": 5}, "prompt is 5; a text is needed"),
    ({"prompt": "x", "temprature": 1}, "no option 'temprature'"),
    ({"prompt": "word " * 400}, "the context holds 256"),
    ({"prompt": "x", "regex": "("}, "the grammar cannot be used"),
    ({"messages": "hello"}, "a list of messages"),
    ({"text": "x", "labels": ["one"]}, "two or more different"),
    ({"text": "x", "labels": ["a", "b"], "prompts": 1}, "prompts"),
    ({"task": "embed", "text": ""}, "is empty"),
    ({"task": "embed", "text": "x", "pooling": "max"}, "pooling is 'max'"),
]


def test_wrong_lines_say_why_and_harm_no_other(capsys, tmp_path, smollm2):
    lines = [line for line, _ in BAD]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = {"task": "embed", "text": "x"}
    write(source, [*lines[1:], good])
    source.write_text(f"{lines[0]}\n{source.read_text('utf-8')}", "utf-8")
    status, _, stderr = command(
        capsys, "batch", str(source), str(out), "-m", str(smollm2), "-c", "256"
    )
    assert status == 2
    assert f"{len(BAD)} of {len(BAD) + 1} lines could not be done" in stderr
    results = read(out)
    for (line, said), result in zip(BAD, results, strict=False):
        assert said in str(result["error"]), line
    assert np.linalg.norm(results[-1]["embedding"]) == pytest.approx(1)


def run(llm, source, out, **options):
    return batch.run_batch(
        llm, source, out,
        **{"task": None, "defaults": {}, "n_parallel": 2, "force": False, **options},
    )  # fmt: skip


def test_a_stopped_run_goes_on(tmp_path, llm, monkeypatch):
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    run(llm, source, whole := tmp_path / "whole.jsonl")
    add = batch.Journal.add

    def stop(journal, index, result):
        if len(journal.places) == 4:
            raise KeyboardInterrupt
        add(journal, index, result)

    with monkeypatch.context() as patch:
        patch.setattr(batch.Journal, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            run(llm, source, out)
    journal = tmp_path / "out.jsonl.partial"
    with journal.open("ab") as file:
        file.write(b'[8, {"torn')
    before = journal.read_bytes()
    with pytest.raises(UsageError, match="another input, model or options"):
        run(llm, source, out, defaults={"seed": 1})
    assert journal.read_bytes() == before
    done = []

    def count(journal, index, result):
        done.append(index)
        add(journal, index, result)

    monkeypatch.setattr(batch.Journal, "add", count)
    assert run(llm, source, out) == (len(LINES), 0)
    assert len(done) == len(LINES) - 4
    assert out.read_bytes() == whole.read_bytes()
    assert not journal.exists()


def test_files_in_the_way(tmp_path, llm):
    source = write(tmp_path / "in.jsonl", LINES[:1])
    with pytest.raises(UsageError, match="is a file to be read"):
        run(llm, source, source, force=True)
    with pytest.raises(UsageError, match=r"cannot be read: no such file"):
        run(llm, tmp_path / "none", tmp_path / "out")
    (out := tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="--force"):
        run(llm, source, out)
    assert out.read_text() == "mine"
    assert run(llm, source, out, force=True) == (1, 0)
    assert run(llm, write(tmp_path / "empty", []), tmp_path / "nothing") == (0, 0)
    assert (tmp_path / "nothing").read_bytes() == b""


def test_a_full_cache_makes_answers_wait(smollm2):
    with LLM(smollm2, n_ctx=64) as llm:
        prompts = [f"{i}. " + "word " * (20 + i) for i in range(6)]
        alone = [llm.generate(p, max_tokens=30, seed=i).text for i, p in enumerate(prompts)]
        requests = (llm.request(p, max_tokens=30, seed=i) for i, p in enumerate(prompts))
        together = dict(llm.answer_all(requests, n_parallel=6))
        assert [together[i].text for i in range(6)] == alone
