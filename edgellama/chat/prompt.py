"""From messages and options to a prompt's token ids, and to a reader of what the model answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.errors import TemplateError, UsageError, shown
from edgellama.generation import Delta

from .messages import ToolCall, read_tools
from .reasoning import MARKS, Marks, ReasoningReader
from .template import MAX_SOURCE, ChatTemplate
from .tools import ToolFormat, ToolReader, find_format

if TYPE_CHECKING:
    from edgellama.tokenizer import Tokenizer

_KEY = "tokenizer.chat_template"
_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")
CHAT_OPTIONS = (
    "tools", "tool_choice", "tool_format", "documents", "chat_template", "chat_template_kwargs",
    "add_generation_prompt", "continue_final_message", "reasoning_format",
)  # fmt: skip


class ChatPrompt:
    """Token ids of a chat, and how the answer to it is read."""

    def __init__(
        self,
        ids: list[int],
        shown: frozenset[int],
        new_reasoning: Callable[[], ReasoningReader] | None,
        new_tools: Callable[[], ToolReader] | None,
    ) -> None:
        self.ids = ids
        self.shown = shown  # special tokens whose text the answer must show
        self._new_reasoning = new_reasoning
        self._new_tools = new_tools

    def read(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        """Split the pieces of one answer into text, reasoning and tool calls."""
        reasoning = self._new_reasoning() if self._new_reasoning else None
        tools = self._new_tools() if self._new_tools else None
        n_calls = 0
        for delta in deltas:
            thought, text = "", delta.text
            calls: list[ToolCall] = []
            is_last = delta.finish_reason is not None
            if reasoning:
                thought, text = reasoning.feed(text)
                if is_last:
                    more, rest = reasoning.flush()
                    thought, text = thought + more, text + rest
            if tools:
                text, calls = tools.feed(text, is_last)
            n_calls += len(calls)
            reason = delta.finish_reason
            if reason == "stop" and n_calls:
                reason = "tool_calls"
            yield delta._replace(
                text=text, reasoning=thought, tool_calls=calls or None, finish_reason=reason
            )


class Chat:
    """The templates of a model and what else its vocabulary tells of its chats.

    `chat_template` replaces the file's: the name of another one in it, a path, or jinja itself.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        metadata: Mapping[str, Any],
        chat_template: str | os.PathLike[str] | None = None,
    ) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._sources = {
            key[len(_KEY) :].removeprefix("."): source
            for key, source in metadata.items()
            if (key == _KEY or key.startswith(f"{_KEY}.")) and isinstance(source, str)
        }  # "" is the default
        self._templates: dict[str, ChatTemplate] = {}
        self._default = chat_template
        if chat_template is not None:
            self.template(chat_template)  # one that cannot be read is found at once

    def template(
        self, wanted: str | os.PathLike[str] | None = None, has_tools: bool = False
    ) -> ChatTemplate | None:
        """Return a template, if there is one; with tools, the file's own for them comes first.

        Raises: UsageError for a name that the file does not have, or a path that cannot be read.
        """
        wanted = self._default if wanted is None else wanted
        if wanted is None:
            name = "tool_use" if has_tools and "tool_use" in self._sources else ""
            source = self._sources.get(name)
        elif isinstance(wanted, str):
            source = self._sources.get("" if wanted == "default" else wanted)
            if source is None and "{" in wanted:
                source = wanted
            if source is None:
                names = ", ".join(name or "default" for name in self._sources) or "none"
                raise UsageError(f"there is no chat template {shown(wanted)}; the file has {names}")
        else:
            source = _read(Path(wanted))
        if source is None:
            return None
        if source not in self._templates:
            ids = (self._tokenizer.bos_id, self._tokenizer.eos_id)
            bos, eos = ("" if i is None else self._tokenizer.token_text(i) for i in ids)
            self._templates[source] = ChatTemplate(source, bos, eos)
        return self._templates[source]

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        tool_format: str | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        reasoning_format: str = "split",
    ) -> ChatPrompt:
        """Write a chat as the template has it.

        Raises: TemplateError without a template, or when it fails; UsageError for an option.
        """
        if reasoning_format not in ("split", "text"):
            raise UsageError(f"reasoning_format is {reasoning_format!r}; it must be split or text")
        variables = dict(chat_template_kwargs or {})
        for name in _OWN_VARIABLES:
            if name in variables:
                raise UsageError(
                    f"chat_template_kwargs has {name!r}, which is an option of its own"
                )
        given = _chosen(read_tools(tools or []), tool_choice)
        template = self.template(chat_template, bool(given))
        if template is None:
            raise TemplateError(
                f"{self._name} has no chat template; continue plain text instead (--raw)"
            )
        if given:
            if "tools" not in template.source:
                raise TemplateError(
                    f"the chat template of {self._name} takes no tools; give one that does "
                    "(--chat-template)"
                )
            variables["tools"] = given
        if documents:
            if "documents" not in template.source:
                raise TemplateError(
                    f"the chat template of {self._name} takes no documents; give one that does "
                    "(--chat-template)"
                )
            variables["documents"] = list(documents)
        marks = self._marks(template.source) if reasoning_format == "split" else None
        if continue_final_message:
            *messages, last = messages
            text = template.render(messages, **variables)
            text = _continued(text, last, marks)
        else:
            text = template.render(
                messages, add_generation_prompt=add_generation_prompt, **variables
            )
        form = find_format(template.source, self._is_token, tool_format) if given else None
        is_open = marks is not None and _is_open(
            text, last if continue_final_message else None, marks
        )
        return ChatPrompt(
            self._encode(text),
            self._shown(marks, form),
            (lambda: ReasoningReader(marks, is_open)) if marks else None,
            (lambda: ToolReader(form, {t["function"]["name"] for t in given})) if form else None,
        )

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, False, True)
        bos = self._tokenizer.bos_id
        if self._tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def _token(self, text: str) -> int | None:
        """The special token that is written so."""
        ids = self._tokenizer.encode(text, False, True)
        return ids[0] if len(ids) == 1 and self._tokenizer.is_special(ids[0]) else None

    def _is_token(self, text: str) -> bool:
        return len(self._tokenizer.encode(text, False, True)) == 1

    def _marks(self, source: str) -> Marks | None:
        """The marks of reasoning: those that the template names, or the vocabulary has."""
        named = [m for m in MARKS if m.closing in source or m.opening in source]
        return next(iter([*named, *(m for m in MARKS if self._is_token(m.closing))]), None)

    def _shown(self, marks: Marks | None, form: ToolFormat | None) -> frozenset[int]:
        texts = [*(marks or ()), *(form.openings + form.marks if form else ())]
        return frozenset(i for text in texts if (i := self._token(text)) is not None)


