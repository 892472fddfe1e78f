"""`edgellama chat`, through a pipe and on a pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_chat import TEMPLATE
from test_llm import FakeEngine, install

from edgellama.cli.chat import _visible, command
from edgellama.errors import ContextOverflowError, EdgeLlamaError, TemplateError, UsageError

ROOT = Path(__file__).parents[1]


# --- through a pipe -------------------------------------------------------------------------------
def pipe(given: Any, *arguments: str) -> Result:
    result = CliRunner().invoke(command, ["fake", "--temp", "0", *arguments], input=given)
    if isinstance(result.exception, EdgeLlamaError):
        raise result.exception
    assert result.exception is None, result.exception
    return result


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    return install(monkeypatch, FakeEngine("né世"), template=TEMPLATE, trained=1000)


def prompts(engine: FakeEngine) -> list[str]:
    return [bytes(i for i in ids if i < 256).decode() for ids in engine.prompts]


def test_each_line_is_a_message(engine: FakeEngine) -> None:
    result = pipe("hi\n\n世 you\n", "--system", "Be brief.")
    assert result.stdout_bytes.decode() == "né世\nné世\n"
    assert result.stderr == ""
    first = "[system]Be brief.[user]hi"
    assert prompts(engine) == [first, f"{first}[assistant]né世[user]世 you"]
    assert engine.closed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('"""a\nb\n"""\n', "a\nb"), ('"""\n  a\n"""', "  a"), ('"""a"""', "a"), ("a\\\nb\n", "a\nb"),
        ('"""a\nb', "a\nb"), ("a\\", "a"), (" /help", " /help"), ("a\r\n", "a"), (b"\xff\n", "\ufffd"),
    ],
)  # fmt: skip
def test_messages_of_several_lines(engine: FakeEngine, given: Any, message: str) -> None:
    pipe(given)
    assert prompts(engine) == [f"[user]{message}"]


def test_reasoning_is_no_part_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = install(
        monkeypatch, FakeEngine("<think>Hm.</think>yes"), template=TEMPLATE, trained=1000
    )
    assert pipe("hi\nho\n").stdout == "yes\nyes\n"
    assert prompts(engine)[1] == "[user]hi[assistant]yes[user]ho"


def test_commands(engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    result = pipe(
        f"/system Be nice.\na\nb\n/undo\n/regen\n/save {file}\n/set top_k 3\n/set\n/set top_k\n/set\n"
        "/system\n/clear\nc\n/stats\n/help\n/exit\nnever\n"
    )
    assert [p.removeprefix("[system]Be nice.") for p in prompts(engine)] == [
        "[user]a", "[user]a[assistant]né世[user]b", "[user]a", "[user]c",
    ]  # fmt: skip
    assert json.loads(file.read_text("utf-8")) == [
        {"role": "system", "content": "Be nice."}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "né世"},
    ]  # fmt: skip
    assert os.listdir(tmp_path) == ["chat.json"]
    assert result.stdout_bytes.decode() == "né世\n" * 4
    said = result.stderr
    assert "top_k = 3" in said
    assert said.count("top_k") == 1
    assert "Be nice." in said
    assert re.search(r"context +\d+ of 1000 tokens", said)
    assert "/regen" in said


