"""Which JSON Schemas are kept to the letter; any other is an error that names the place.

llguidance refuses some keywords, ignores those that it does not know, and is wider than the
specification in a few places, which `benchmarks/json_schema.py` finds; here these become errors.
Source: JSON Schema draft 2020-12, and draft 7 where it differs.
"""

from __future__ import annotations

import re
from typing import Any

from edgellama.errors import GrammarError, shown

_DEPTH = 100
_N_PARTS = 4000  # llguidance follows references by recursion
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_ONE = ("items", "additionalProperties", "additionalItems")
_VALUES = (
    "type", "enum", "const", "required", "minItems", "maxItems", "minLength", "maxLength", "pattern",
    "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "minProperties", "maxProperties", "$ref", "$id", "$schema",
)  # fmt: skip
# They say nothing of what is valid.
_NOTES = (
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly",
    "$comment", "$anchor",
)  # fmt: skip
_KNOWN = frozenset((*_LISTS, *_MAPS, *_ONE, *_VALUES, *_NOTES))
# Between the parts of JSON: nothing, a space, or a new line and its indentation.  What models write, and
# no endless white space, into which small ones fall.
_OPTIONS = {"whitespace_pattern": r"\x20|\n[\x20\t]{0,40}", "lenient": False}


_DATE = (
    r"(?:\d\d\d\d-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    r"|02-(?:0[1-9]|1\d|2[0-8]))"
    r"|(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
# Leap seconds, which depend on the offset, are left out.
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d+)?(?:[zZ]|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
# Formats that llguidance has wider than their RFC 3339.
_FORMATS = {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}[tT]{_TIME}"}


def check_schema(schema: Any) -> dict[str, Any]:
    """Return a parsed JSON Schema as llguidance takes it.

    Raises: GrammarError naming the keyword and where it stands.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError(f"the JSON Schema is {shown(schema)}; an object is needed")
    return {**_Checker().checked("#", schema, 0), "x-guidance": _OPTIONS}


class _Checker:
    """Goes through a schema and all below it; `at` is where, as a JSON pointer."""

    def __init__(self) -> None:
        self._n_parts = 0

    def checked(self, at: str, schema: Any, depth: int) -> Any:
        """Return a schema with what llguidance has wider made narrow."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise GrammarError(f"JSON Schema {at} is {shown(schema)}; an object is needed")
        self._n_parts += 1
        if depth > _DEPTH or self._n_parts > _N_PARTS:
            raise GrammarError(
                f"the JSON Schema has more than {_N_PARTS} schemas in it, or more than {_DEPTH} levels"
            )
        if schema.get("uniqueItems") is False:
            schema = {name: value for name, value in schema.items() if name != "uniqueItems"}
        _check_keywords(at, schema)
        out = {}
        for name, value in schema.items():
            if name in _MAPS and isinstance(value, dict):
                is_pattern = name == "patternProperties"
                value = {
                    _pattern(at, key) if is_pattern else key: self.checked(
                        f"{at}/{name}/{key}", below, depth + 1
                    )
                    for key, below in value.items()
                }
            elif (name in _LISTS or name == "items") and isinstance(value, list):
                value = [
                    self.checked(f"{at}/{name}/{i}", below, depth + 1)
                    for i, below in enumerate(value)
                ]
            elif name in _ONE:
                value = self.checked(f"{at}/{name}", value, depth + 1)
            elif name == "pattern":
                value = _pattern(at, value)
            out[name] = value
        name = out.get("format")
        if isinstance(name, str) and name in _FORMATS:
            del out["format"]
            more = {"pattern": f"^(?:{_FORMATS[name]})$"}
            out["allOf"] = [*out.get("allOf", ()), more]
        return out


def _check_keywords(at: str, schema: dict[str, Any]) -> None:
    for name in schema:
        if name not in _KNOWN and not (name.startswith("x-") and name != "x-guidance"):
            raise GrammarError(f"JSON Schema {at} has {shown(name)}, which is not supported")
    if "$id" in schema and at != "#":
        raise GrammarError(f"JSON Schema {at} has '$id', which is supported at the top only")
    if schema.get("format") == "hostname":
        raise GrammarError(
            f"JSON Schema {at} has the format 'hostname', which is not supported; give a pattern"
        )
    least, required = schema.get("minProperties"), schema.get("required")
    n_required = len(required) if isinstance(required, list) else 0
    if isinstance(least, int) and least > max(n_required, 1):
        raise GrammarError(
            f"JSON Schema {at} has minProperties {least}, but {n_required} required ones; that names "
            "differ is not supported"
        )


def _pattern(at: str, pattern: Any) -> Any:
    """A pattern where \\S means what it does in ECMAScript, which counts U+FEFF as white space."""
    if not isinstance(pattern, str) or r"\S" not in pattern:
        return pattern
    parts = re.findall(r"\\.|\[(?:[^\]\\]|\\.)*\]|.", pattern, re.DOTALL)
    if any(part[0] == "[" and r"\S" in part for part in parts):
        raise GrammarError(
            f"JSON Schema {at} has a pattern with \\S in a class, which is not supported"
        )
    return "".join(r"[^\s\x{feff}]" if part == r"\S" else part for part in parts)
