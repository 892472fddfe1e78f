"""Chat templates from a model's metadata, in a sandbox with limits on time and output.

A template is code by whoever made the file. It runs in jinja2's immutable sandbox, under a trace
that stops its Python code, loops and recursion included, after a second. One operation in C could
outlast the trace or fill the memory, so operators, joins and padding are bounded before they run.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

from edgellama.errors import TemplateError

MAX_SECONDS = 1.0
MAX_CHARACTERS = 4 << 20
_MAX_BITS = 4096  # of an integer


class ChatTemplate:
    """A template, compiled when it is first used."""

    def __init__(self, source: str, bos_text: str = "", eos_text: str = "") -> None:
        self._source = source
        self._constants = {"bos_token": bos_text, "eos_token": eos_text}
        self._template: Any = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt for a list of {"role": ..., "content": ...} messages.

        Raises: TemplateError when the template is broken, refuses the messages, or passes a limit.
        """
        given = {
            **self._constants,
            "messages": [_message(i, message) for i, message in enumerate(messages)],
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        environment = _environment() if self._template is None else None  # imports: not on its time
        with _deadline(MAX_SECONDS):
            try:
                if environment is not None:
                    self._template = environment.from_string(self._source)
                text = ""
                for piece in self._template.generate(given):
                    text += piece
                    if len(text) > MAX_CHARACTERS:
                        raise TemplateError(
                            f"the chat template wrote over {MAX_CHARACTERS} characters; use --raw"
                        )
            except TemplateError:
                raise
            except Exception as error:  # whatever the template's code may raise
                line = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise TemplateError(
                    f"the chat template failed: {line}; use --raw to go without"
                ) from error
        return text


def _message(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Check a message; content in text parts becomes one string, which every template knows.

    Raises: TemplateError.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TemplateError(f"message {i} has no role; needed: role and content")
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise TemplateError(f"message {i} has a part of type {kind!r}; only text is understood")
    return {**message, "content": "".join(part["text"] for part in content)}


class _deadline:  # noqa: N801
    """Raise TemplateError in this thread's Python code after some seconds, loops included."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def _trace(self, frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > self._end:
            raise TemplateError(f"the chat template ran for over {MAX_SECONDS:g} s; use --raw")
        return self._trace

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks training text; here its body is simply rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class BoundedCode(CodeGenerator):
        """`a ~ b` becomes a call of `concat`, which looks at the lengths first."""

        def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
            self.write("environment.concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])
        code_generator_class = BoundedCode
        concat = staticmethod(_join)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(_self, _context: Any, _object: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
            name = getattr(_object, "__name__", "")
            owner = getattr(getattr(_object, "__wrapped__", _object), "__self__", None)
            if isinstance(owner, str):
                _check_text(name, owner, [*args, *kwargs.values()])
            return super().call(_context, _object, *args, **kwargs)

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
        finalize=_weighed,
    )
    environment.filters["tojson"] = _to_json
    for name in ("urlize", "wordwrap", "xmlattr"):  # for HTML, never for chat
        del environment.filters[name]
    for name, plain in environment.filters.items():
        environment.filters[name] = _bounded(name, plain)
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: time.strftime(form[:1000])
    return environment


def _raise_exception(message: str) -> None:
    raise TemplateError(f"the chat template refuses these messages: {message}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


# --- bounds ---------------------------------------------------------------------------------------
def _check_size(n: int) -> None:
    if n > MAX_CHARACTERS:
        raise TemplateError(f"the chat template made a value of over {MAX_CHARACTERS} characters")


def _weigh(value: Any) -> int:
    """Count about how many characters a value is when written out.

    Raises: TemplateError over the limit; lists that hold one another many times stop there too.
    """
    total, stack = 0, [value]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            stack += value
        total += len(value) if isinstance(value, str) else 4
        _check_size(total + len(stack))
    return total


def _weighed(value: Any) -> Any:
    _weigh(value)
    return value


def _join(parts: Iterable[Any]) -> str:
    """Join what fits the limit together; macros, blocks and `~` end here."""
    parts = list(parts)
    _weigh(parts)
    return "".join(map(str, parts))


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be huge."""
    if isinstance(left, int) and isinstance(right, int):
        n_bits = left.bit_length()
        if operator == "**":
            n_bits *= max(abs(right), 1)
        elif operator == "*":
            n_bits += right.bit_length()
        if n_bits > _MAX_BITS:
            raise TemplateError(f"the chat template made an integer of over {_MAX_BITS} bits")
    elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
        n, value = (left, right) if isinstance(left, int) else (right, left)
        _check_size(n * _weigh(value))
    elif operator == "+":
        _check_size(_weigh(left) + _weigh(right))
    elif operator == "%" and isinstance(left, str):
        _check_text("format", left, [right])


def _check_text(name: str, text: str, arguments: list[Any]) -> None:
    """Refuse a method or filter of strings whose result would be huge."""
    weight = _weigh(arguments)
    strings = [a for a in arguments if isinstance(a, str)]
    if name == "replace" and len(strings) == 2:
        _check_size(len(text) + text.count(strings[0]) * len(strings[1]))
    elif name == "join" and arguments and hasattr(arguments[0], "__len__"):
        _check_size(len(arguments[0]) * len(text) + weight)
    elif name == "translate":
        raise TemplateError("the chat template calls translate, which is not allowed")
    elif name in ("format", "format_map"):
        if re.search(r"\d{5}|%[^%a-zA-Z]*\*|:[^{}]*\{", text):
            raise TemplateError("the chat template pads text without a bound")
        _check_size(len(text) + (text.count("%") + text.count("{")) * weight)
    elif name in ("center", "ljust", "rjust", "zfill", "expandtabs", "indent"):
        lines = text.count("\n") + text.count("\t") + 1
        wide = max((a for a in arguments if isinstance(a, int)), default=8)
        _check_size(len(text) + lines * max(wide, max(map(len, strings), default=0)))


def _bounded(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Make a filter of jinja2 look at the size of its operands and result first."""
    start = 1 if hasattr(plain, "jinja_pass_arg") else 0  # then a context comes first

    @wraps(plain)  # keeps that mark
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if name == "join" and not hasattr(given[start], "__len__"):
            given[start] = list(given[start])
        value, rest = given[start], [*given[start + 1 :], *kwargs.values()]
        if name == "join":
            _check_text(name, next((a for a in rest if isinstance(a, str)), ""), [value])
        elif name in ("center", "format", "indent", "replace"):
            _check_text(name, str(_weighed(value)), rest)
        else:
            _weigh([value, rest])
        return plain(*given, **kwargs)

    return checked