def test_load(engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "a chat.json"
    file.write_text(
        '[{"role": "system", "content": "S"}, {"role": "user", "content": "u"},'
        ' {"role": "assistant", "content": "a"}]'
    )
    pipe(f"x\n/load {file}\nmore\n")
    engine.closed = False
    pipe("more\n", "--load", str(file))
    assert prompts(engine)[1:] == ["[system]S[user]u[assistant]a[user]more"] * 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"), ("{", "no JSON"), ("{}", "no list"), ("[1]", "message 0"),
        ('[{"role": "user"}]', "message 0 has no content"), ('[{"role": "x", "content": "y"}]', "roles are"),
        ("[" * 99999, "no JSON"), (b"\xff", "no JSON"), ('[{"role": "user", "content": [{}]}]', "part"),
    ],
)  # fmt: skip
def test_bad_files(engine: FakeEngine, tmp_path: Path, content: Any, said: str) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=said):
        pipe(f"/load {file}\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/what", r"commands are /help"), ("/undo", "no message"), ("/regen", "no message"),
        ("/save", "name of a file"),
        ("/save /nowhere/x", "cannot be written"), ("/set x 1", "no option 'x'"), ("/set top_k x", "top_k"),
        ("/set temperature -1", "temperature"), ("/set tools []", "no option 'tools'"),
    ],
)  # fmt: skip
def test_bad_commands(engine: FakeEngine, line: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        pipe(f"{line}\n")


@pytest.mark.parametrize("template", [None, "{% for %}", "{{ raise_exception('no') }}"])
def test_a_model_that_cannot_chat(monkeypatch: pytest.MonkeyPatch, template: str | None) -> None:
    engine = install(monkeypatch, FakeEngine("x"), template=template)
    with pytest.raises(TemplateError):
        pipe("hi\n")
    assert engine.prompts == []
    assert engine.closed


def test_a_template_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = install(monkeypatch, FakeEngine("x"))
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages[0].content }}!")
    pipe("hi\n", "--chat-template", str(file))
    assert prompts(engine) == ["hi!"]
    with pytest.raises(UsageError, match="'rag'"):
        pipe("hi\n", "--chat-template", "rag")


def test_old_turns_go_when_the_context_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = install(monkeypatch, FakeEngine("ok"), template=TEMPLATE, trained=160)
    result = pipe("\n".join(f"message {i} ......" for i in range(9)), "--system", "S")
    seen = prompts(engine)
    assert max(map(len, seen)) <= 120
    assert all(p.startswith("[system]S[user]") for p in seen)
    assert "message 8" in seen[-1]
    assert "message 0" not in seen[-1]
    assert "oldest messages are left out" in result.stderr
    n_changes = sum(not b.startswith(a) for a, b in pairwise(seen))
    assert 0 < n_changes < 5  # not at every turn: it costs the whole prompt
    engine.closed = False
    with pytest.raises(ContextOverflowError, match="160"):
        pipe("x" * 200)


def test_an_answer_that_fills_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = install(monkeypatch, FakeEngine("x" * 500), template=TEMPLATE, trained=100)
    result = pipe("hi\n")
    assert len(result.stdout) > 80
    assert "the context is full (100 tokens)" in result.stderr
    engine.closed = False
    assert "context is full" not in pipe("hi\n", "-n", "3").stderr


