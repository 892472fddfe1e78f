"""From the options of an answer to a grammar as llguidance reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgellama.errors import GrammarError, UsageError, shown

from .gbnf import gbnf_to_lark
from .schema import check_schema

_N_RULES = 1000  # llguidance resolves them by recursion
_N_BYTES = 4 << 20
_FORMATS = "text, json_object, json_schema"


def read_grammar(
    response_format: Mapping[str, Any] | None = None,
    json_schema: Mapping[str, Any] | bool | str | None = None,
    grammar: str | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
) -> str | None:
    """Return the grammar that one of the options asks for, None if none does.

    Raises: UsageError for a value that is none, GrammarError for a grammar that cannot be used.
    """
    options = {
        "response_format": response_format, "json_schema": json_schema, "grammar": grammar,
        "regex": regex, "choices": choices,
    }  # fmt: skip
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are given; an answer can have one of them")
    if response_format is not None:
        if _kind(response_format) == "text":
            return None
        json_schema = _schema_of(response_format)
    if json_schema is not None:
        return _of_schema(json_schema)
    if grammar is not None:
        return _of_grammar(_text("grammar", grammar))
    if regex is not None:
        return _serialized("lark_grammar", f"start: TEXT\nTEXT: {_quoted(_text('regex', regex))}")
    return None if choices is None else _of_choices(choices)


def _kind(response_format: Any) -> str:
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if not isinstance(kind, str) or kind not in _FORMATS.split(", "):
        seen = shown(response_format if kind is None else kind)
        raise UsageError(f"response_format is {seen}; its type must be one of {_FORMATS}")
    known = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    for name in response_format.keys() - known:
        raise UsageError(f"response_format of type {kind} has no field {shown(name)}")
    return kind


def _schema_of(response_format: Mapping[str, Any]) -> Any:
    """The schema within a response_format as OpenAI has it; every one is kept strictly."""
    if response_format["type"] == "json_object":
        return {"type": "object"}
    inner = response_format.get("json_schema")
    if not isinstance(inner, Mapping) or "schema" not in inner:
        raise UsageError('response_format needs {"json_schema": {"name": ..., "schema": {...}}}')
    for name in inner.keys() - {"name", "description", "schema", "strict"}:
        raise UsageError(f"response_format.json_schema has no field {shown(name)}")
    return inner["schema"]


def _of_schema(schema: Any) -> str:
    try:
        schema = json.loads(schema) if isinstance(schema, str) else json.loads(json.dumps(schema))
    except (ValueError, TypeError) as error:
        raise GrammarError(f"the JSON Schema is no JSON: {error}") from None
    except RecursionError:
        raise GrammarError("the JSON Schema is nested too deeply") from None
    return _serialized("json_schema", check_schema(schema))


def _of_grammar(text: str) -> str:
    if re.search(r"(?m)^\s*[\w-]+\s*::=", text):
        text = gbnf_to_lark(text)
    n_rules = len(re.findall(r"(?m)^\s*[?!]?[A-Za-z_]", text))
    if n_rules > _N_RULES:
        raise GrammarError(f"the grammar has {n_rules} rules; {_N_RULES} are allowed")
    found = re.search(r"(?m)^[^\"/#\n]*(%json|%llguidance|%import|%lark|@\w)", text)
    if found and not re.match(r"\s*%llguidance\s*\{\s*\}", found[0] + text[found.end() :]):
        raise GrammarError(
            f"the grammar has {found[1]}, which is not supported; a schema is given as json_schema"
        )
    return _serialized("lark_grammar", text)


def _of_choices(choices: Any) -> str:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise UsageError(f"choices is {shown(choices)}; a list of texts is needed")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise UsageError(f"choices has {shown(choice)}; only texts that are not empty can be")
    # A regular expression, so that they are alternatives of one lexeme: "a" does not rule out "ab".
    texts = "|".join(map(_escaped, choices))
    return _serialized("lark_grammar", f"start: TEXT\nTEXT: /{texts}/")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} is {shown(value)}; a text is needed")
    if not value.strip() and name == "grammar":
        raise GrammarError("the grammar is empty")
    return value


def _quoted(regex: str) -> str:
    """A regular expression between slashes, which Lark ends at a slash or a line's end."""
    parts = re.findall(r"\\.|.", regex, re.DOTALL)
    if parts and parts[-1] == "\\":
        raise GrammarError("the regular expression ends in a backslash")
    instead = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\\\n": r"\n"}
    return f"/{''.join(instead.get(part, part) for part in parts)}/"


def _escaped(text: str) -> str:
    """A regular expression that a text alone matches."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\u{{{ord(c):x}}}" for c in text)


def _serialized(kind: str, grammar: Any) -> str:
    try:
        text = json.dumps({"grammars": [{kind: grammar}]}, ensure_ascii=False)
        n_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise GrammarError("the grammar holds a lone surrogate, which is no character") from None
    if n_bytes > _N_BYTES:
        raise GrammarError(f"the grammar has {n_bytes} bytes; {_N_BYTES} are allowed")
    return text
