"""Messages and tools in OpenAI's form, checked, and made what templates expect of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from edgellama.errors import TemplateError, UsageError, shown

ROLES = ("system", "developer", "user", "assistant", "tool")


class ToolCall(NamedTuple):
    """A call that a model asks for; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


def read_messages(messages: Sequence[Mapping[str, Any]], source: str = "") -> list[dict[str, Any]]:
    """Return messages as a template with this source expects them.

    Content in text parts becomes one string; a developer speaks as the system and unknown roles are
    refused, unless the template names them; reasoning is `reasoning_content`.
    Raises: TemplateError naming the message.
    """
    return [_message(i, message, source) for i, message in enumerate(messages)]


def _message(i: int, message: Mapping[str, Any], source: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TemplateError(f"message {i} has no role; needed: role and content")
    out = dict(message)
    role = message["role"]
    if role not in source:
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise TemplateError(f"message {i} has the role {shown(role)}; roles are {known}")
        if role == "developer":
            out["role"] = "system"
    if out.get("tool_calls") is None:
        out.pop("tool_calls", None)
    else:
        out["tool_calls"] = _tool_calls(i, out["tool_calls"])
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(_text(i, part) for part in content)
    elif content is None and "tool_calls" not in out:
        if role != "assistant":
            raise TemplateError(f"message {i} has no content; needed: a text")
        content = ""
    elif not isinstance(content, str | None):
        raise TemplateError(
            f"message {i} has content of type {type(content).__name__}; text is needed"
        )
    out["content"] = content
    reasoning = out.pop("reasoning", None)
    if isinstance(reasoning, str):
        out.setdefault("reasoning_content", reasoning)
    return out


def _text(i: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise TemplateError(f"message {i} has a part of type {kind!r}; only text is understood")
    return str(part["text"])


def _tool_calls(i: int, calls: Any) -> list[dict[str, Any]]:
    """Return calls with their arguments as objects, which most templates write themselves."""
    out = []
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TemplateError(f"message {i} has a tool call without function and name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):  # then it stays as the model wrote it
                arguments = json.loads(arguments or "{}")
        out.append({**call, "function": {**function, "arguments": arguments}})
    return out


def with_arguments_as_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose tool calls have JSON texts for arguments: some templates join texts."""

    def as_text(call: Mapping[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return [
        {**m, "tool_calls": [as_text(call) for call in m["tool_calls"]]}
        if "tool_calls" in m
        else dict(m)
        for m in messages
    ]


def assistant_message(text: str, reasoning: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """Return an answer as a message for the chat's history."""
    out: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
    if reasoning:
        out["reasoning_content"] = reasoning
    if calls:
        out["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
    return out


def read_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tools as {"type": "function", "function": {...}}; functions alone are taken too.

    Raises: UsageError naming the tool.
    """
    if not isinstance(tools, list | tuple):
        raise UsageError(f"tools is {shown(tools)}; a list of functions is needed")
    out: list[dict[str, Any]] = []
    for i, tool in enumerate(tools):
        is_wrapped = isinstance(tool, Mapping) and tool.get("type", "function") == "function"
        function = tool.get("function", tool) if is_wrapped else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise UsageError(
                f'tool {i} is not like {{"type": "function", "function": {{"name": ...}}}}'
            )
        if not isinstance(function.get("parameters", {}), Mapping):
            raise UsageError(f"tool {i}, {shown(name)}, has parameters that are no JSON schema")
        if name in {t["function"]["name"] for t in out}:
            raise UsageError(f"two tools are called {shown(name)}; names must differ")
        out.append({"type": "function", "function": dict(function)})
    return out
