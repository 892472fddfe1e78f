"""`edgellama run`: one answer on stdout."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from edgellama.errors import UsageError

from .options import (
    GroupedCommand,
    grammar_options,
    model_options,
    open_model,
    sampling_options,
)


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@click.option("-p", "--prompt", help="The prompt; read from stdin when left out.")
@click.option(
    "-n", "--max-tokens", "max_tokens", type=click.IntRange(0), help="Most tokens of the answer."
)
@click.option("--raw", is_flag=True, help="Continue the text as it stands: no chat template.")
@click.option("--system", help="A system message for the chat template.")
@click.option("--stop", multiple=True, help="Stop before this text; may be repeated.")
@model_options
@click.option(
    "--session", type=click.Path(path_type=Path), metavar="FILE",
    help="Evaluated text: loaded if the file exists, saved after the answer.",
)  # fmt: skip
@click.option("--stats", is_flag=True, help="Print timings to stderr.")
@sampling_options
@grammar_options
def command(
    model: str | None, prompt: str | None, max_tokens: int | None, raw: bool, system: str | None,
    stop: tuple[str, ...], session: Path | None, stats: bool, **given: Any,
) -> None:  # fmt: skip
    """Answer a prompt with MODEL (a path, a name of the catalogue, hf:org/repo/file.gguf or a URL).

    Without MODEL the default model is used, and fetched on first use.
    """
    start = time.perf_counter()
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("there is no prompt; give one with -p or on stdin")
        prompt = sys.stdin.buffer.read().decode(errors="replace")
        prompt = prompt.removesuffix("\n").removesuffix("\r")  # echo's, not the author's
    out = sys.stdout.buffer
    with open_model(model, given) as llm:
        if session is not None and session.exists():
            llm.load_session(session)
        options: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop, **given}
        if raw or llm.template is None:
            if system is not None:
                raise UsageError("--system needs a chat template; leave out --raw")
            deltas = llm.stream(prompt, parse_special=True, **options)
        else:
            messages = [{"role": "system", "content": system}] if system else []
            deltas = llm.stream_chat([*messages, {"role": "user", "content": prompt}], **options)
        first = None
        for delta in deltas:
            out.write(delta.text.encode(errors="replace"))
            out.flush()
            first = first or time.perf_counter()
        out.write(b"\n")
        out.flush()
        if session is not None:
            llm.save_session(session)
        if stats and delta.timings is not None and first is not None:
            t = delta.timings
            guesses = ""
            if t.drafted_n:
                guesses = (
                    f" | {t.accepted_n} of {t.drafted_n} guesses right "
                    f"({t.accepted_n / t.drafted_n:.0%}), "
                    f"{t.predicted_n / (t.predicted_n - t.accepted_n):.2f} tokens a step"
                )
            click.echo(
                f"first token {first - start:.2f} s | prompt {t.prompt_n} tokens, {t.cached_n} cached "
                f"({t.prompt_n / max(t.prompt_s, 1e-9):.0f}/s) | answer {t.predicted_n} tokens "
                f"({max(t.predicted_n - 1, 0) / max(t.predicted_s, 1e-9):.0f}/s)"
                f"{guesses}",
                err=True,
            )