# --- on a terminal --------------------------------------------------------------------------------
class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *arguments: str, term: str = "xterm", **environment: str) -> None:
        import pty

        self.master, slave = pty.openpty()
        self.seen = ""
        environment = {
            **{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "TERM": term, "LC_ALL": "C.UTF-8",
            "INPUTRC": os.devnull, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]),
            **environment,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fake_chat.py"), *arguments],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self.raw = b""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, pattern: str, seconds: float = 20.0) -> str:
        """Wait for what matches; return all that came up to its end."""
        end = time.monotonic() + seconds
        while True:
            text = self.raw.decode(errors="surrogateescape")
            found = re.search(pattern, text, re.DOTALL)
            if found:
                self.raw = text[found.end() :].encode(errors="surrogateescape")
                return text[: found.end()]
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} is not in {text!r}"
            if select.select([self.master], [], [], left)[0]:
                try:
                    self.raw += os.read(self.master, 65536)
                except OSError:  # Linux says so at the end
                    assert re.search(pattern, self.raw.decode()), f"{pattern!r} is not in {text!r}"

    def wait(self) -> int:
        return self.process.wait(20)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def spawn() -> Iterator[Any]:
    pytest.importorskip("termios")
    live: list[Terminal] = []

    def start(*arguments: str, **options: str) -> Terminal:
        live.append(Terminal(*arguments, **options))
        return live[-1]

    yield start
    for terminal in live:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_terminal(spawn: Any, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    t = spawn("né世 👍🏽!", "0", "1000")
    t.expect("/help shows.*> ")
    t.type("hi\r")
    assert "né世 👍🏽!\r\n" in t.expect(r"\[\d+ tokens, [\d.]+ a second; context \d+ of 1000\].*> ")
    t.type("世界\x1b[Dé\r")  # left, over a wide character
    t.expect(r"context.*> ")
    t.type("e\u0301x\x7f\x7f\x7fok\r")  # combining: deleted as it was typed
    t.expect(r"context.*> ")
    t.type("one\x1b\rtwo\r")  # Alt-Enter
    t.expect(r"context.*> ")
    t.type('"""three\r')
    t.expect("… ")
    t.type('four"""\r')
    t.expect(r"context.*> ")
    t.type("/what\r")  # said, and the chat goes on
    t.expect(r"no command /what.*> ")
    t.type(f"/save {file}\r")
    t.expect("> ")
    t.type("\x04")
    assert t.wait() == 0
    said = [m["content"] for m in json.loads(file.read_text("utf-8")) if m["role"] == "user"]
    assert said == ["hi", "世é界", "ok", "one\ntwo", "three\nfour"]


def test_ctrl_c_stops_the_answer_and_keeps_it(spawn: Any, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    t = spawn("word " * 400, "0.01", "4000")
    t.expect("> ")
    t.type("hi\r")
    t.expect("word word word")
    t.type("\x03")
    t.expect(r"\[stopped\].*> ")
    t.type(f"/save {file}\r")
    t.expect("> ")
    t.type("\x03")
    t.expect("Ctrl-C again.*> ")
    t.type("/set max_tokens 5\r")  # not twice in a row
    t.expect("> ")
    t.type("more\r")
    t.expect(r"\[5 tokens.*> ")
    t.type("\x03")
    t.expect("again.*> ")
    t.type("\x03")
    assert t.wait() == 0
    _, answer = json.loads(file.read_text("utf-8"))
    assert answer["content"].startswith("word word word")
    assert len(answer["content"]) < 1500


def test_ctrl_c_before_the_first_word_takes_the_message_back(spawn: Any, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    t = spawn("word", "1", "4000")
    t.expect("> ")
    t.type("hi\r")
    t.expect("hi")
    time.sleep(0.4)
    t.type("\x03")
    t.expect(r"\[stopped\].*> ")
    t.type(f"/save {file}\r")
    t.expect("> ")
    t.type("/exit\r")
    assert t.wait() == 0
    assert json.loads(file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("options", "is_coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"term": "dumb"}, False)],
)
def test_colours(spawn: Any, options: dict[str, str], is_coloured: bool) -> None:
    t = spawn("<think>Hm.</think>yes", "0", "1000", **options)
    t.expect("> ")
    t.type("hi\r")
    seen = t.expect(r"yes.*of 1000\].*> ")
    assert ("\x1b[2m" in seen) is is_coloured
    assert "thinking: " in seen
    assert "Hm." in seen.replace("\x1b[0m\x1b[2m", "")
    t.type("\x04")
    assert t.wait() == 0


def test_what_a_terminal_would_obey_is_left_out(spawn: Any) -> None:
    assert _visible("a\x1b[2J\x07\r\n\tb\x9bé世") == "a[2J\n\tbé世"
    t = spawn("a\x1b]0;x\x07b", "0", "1000")
    t.expect("> ")
    t.type("hi\r")
    assert "a]0;xb\r\n" in t.expect("of 1000")


def test_a_pipe_ends_at_ctrl_c() -> None:
    if os.name == "nt":
        pytest.skip("signals of Windows go to the whole group")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fake_chat.py"), "word " * 400, "0.01", "4000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hi\n")
    process.stdin.flush()
    assert process.stdout.read(9) == b"word word"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
