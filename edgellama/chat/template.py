"""Chat templates from a model's metadata, in a sandbox with limits on time and output.

A template is code by whoever made the file. It runs in jinja2's immutable sandbox, under a trace
that stops its Python code, loops and recursion included, after a second. One operation in C could
outlast the trace or fill the memory, so operators, joins and padding are bounded before they run, and
whatever is made is weighed: no value is large, nor all of them together.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

from edgellama.errors import TemplateError

from .messages import read_messages, with_arguments_as_text

MAX_SECONDS = 1.0
MAX_SOURCE = 1 << 18  # characters
MAX_CHARACTERS = 4 << 20  # of a value
_MAX_MADE = 16 * MAX_CHARACTERS  # in one rendering
_MAX_BITS = 4096  # of an integer
_OBJECT = 16  # what an element of a list weighs, in characters, beside its text


class ChatTemplate:
    """A template, compiled when it is first used."""

    def __init__(self, source: str, bos_text: str = "", eos_text: str = "") -> None:
        self.source = source
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
        if len(self.source) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template has {len(self.source)} characters; {MAX_SOURCE} are allowed; "
                "use --raw to go without"
            )
        given = {**variables, "add_generation_prompt": add_generation_prompt}
        read = read_messages(messages, self.source)
        try:
            return self._render({**given, "messages": read})
        except TemplateError:
            if not any("tool_calls" in message for message in read):
                raise
            try:
                return self._render({**given, "messages": with_arguments_as_text(read)})
            except TemplateError:
                pass
            raise

    def _render(self, given: Mapping[str, Any]) -> str:
        environment = _environment() if self._template is None else None  # imports: not on its time
        with _deadline(MAX_SECONDS):
            try:
                if environment is not None:
                    self._template = environment.from_string(self.source)
                text = ""
                for piece in self._template.generate({**self._constants, **given}):
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


class _deadline:  # noqa: N801
    """Raise TemplateError in this thread's Python code after some seconds, loops included."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def _trace(self, frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > self._end:
            raise TemplateError(f"the chat template ran for over {MAX_SECONDS:g} s; use --raw")
        # What weighs values is bounded, and five times slower with every line traced.
        return None if frame.f_code.co_filename == __file__ else self._trace

    def __enter__(self) -> None:
        _made.total = 0
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
        """What makes a value without a call becomes a call that weighs it."""

        def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
            self.write("environment.concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

        def visit_List(self, node: nodes.List, frame: Any) -> None:
            self._weighed(super().visit_List, node, frame)

        def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
            self._weighed(super().visit_Dict, node, frame)

        def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
            if node.ctx == "load":
                self._weighed(super().visit_Tuple, node, frame)
            else:
                super().visit_Tuple(node, frame)

        def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
            if isinstance(node.arg, nodes.Slice):
                self._weighed(super().visit_Getitem, node, frame)
            else:
                super().visit_Getitem(node, frame)

        def _weighed(self, visit: Callable[[Any, Any], None], node: Any, frame: Any) -> None:
            self.write("environment.weighed(")
            visit(node, frame)
            self.write(")")

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])
        code_generator_class = BoundedCode
        concat = staticmethod(_join)
        weighed = staticmethod(_weighed)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return _weighed(super().call_binop(context, operator, left, right))

        def call(_self, _context: Any, _object: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
            name = getattr(_object, "__name__", "")
            owner = getattr(getattr(_object, "__wrapped__", _object), "__self__", None)
            if isinstance(owner, str):
                if name == "join" and len(args) == 1:
                    args = (list(args[0]),)
                _check_text(name, owner, [*args, *kwargs.values()])
            elif isinstance(owner, int | float):
                raise TemplateError(f"the chat template calls {name} of a number")
            _weigh([*args, *kwargs.values()])
            return _weighed(super().call(_context, _object, *args, **kwargs))

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
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    n_indent = indent if isinstance(indent, int) else len(indent or "")
    if max(n_indent, len("".join(separators or ""))) > 16:
        raise TemplateError("the chat template writes JSON with over 16 characters between values")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    pieces: list[str] = []
    n = 0
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        n += len(piece)
        _check_size(n)
    return "".join(pieces)


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
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            stack += value
        total += _OBJECT
        _check_size(total + _OBJECT * len(stack))
    return total


_made = threading.local()  # total: what the rendering in this thread has made so far


def _weighed(value: Any) -> Any:
    """Return a new value once it is weighed and counted.

    Raises: TemplateError when it, or all that was made, is over the limit.
    """
    _made.total += _weigh(value)
    if _made.total > _MAX_MADE:
        raise TemplateError(f"the chat template made values of over {_MAX_MADE} characters in all")
    return value


def _join(parts: Iterable[Any]) -> str:
    """Join what fits the limit together; macros, blocks and `~` end here."""
    parts = list(parts)
    _weigh(parts)
    return _weighed("".join(map(str, parts)))


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
        _check_size(n * (len(value) if isinstance(value, str) else _weigh(value)))
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
    elif name in ("encode", "translate"):
        raise TemplateError(f"the chat template calls {name}, which is not allowed")
    elif name in ("format", "format_map"):
        if re.search(r"\d{5}|%[^%a-zA-Z]*\*|:[^{}]*\{", text):
            raise TemplateError("the chat template pads text without a bound")
        wide = max(map(int, re.findall(r"\d+", text)), default=0)
        _check_size(len(text) + (text.count("%") + text.count("{")) * (weight + wide))
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
        if name == "sum" and any(isinstance(a, list | tuple) for a in rest):
            raise TemplateError(
                "the chat template sums lists, which takes the square of their length"
            )
        if name in ("batch", "slice", "round"):  # lists so long; powers of ten so high
            n = max((abs(a) for a in rest if isinstance(a, int)), default=0)
            _check_size(n * _MAX_BITS)
        return _weighed(plain(*given, **kwargs))

    return checked
