"""GBNF, the grammars of llama.cpp, as Lark.

A rule that needs no recursion becomes a terminal, which is one regular expression: these are matched as
far as they go, so a rule that continues with what the terminal before it could take never gets it.
Source: llama.cpp, grammars/README.md.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from edgellama.errors import GrammarError

_TOKEN = re.compile(
    r"""[ \t]+ | \#[^\r\n]*
    | (?P<line> \r?\n | \r)
    | (?P<text> " (?: [^"\\\r\n] | \\. )* ")
    | (?P<chars> \[ \^? (?: [^\]\\\r\n] | \\. )* \])
    | (?P<special> !? <[^>\s]+>)
    | (?P<is> ::=)
    | (?P<times> \{ \s* \d+ \s* (?: ,\s* \d* \s* )? \} | [*+?])
    | (?P<name> [\w-]+)
    | (?P<mark> [|().])""",
    re.VERBOSE,
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_DEPTH = 50
_N_TIMES = (
    2000  # a larger least number of repetitions, and nested ones of a larger product, are refused
)


class _Part(NamedTuple):
    """Lark of a part of a rule; `n` is how often its widest repetition unfolds at most."""

    lark: str
    names: frozenset[str] = frozenset()
    has_special: bool = False
    n: int = 1


def gbnf_to_lark(text: str) -> str:
    """Return the Lark grammar of a GBNF grammar, whose first rule is `root`.

    Raises: GrammarError naming the line.
    """
    rules = _Parser(text).rules()
    if "root" not in rules:
        raise GrammarError("the grammar has no rule 'root', where it would begin")
    for name, part in rules.items():
        for other in part.names - rules.keys():
            raise GrammarError(f"the grammar names {other!r} in {name!r}, but has no such rule")
    terminals = _terminals(rules)
    lark_name = {name: f"T{i}" if name in terminals else f"r{i}" for i, name in enumerate(rules)}
    lines = [f"start: {lark_name['root']}"]
    for name, part in rules.items():
        lark = re.sub(r"\0([\w-]+)\0", lambda found: lark_name[found[1]], part.lark)
        lines.append(f"{lark_name[name]}: {lark}")
    return "\n".join(lines) + "\n"


def _terminals(rules: dict[str, _Part]) -> set[str]:
    """Names of the rules that lead to no recursion and no special token."""
    done: set[str] = set()
    users: dict[str, list[str]] = {}
    n_open = {name: len(part.names) for name, part in rules.items()}
    for name, part in rules.items():
        for other in part.names:
            users.setdefault(other, []).append(name)
    ready = [name for name, n in n_open.items() if n == 0]
    while ready:
        name = ready.pop()
        if rules[name].has_special:
            continue
        done.add(name)
        for user in users.get(name, ()):
            n_open[user] -= 1
            if n_open[user] == 0:
                ready.append(user)
    return done


class _Parser:
    """Recursive descent over the tokens of a GBNF text."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str, int]] = []  # kind, text, line
        at, line = 0, 1
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise GrammarError(f"line {line} of the grammar: {text[at : at + 20]!r} is no GBNF")
            if found.lastgroup:
                self._tokens.append((found.lastgroup, found[0], line))
            line += found.lastgroup == "line"
            at = found.end()
        self._tokens.append(("end", "", line))
        self._at = 0

    def rules(self) -> dict[str, _Part]:
        out: dict[str, _Part] = {}
        self._skip_lines()
        while self._kind() != "end":
            name = self._take("name")
            self._take("is")
            if name in out:
                raise self._error(f"a second rule {name!r}")
            self._skip_lines()
            out[name] = self._alternatives(0)
            if self._kind() not in ("line", "end"):
                raise self._error(repr(self._text()))
            self._skip_lines()
        return out

    def _alternatives(self, depth: int) -> _Part:
        if depth > _DEPTH:
            raise self._error(f"parentheses in more than {_DEPTH} levels")
        parts = [self._sequence(depth)]
        while self._text() == "|":
            self._at += 1
            self._skip_lines()
            parts.append(self._sequence(depth))
        return _joined(parts, " | ")

    def _sequence(self, depth: int) -> _Part:
        parts: list[_Part] = []
        while True:
            if depth:
                self._skip_lines()
            kind, text, _ = self._tokens[self._at]
            if kind in ("line", "end", "is") or text in ("|", ")"):
                return _joined(parts, " ") if parts else _Part('""')
            self._at += 1
            if kind == "times":
                if not parts:
                    raise self._error(f"{text!r} with nothing before it")
                parts[-1] = self._repeated(parts[-1], text)
            elif text == "(":
                inner = self._alternatives(depth + 1)
                if self._text() != ")":
                    raise self._error(f"{self._text()!r} where ) is needed")
                self._at += 1
                parts.append(inner._replace(lark=f"({inner.lark})"))
            elif kind == "name":
                parts.append(_Part(f"\0{text}\0", frozenset((text,))))
            elif kind == "text":
                parts.append(_Part(json.dumps(self._unescaped(text[1:-1]), ensure_ascii=False)))
            elif kind == "chars":
                parts.append(_Part(self._class(text[1:-1])))
            elif kind == "special":
                if text.startswith("!<["):
                    text = f"<[^{text[3:]}"
                elif text[0] == "!":
                    raise self._error(f"{text} is not supported; write !<[id]>")
                parts.append(_Part(text, has_special=True))
            else:
                parts.append(_Part("/(?s:.)/"))

    def _repeated(self, part: _Part, times: str) -> _Part:
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(times, (-1, -1))
        if low == -1:
            numbers = re.findall(r"\d+", times)
            low = int(numbers[0])
            high = int(numbers[1]) if len(numbers) > 1 else None if "," in times else low
        n = part.n * max(low, high or 1)
        if (high is not None and high < low) or low > _N_TIMES or (part.n > 1 and n > _N_TIMES):
            raise self._error(f"{times}: too many repetitions, at least {_N_TIMES} in all")
        return part._replace(lark=f"({part.lark}){{{low},{'' if high is None else high}}}", n=n)

    def _class(self, text: str) -> str:
        """A class of characters, each written by its number: Rust's have operators of their own."""
        negated = text.startswith("^")
        characters = re.findall(r"\\(?:x..|u.{4}|U.{8}|.)|.", text[negated:], re.DOTALL)
        out, i = "", 0
        while i < len(characters):
            first = last = ord(self._unescaped(characters[i]))
            if characters[i + 1 : i + 2] == ["-"] and i + 2 < len(characters):
                last = ord(self._unescaped(characters[i + 2]))
                i += 2
            if last < first:
                raise self._error(f"the range {chr(first)!r} to {chr(last)!r} is empty")
            out += f"\\u{{{first:x}}}-\\u{{{last:x}}}"
            i += 1
        if not out:
            raise self._error("a class of no characters")
        return f"/[{'^' * negated}{out}]/"

    def _unescaped(self, text: str) -> str:
        def character(found: re.Match[str]) -> str:
            digits = found[1] or found[2] or found[3]
            code = int(digits, 16) if digits else -1
            if (
                code > 0x10FFFF
                or 0xD800 <= code < 0xE000
                or (code < 0 and found[4] not in _ESCAPES)
            ):
                raise self._error(f"{found[0]!r} is no character")
            return _ESCAPES[found[4]] if code < 0 else chr(code)

        digit = "[0-9A-Fa-f]"
        escape = rf"\\(?:x({digit}{{2}})|u({digit}{{4}})|U({digit}{{8}})|(.))"
        return re.sub(escape, character, text)

    def _skip_lines(self) -> None:
        while self._kind() == "line":
            self._at += 1

    def _kind(self) -> str:
        return self._tokens[self._at][0]

    def _text(self) -> str:
        return self._tokens[self._at][1]

    def _take(self, kind: str) -> str:
        if self._kind() != kind:
            needed = {"name": "the name of a rule", "is": "::="}[kind]
            raise self._error(f"{self._text()!r} where {needed} is needed")
        self._at += 1
        return self._tokens[self._at - 1][1]

    def _error(self, what: str) -> GrammarError:
        line = self._tokens[min(self._at, len(self._tokens) - 1)][2]
        return GrammarError(f"line {line} of the grammar: {what}")


def _joined(parts: list[_Part], by: str) -> _Part:
    if len(parts) == 1:
        return parts[0]
    names = frozenset().union(*(part.names for part in parts))
    has_special = any(part.has_special for part in parts)
    return _Part(by.join(p.lark for p in parts), names, has_special, max(p.n for p in parts))
