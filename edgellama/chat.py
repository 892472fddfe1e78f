"""Chat templates from a model's metadata, in a sandbox with limits on time and output.

A template is code by whoever made the file. It runs in jinja2's immutable sandbox, and under a trace that
stops it after a second; what it renders is capped as well.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from edgellama.errors import TemplateError

MAX_SECONDS = 1.0
MAX_CHARACTERS = 4 << 20


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
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise TemplateError(f"message {i} has no role; needed: role and content")
        with _deadline(MAX_SECONDS):
            try:
                if self._template is None:
                    self._template = _environment().from_string(self._source)
                text = ""
                for piece in self._template.generate(
                    messages=[dict(m) for m in messages],
                    add_generation_prompt=add_generation_prompt,
                    **self._constants,
                    **variables,
                ):
                    text += piece
                    if len(text) > MAX_CHARACTERS:
                        raise TemplateError(
                            f"the chat template wrote over {MAX_CHARACTERS} characters; use --raw"
                        )
            except TemplateError:
                raise
            except Exception as error:  # whatever the template's code may raise
                line = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise TemplateError(f"the chat template failed: {line}; use --raw to go without") from error
        return text


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
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks training text; here its body is simply rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(f"the chat template refuses these messages: {message}")

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: time.strftime(form)
    return environment
