"""`edgellama run` on a model whose answer is known: prompt sources, output, statuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
from click.testing import CliRunner, Result
from test_llm import BOS, FakeEngine, install

from edgellama.cli import doctor
from edgellama.cli.run import command
from edgellama.errors import EdgeLlamaError, UsageError

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    return install(monkeypatch, FakeEngine("né世 yes"), template=TEMPLATE)


def run(*arguments: str, given: Any = "") -> Result:
    result = CliRunner().invoke(command, ["fake", *arguments], input=given)
    if isinstance(result.exception, EdgeLlamaError):
        raise result.exception
    return result


def test_answer_goes_to_stdout_alone(engine: FakeEngine) -> None:
    result = run("-p", "hi", "--temp", "0")
    assert result.exit_code == 0
    assert result.stdout_bytes.decode() == "né世 yes\n"
    assert result.stderr == ""
    assert engine.prompts == [[BOS, *b"[user]hi"]]
    assert engine.closed


def test_system(engine: FakeEngine) -> None:
    run("-p", "hi", "--system", "Be brief.")
    assert engine.prompts == [[BOS, *b"[system]Be brief.[user]hi"]]
    with pytest.raises(UsageError, match="--system"):
        run("-p", "hi", "--system", "x", "--raw")


def test_raw_parses_special_tokens(engine: FakeEngine) -> None:
    run("-p", "a<s>b", "--raw")
    assert engine.prompts == [[BOS, 97, BOS, 98]]


def test_a_file_without_template_continues_text(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = install(monkeypatch, FakeEngine("ok"))
    assert run("-p", "hi").stdout == "ok\n"
    assert engine.prompts == [[BOS, *b"hi"]]


@pytest.mark.parametrize(
    ("given", "prompt"), [("hé\n", "hé"), ("a\n\n", "a\n"), ("a\r\n", "a"), (b"\xff", "\ufffd")]
)
def test_stdin(engine: FakeEngine, given: Any, prompt: str) -> None:
    assert run("--raw", given=given).exit_code == 0
    assert engine.prompts == [[BOS, *prompt.encode()]]


def test_no_prompt_on_a_terminal(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    with pytest.raises(UsageError, match="no prompt"):
        run()


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(["-n", "1"], "n\n"), (["--stop", "y", "--stop", "世"], "né\n"), (["-n", "0"], "\n")],
)
def test_limits(engine: FakeEngine, arguments: list[str], shown: str) -> None:
    assert run("-p", "x", "--temp", "0", *arguments).stdout == shown


def test_stats_go_to_stderr(engine: FakeEngine) -> None:
    result = run("-p", "hi", "--temp", "0", "--stats")
    assert result.stdout == "né世 yes\n"
    assert "prompt 9 tokens" in result.stderr
    assert "answer 10 tokens" in result.stderr


def test_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeEngine("abc" * 10))
    result = run("-p", "hi", "--temp", "0", "--stats", "--draft", "lookup")
    assert result.stdout == "abc" * 10 + "\n"
    assert re.search(
        r"\| \d+ of \d+ guesses right \(\d+%\), [2-9]\.\d\d tokens a step", result.stderr
    )


@pytest.mark.parametrize(
    "arguments",
    [["--temp", "-1"], ["--temp", "nan"], ["--top-p", "2"], ["--min-p", "-1"], ["--stop", ""]],
)
def test_refused_values(engine: FakeEngine, arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        run("-p", "x", *arguments)
    assert engine.closed


@pytest.mark.parametrize(
    "arguments", [["-n", "x"], ["-c", "0"], ["-t", "0"], ["--kv-type", "q9"], ["--nonsense"]]
)
def test_refused_options(engine: FakeEngine, arguments: list[str]) -> None:
    assert run("-p", "x", *arguments).exit_code == 2


def test_ctrl_c_closes_the_model(engine: FakeEngine) -> None:
    engine.interrupt_at = 3
    assert run("-p", "x", "--temp", "0").exit_code != 0
    assert engine.closed
    assert engine.live == []


def test_doctor(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLAMA_HOME", str(tmp_path))
    result = CliRunner().invoke(doctor.doctor, [])
    assert result.exit_code == 0
    rows = "edgellama libraries tier threads memory home models reads multiplies"
    for row in rows.split():
        assert any(line.startswith(row) for line in result.stdout.splitlines()), row


def test_doctor_names_an_unknown_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellama.kernels import targets

    targets.detect.cache_clear()
    monkeypatch.setenv("EDGELLAMA_TARGET", "z80")
    result = CliRunner().invoke(doctor.doctor, [])
    targets.detect.cache_clear()
    assert isinstance(result.exception, UsageError)
    assert "z80" in str(result.exception)


# --- sampling -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["-n", "2", "--logit-bias", "z+100"], "zz\n"), (["--logit-bias", "110-inf", "-n", "0"], "\n"),
        (["--dry-multiplier", "1", "--dry-sequence-breaker", "none"], "né世 yes\n"),
        (["--mirostat", "2", "--mirostat-ent", "3"], "né世 yes\n"),
        (["--max-time", "0"], "n\n"), (["--min-keep", "3", "--typical", "0.5"], "né世 yes\n"),
    ],
)  # fmt: skip
def test_sampling_options_reach_the_sampler(
    engine: FakeEngine, arguments: list[str], shown: str
) -> None:
    assert run("-p", "x", "--seed", "1", *arguments).stdout == shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temp", "-1"], "temperature"), (["--mirostat-lr", "nan"], "mirostat_eta"),
        (["--samplers", "top_k;x"], "'x'"), (["--logit-bias", "a"], "--logit-bias"),
        (["--top-k", "-2"], "top_k"), (["--seed", "-1"], "seed"),
    ],
)  # fmt: skip
def test_bad_sampling_options(engine: FakeEngine, arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run("-p", "x", *arguments)


def test_help_has_groups(engine: FakeEngine) -> None:
    text = run("--help").stdout
    assert text.index("Options:") < text.index("Sampling:") < text.index("--min-p")
    assert text.index("--min-p") < text.index("Repetition:") < text.index("--dry-base")
    assert len(text.splitlines()) < 70