def _chosen(tools: list[dict[str, Any]], choice: str | Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tools that a choice leaves to the model.  Raises: UsageError."""
    if choice == "auto":
        return tools
    if choice == "none":
        return []
    named = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = named.get("name") if isinstance(named, Mapping) else None
    if choice != "required" and name is None:
        raise UsageError(
            f"tool_choice is {shown(choice)}; it must be auto, none, required or "
            '{"type": "function", "function": {"name": ...}}'
        )
    names = [tool["function"]["name"] for tool in tools]
    if name is not None and name not in names:
        raise UsageError(f"tool_choice is {shown(name)}; tools are {', '.join(names) or 'none'}")
    raise UsageError('a call cannot be forced yet; use tool_choice "auto"')


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > 4 * MAX_SOURCE:
            raise UsageError(
                f"{path} is too large for a chat template; {MAX_SOURCE} characters are allowed"
            )
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"the chat template {path} cannot be read: {reason}") from None


def _continued(prompt: str, last: Mapping[str, Any], marks: Marks | None) -> str:
    """Return a prompt that goes on within an answer, whose beginning is the message given.

    Raises: UsageError when it is no answer.
    """
    content = last.get("content") if isinstance(last, Mapping) else None
    if isinstance(content, list | tuple):
        content = "".join(
            str(part.get("text", "")) for part in content if isinstance(part, Mapping)
        )
    if not isinstance(content, str) or last.get("role") != "assistant" or last.get("tool_calls"):
        raise UsageError("continue_final_message needs a last message of the assistant, with text")
    if marks is None:
        return prompt + content
    reasoning = last.get("reasoning_content") or last.get("reasoning") or ""
    if prompt.rstrip().endswith(marks.opening):  # it has opened what the answer may be past already
        if content.lstrip().startswith(marks.opening):
            return prompt.rstrip()[: -len(marks.opening)] + content.lstrip()
        return f"{prompt}{reasoning}\n{marks.closing}\n\n{content}"
    if reasoning:
        return f"{prompt}{marks.opening}\n{reasoning}\n{marks.closing}\n\n{content}"
    return prompt + content


def _is_open(prompt: str, last: Mapping[str, Any] | None, marks: Marks) -> bool:
    """Say whether a prompt ends within reasoning."""
    if last is None:
        return prompt.rstrip().endswith(marks.opening)
    content = prompt[prompt.rfind(marks.opening) :]
    return marks.opening in str(last.get("content")) and marks.closing not in content
