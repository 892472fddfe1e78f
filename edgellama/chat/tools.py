"""Calls of tools in what a model says: the forms that families were trained on, read as they stream.

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>          Hermes, Qwen
    llama3   <|python_tag|>{"name": ..., "parameters": {...}}, the same object alone as the whole
             answer, or <function=NAME>{...}</function>                        Llama 3
    mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}], or
             [TOOL_CALLS]NAME[ARGS]{...}                                       Mistral

A call is given out when it is complete; what turns out to be none is text, as it came.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from edgellama.errors import UsageError, shown
from edgellama.stopping import overlap

from .messages import ToolCall

# Calls, and how many characters they take; None when more is needed.  ValueError: these are no calls.
_Read = tuple[list[ToolCall], int] | None


class ToolFormat(NamedTuple):
    """How a family writes calls."""

    openings: tuple[str, ...]
    read: Callable[
        [str, bool, Collection[str]], _Read
    ]  # what is held, whether it is all, known names
    marks: tuple[str, ...] = ()  # others that may be special tokens
    bare: bool = False  # a call may be the whole answer, without a mark


def _call(given: Any, name: str = "") -> ToolCall:
    """Return the call that an object describes.  Raises: ValueError."""
    if not isinstance(given, dict):
        raise ValueError("a call is no object")
    if isinstance(given.get("function"), dict):
        given = given["function"]
    name = name or given.get("name") or given.get("function") or ""
    arguments = given.get("arguments", given.get("parameters", {}))
    if isinstance(arguments, str):  # a text of JSON, as the interface has it
        arguments = _loads(arguments)
    if not name or not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("a call needs a name and arguments")
    own = given.get("id")
    return ToolCall(
        own if isinstance(own, str) and own else secrets.token_hex(5)[:9],  # Mistral wants nine
        name,
        json.dumps(arguments, ensure_ascii=False),
    )


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constant)


def _loads(text: str) -> Any:
    try:
        return _decoder.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _next_value(text: str, start: int, is_all: bool) -> tuple[Any, int] | None:
    """Return the JSON value that begins at `start` and where it ends; None while it is incomplete."""
    try:
        return _decoder.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        if is_all or isinstance(error, RecursionError):
            raise ValueError("no JSON") from None
        return None


def _read_hermes(held: str, is_all: bool, names: Collection[str]) -> _Read:
    start, end = len("<tool_call>"), 0
    while True:
        end = held.find("</tool_call>", max(end, start))
        if end < 0:
            if not is_all:
                return None
            return [_call(_loads(held[start:]))], len(held)  # the end of the answer closes it too
        body = held[start:end]
        try:
            return [_call(_loads(body))], end + len("</tool_call>")
        except ValueError:
            if not _ends_in_string(body):
                raise
            end += 1  # the mark is part of an argument


def _ends_in_string(text: str) -> bool:
    return '"' in re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.DOTALL)


def _read_llama3(held: str, is_all: bool, names: Collection[str]) -> _Read:
    if held.startswith("<function="):
        end = held.find("</function>")
        if end < 0 and not is_all:
            return None
        found = re.match(
            r"<function=([^>\s]+)>(.*)", held[: len(held) if end < 0 else end], re.DOTALL
        )
        if found is None:
            raise ValueError("no name")
        call = _call({"arguments": _loads(found[2])}, found[1])
        return [call], len(held) if end < 0 else end + len("</function>")
    is_marked = held.startswith("<|python_tag|>")
    at = len("<|python_tag|>") if is_marked else 0
    first_key = re.match(r'\{\s*"(\w*)"', held)
    if (
        not is_marked
        and first_key
        and first_key[1] not in ("name", "type", "function", "parameters")
    ):
        raise ValueError("an object of another kind")  # found early, so that it streams
    if not is_all:  # another call may follow; text is none
        return None
    calls = []
    while at < len(held):
        at += len(held[at:]) - len(held[at:].lstrip("; \t\r\n"))
        value = _next_value(held, at, True) if at < len(held) else None
        if value is None:
            break
        calls.append(_call(value[0]))
        at = value[1]
    if not calls or not (is_marked or all(call.name in names for call in calls)):
        raise ValueError("an object of another kind")
    return calls, len(held)


def _read_mistral(held: str, is_all: bool, names: Collection[str]) -> _Read:
    start = len("[TOOL_CALLS]")
    found = re.compile(r"\s*([^\[\]{}\s]+)(?:\[CALL_ID\](\w+))?(?:\[ARGS\])?\s*(?=\{)").match(
        held, start
    )
    if found is not None:
        value = _next_value(held, found.end(), is_all)
        if value is None:
            return None
        return [_call({"arguments": value[0], "id": found[2]}, found[1])], value[1]
    start += len(held[start:]) - len(held[start:].lstrip())
    value = _next_value(held, start, is_all) if held.startswith("[", start) or is_all else None
    if value is None:
        return None
    return [_call(one) for one in (value[0] if isinstance(value[0], list) else [value[0]])], value[
        1
    ]


FORMATS = {
    "hermes": ToolFormat(("<tool_call>",), _read_hermes, ("</tool_call>",)),
    "llama3": ToolFormat(
        ("<|python_tag|>", "<function="), _read_llama3, ("</function>",), bare=True
    ),
    "mistral": ToolFormat(("[TOOL_CALLS]",), _read_mistral, ("[ARGS]", "[CALL_ID]")),
}


def find_format(
    source: str, is_token: Callable[[str], bool], wanted: str | None = None
) -> ToolFormat:
    """Return the form of calls: the wanted one, or that of the marks in the template or vocabulary.

    Raises: UsageError for a name that is not known.
    """
    if wanted is not None:
        if wanted not in FORMATS:
            raise UsageError(f"tool_format is {shown(wanted)}; formats are {', '.join(FORMATS)}")
        return FORMATS[wanted]
    named = [f for f in FORMATS.values() if any(mark in source for mark in f.openings)]
    known = [f for f in FORMATS.values() if any(map(is_token, f.openings))]
    return next(iter([*named, *known]), FORMATS["llama3"])  # an object alone is what others say


class ToolReader:
    """Takes calls out of text."""

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._format = form
        self._names = names
        self._held = ""
        self._begun = False  # whether text came
        self._n_calls = 0

    def feed(self, text: str, is_all: bool = False) -> tuple[str, list[ToolCall]]:
        """Return (text, calls) that are certain; `is_all`: no more comes."""
        self._held += text
        out: str = ""
        calls: list[ToolCall] = []
        while True:
            start, mark = self._opening()
            if start < 0:
                keep = 0
                if not is_all:
                    keep = max(overlap(self._held, o) for o in self._format.openings)
                certain = self._held[: len(self._held) - keep]
                if not is_all or not certain.strip():
                    certain = certain.rstrip()
                rest = self._held[len(certain) :]
                if is_all and not self._n_calls:
                    certain, rest = self._held, ""
                out += certain
                self._held = rest
                self._begun = self._begun or bool(certain)
                return out, calls
            before = self._held[:start].rstrip()
            out += before
            self._held = self._held[len(before) :]
            self._begun = self._begun or bool(before)
            start -= len(before)
            try:
                found = self._format.read(self._held[start:], is_all, self._names)
            except ValueError:
                out += self._held[: start + len(mark)]
                self._held = self._held[start + len(mark) :]
                self._begun = True
                continue
            if found is None:
                return out, calls
            calls += found[0]
            self._n_calls += len(found[0])
            self._held = self._held[start + found[1] :]

    def _opening(self) -> tuple[int, str]:
        """Return where the first opening is, and which; -1 without one."""
        found = [(at, o) for o in self._format.openings if (at := self._held.find(o)) >= 0]
        if self._format.bare and not self._begun and self._held.lstrip()[:1] == "{":
            found.append((self._held.index("{"), "{"))
        return min(found, default=(-1, ""))
