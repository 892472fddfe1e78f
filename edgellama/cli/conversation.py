"""A chat as it grows: its messages, what of them still fits, and files of them.

The terminal is `chat.py`'s.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.chat.messages import assistant_message, read_messages
from edgellama.errors import ContextOverflowError, EdgeLlamaError, UsageError, shown
from edgellama.generation import Delta, Timings

if TYPE_CHECKING:
    from edgellama.llm import LLM

_MAX_FILE = 64 << 20  # bytes
_PROBE = [{"role": "user", "content": "Hello"}]


class Conversation:
    """Messages and the options of answers to them.

    A chat that no longer leaves a quarter of the context to its answer loses its oldest turns, until it
    takes half: so what is left is evaluated anew once, and not at every turn.  The system message
    stays, and so does everything in `messages`.
    Raises: TemplateError when the model cannot chat, UsageError for an option.
    """

    def __init__(self, llm: LLM, system: str | None, options: dict[str, Any]) -> None:
        self.llm = llm
        self.system = system
        self.options = options
        self.messages: list[dict[str, Any]] = []
        self.n_dropped = 0  # of the oldest messages, no longer sent
        self.timings: Timings | None = None
        self.finish_reason: str | None = None
        llm.stream_chat(_PROBE, **options)  # nothing is evaluated

    def ask(self, text: str) -> Iterator[Delta]:
        """Answer a message; it is taken back when no word of an answer came."""
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def again(self) -> Iterator[Delta]:
        """Answer the last message anew; the answer before stays when no word of another came."""
        return self._answer(self.messages[: self._last_user() + 1])

    def undo(self) -> None:
        """Take back the last message and its answer."""
        del self.messages[self._last_user() :]
        self.n_dropped = min(self.n_dropped, len(self.messages))

    def clear(self) -> None:
        """Forget all messages but the system's."""
        self.messages.clear()
        self.n_dropped = 0

    def _last_user(self) -> int:
        for i in range(len(self.messages) - 1, -1, -1):
            if self.messages[i]["role"] == "user":
                return i
        raise UsageError("there is no message yet")

    def _sent(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages[self.n_dropped :]]

    def _answer(self, messages: list[dict[str, Any]]) -> Iterator[Delta]:
        text, reasoning = "", ""
        before, self.messages = self.messages, messages
        self.finish_reason = None
        try:
            self._fit()
            for delta in self.llm.stream_chat(self._sent(), **self.options):
                text += delta.text
                reasoning += delta.reasoning
                self.timings = delta.timings or self.timings
                self.finish_reason = delta.finish_reason
                yield delta
        finally:  # also where it was interrupted
            if text or reasoning or self.finish_reason:
                self.messages.append(assistant_message(text, reasoning, []))
            else:
                self.messages = before

    def _fit(self) -> None:
        n_ctx = self.llm.n_ctx
        names = ("chat_template", "chat_template_kwargs")
        options: dict[str, Any] = {n: self.options[n] for n in names if n in self.options}
        n = len(self.llm.render_chat(self._sent(), **options))
        if n <= n_ctx - n_ctx // 4:
            return
        last = self._last_user()
        while n > n_ctx // 2 and self.n_dropped < last:
            self.n_dropped += 1
            while self.n_dropped < last and self.messages[self.n_dropped]["role"] != "user":
                self.n_dropped += 1
            n = len(self.llm.render_chat(self._sent(), **options))
        if n >= n_ctx:
            raise ContextOverflowError(
                f"the message makes a prompt of {n} tokens; the context holds {n_ctx}; shorten it, or "
                "use a larger one (-c)"
            )

    def set(self, name: str, value: str) -> None:
        """Set an option of answers from text; an empty value is the default again.

        Raises: UsageError, and then nothing is changed.
        """
        from edgellama.keywords import ChatKeywords

        known = sorted(ChatKeywords.__annotations__.keys() - _NOT_SET)
        if name not in known:
            raise UsageError(f"there is no option {shown(name)}; options are {', '.join(known)}")
        options = {n: v for n, v in self.options.items() if n != name}
        if value:
            try:
                options[name] = json.loads(value)
            except (ValueError, RecursionError):
                options[name] = value
        self.llm.stream_chat(_PROBE, **options)
        self.options = options

    def save(self, path: Path) -> None:
        """Write the messages as a JSON file; a file that is there is replaced when all is written."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        text = json.dumps([*system, *self.messages], ensure_ascii=False, indent=1)
        try:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with open(handle, "w", encoding="utf-8", errors="surrogatepass") as file:
                    file.write(f"{text}\n")
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Replace the messages by those of a file.

        Raises: UsageError or TemplateError for a file without messages that the model's template
        takes; then nothing is changed.
        """
        try:
            if path.stat().st_size > _MAX_FILE:
                raise UsageError(f"{path} has over {_MAX_FILE >> 20} MB; this is no chat")
            messages = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{path} is no JSON; a file of /save is needed") from None
        if not isinstance(messages, list):
            raise UsageError(f"{path} has no list of messages; a file of /save is needed")
        try:
            read_messages(messages)
            if messages:
                self.llm.render_chat(messages)
        except EdgeLlamaError as error:
            raise UsageError(f"{path}: {error}") from None
        self.clear()
        self.system = None
        if messages and messages[0]["role"] == "system":
            self.system = read_messages(messages[:1])[0]["content"]
            messages = messages[1:]
        self.messages = messages


# What a chat of texts has no use for, or sets itself.
_NOT_SET = {
    "add_generation_prompt", "continue_final_message", "documents", "logprobs", "parse_special",
    "processors", "prompt_logprobs", "tool_choice", "tool_format", "tools", "top_logprobs",
}  # fmt: skip
