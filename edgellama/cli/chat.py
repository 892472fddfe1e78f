"""`edgellama chat`: a conversation in a terminal, or line by line through a pipe.

The line is edited by readline, which is 1 ms of a start (prompt_toolkit: 130) and knows how wide
characters are; where there is none, the terminal edits it.  Answers go to stdout, all else to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellama.errors import EdgeLlamaError, UsageError

from . import plain
from .options import GroupedCommand, model_options, open_model, sampling_options

if TYPE_CHECKING:
    from edgellama.generation import Delta

    from .conversation import Conversation

_HELP = '''\
/help                 show this
/system [TEXT]        show or set the system message
/save FILE            write the messages as JSON
/load FILE            go on with the messages of a file
/regen                answer the last message again
/undo                 take back the last message and its answer
/stats                show speeds and how full the context is
/set [OPTION [VALUE]] show or set options of answers; without VALUE, the default
/clear                forget all messages but the system's
/exit                 leave, as Ctrl-D does

A message of several lines: end each with \\, or begin and end with """; Alt-Enter breaks a line, too.
Ctrl-C stops an answer, and on an empty line, twice, leaves.  A space before / makes it a message.'''


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@click.option("-n", "--max-tokens", type=click.IntRange(0), help="Most tokens of an answer.")
@click.option("--system", help="The system message.")
@click.option("--stop", multiple=True, help="Stop before this text; may be repeated.")
@click.option("--load", type=click.Path(path_type=Path), metavar="FILE", help="Go on with a chat.")
@model_options
@sampling_options
def command(model: str | None, system: str | None, load: Path | None, **options: Any) -> None:
    """Chat with MODEL (a path, a name of the catalogue, hf:org/repo/file.gguf or a URL).

    In a terminal, /help shows the commands.  Without one, every line of stdin is a message.
    """
    with open_model(model, options) as llm:
        from .conversation import Conversation

        given = {name: value for name, value in options.items() if value not in (None, ())}
        chat = Conversation(llm, system, given)
        if load is not None:
            chat.load(load)
        is_terminal = sys.stdin is not None and sys.stdin.isatty()
        (_Terminal if is_terminal else _Pipe)(chat).run()


class _Pipe:
    """Messages from the lines of stdin; what goes wrong ends it."""

    def __init__(self, chat: Conversation) -> None:
        self.chat = chat
        self.is_shown = False  # reasoning and statistics, on a terminal
        self.is_coloured = False

    def run(self) -> None:
        """Read messages and commands to the end of the input."""
        while (text := self.read_message()) is not None:
            if text.strip() and not self.obey(text):
                return

    # --- input ------------------------------------------------------------------------------------
    def read_line(self, prompt: str) -> str | None:
        line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        return line.decode(errors="replace").rstrip("\r\n") if line else None

    def read_message(self) -> str | None:
        """Return a message, which may be several lines; None at the end of the input."""
        line = self.read_line("> ")
        if line is None:
            return None
        lines = [line]
        if line.startswith('"""'):
            lines[0] = line[3:]
            while not lines[-1].rstrip().endswith('"""'):
                more = self.read_line("… " if _is_utf8() else ". ")
                if more is None:
                    return "\n".join(lines)
                lines.append(more)
            lines[-1] = lines[-1].rstrip()[:-3]
            return "\n".join(lines).strip("\n")
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            more = self.read_line("… " if _is_utf8() else ". ")
            if more is None:
                break
            lines.append(more)
        return "\n".join(lines)

    # --- commands ---------------------------------------------------------------------------------
    def obey(self, text: str) -> bool:
        """Do what a line says; False to leave."""
        if not text.startswith("/"):
            self.show(self.chat.ask(text))
            return True
        name, _, rest = text[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self.say(_HELP),
            "system": self.system,
            "save": lambda path: self.chat.save(_path(path, "/save")),
            "load": self.load,
            "regen": lambda _: self.show(self.chat.again()),
            "undo": lambda _: self.chat.undo(),
            "stats": lambda _: self.say(statistics(self.chat)),
            "set": self.set,
            "clear": lambda _: self.chat.clear(),
        }
        if name == "exit":
            return False
        if name not in commands:
            known = ", ".join(f"/{known}" for known in [*commands, "exit"])
            raise UsageError(f"there is no command /{plain(name)}; commands are {known}")
        commands[name](rest.strip())
        return True

    def system(self, text: str) -> None:
        if text:
            self.chat.system = text
        else:
            self.say(plain(self.chat.system or "there is no system message"))

    def load(self, path: str) -> None:
        self.chat.load(_path(path, "/load"))
        self.say(f"{len(self.chat.messages)} messages")

    def set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name:
            self.chat.set(name, value.strip())
        else:
            options = self.chat.options.items()
            self.say("\n".join(f"{n} = {v!r}" for n, v in options) or "all options are the default")

    # --- output -----------------------------------------------------------------------------------
    def say(self, text: str, end: str = "\n") -> None:
        """Write what is no answer."""
        if sys.stderr is not None:
            sys.stderr.write(f"\x1b[2m{text}\x1b[0m{end}" if self.is_coloured else f"{text}{end}")
            sys.stderr.flush()

    def write(self, text: str) -> None:
        """Write a piece of an answer, whole characters."""
        sys.stdout.buffer.write(text.encode(errors="replace"))
        sys.stdout.buffer.flush()

    def show(self, deltas: Iterator[Delta]) -> None:
        """Write an answer as it comes, and below it how fast it came."""
        n_dropped = self.chat.n_dropped
        is_thinking = False
        with closing(deltas):  # type: ignore[type-var]
            for delta in deltas:
                if self.chat.n_dropped != n_dropped:
                    n_dropped = self.chat.n_dropped
                    self.say(
                        f"the context is filling: {n_dropped} oldest messages are left out now"
                    )
                if delta.reasoning and self.is_shown:
                    self.say(
                        ("" if is_thinking else "thinking: ") + _visible(delta.reasoning), end=""
                    )
                    is_thinking = True
                if delta.text:
                    if is_thinking:
                        self.say("\n")
                        is_thinking = False
                    self.write(delta.text)
        self.write("\n")
        t, n_ctx = self.chat.timings, self.chat.llm.n_ctx
        if (
            t is not None
            and self.chat.finish_reason == "length"
            and t.prompt_n + t.predicted_n > n_ctx
        ):
            self.say(
                f"the context is full ({n_ctx} tokens), which ended the answer; the next message goes "
                "on without the oldest ones; -c makes it larger"
            )
        if self.is_shown and t is not None:
            self.say(f"[{_speed(t)}; context {t.prompt_n + t.predicted_n} of {n_ctx}]")


class _Terminal(_Pipe):
    """Somebody types; what goes wrong is said, and the chat goes on."""

    def __init__(self, chat: Conversation) -> None:
        super().__init__(chat)
        self.is_shown = True
        self.is_coloured = (
            "NO_COLOR" not in os.environ
            and os.environ.get("TERM") != "dumb"
            and sys.stderr is not None
            and sys.stderr.isatty()
            and os.name != "nt"  # old consoles show the codes
        )
        self.is_edited = sys.stdout is not None and sys.stdout.isatty()
        if self.is_edited:
            with suppress(ImportError):  # Windows
                import readline

                if "libedit" not in (readline.__doc__ or ""):
                    readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')  # Alt-Enter

    def run(self) -> None:
        self.say("/help shows commands; Ctrl-D leaves")
        is_leaving = False
        while True:
            try:
                text = self.read_message()
            except KeyboardInterrupt:
                if is_leaving:
                    self.say("")
                    return
                self.say("\nCtrl-C again, or Ctrl-D, leaves")
                is_leaving = True
                continue
            if text is None:
                self.say("")
                return
            is_leaving = False
            try:
                if text.strip() and not self.obey(text):
                    return
            except KeyboardInterrupt:
                self.say("\n[stopped]")
            except EdgeLlamaError as error:
                self.say(plain(" ".join(str(error).split())))

    def read_line(self, prompt: str) -> str | None:
        if not self.is_edited:
            self.say(prompt, end="")
            return super().read_line(prompt)
        try:
            return input(prompt)
        except EOFError:
            return None

    def write(self, text: str) -> None:
        if self.is_edited:
            sys.stdout.write(_visible(text))
            sys.stdout.flush()
        else:
            super().write(text)


def statistics(chat: Conversation) -> str:
    """Return how fast the last answer was, and how full the context is."""
    lines = [f"{len(chat.messages)} messages, {chat.n_dropped} of them no longer sent"]
    t = chat.timings
    if t is not None:
        n, n_ctx = t.prompt_n + t.predicted_n, chat.llm.n_ctx
        lines = [
            f"prompt   {t.prompt_n} tokens, {t.cached_n} of them known already, {t.prompt_s:.2f} s",
            f"answer   {_speed(t)}",
            f"context  {n} of {n_ctx} tokens ({n / n_ctx:.0%})",
            *lines,
        ]
    return "\n".join(lines)


def _speed(t: Any) -> str:
    return f"{t.predicted_n} tokens, {max(t.predicted_n - 1, 0) / max(t.predicted_s, 1e-9):.1f} a second"


def _visible(text: str) -> str:
    """Return a model's words without what a terminal would obey."""
    return "".join(c for c in text if c in "\n\t" or not (c < " " or "\x7f" <= c < "\xa0"))


def _path(text: str, command: str) -> Path:
    if not text:
        raise UsageError(f"{command} needs the name of a file")
    return Path(text).expanduser()


def _is_utf8() -> bool:
    return sys.stdout is not None and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
