"""`edgellama batch`: tasks from a file of JSON lines, many at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgellama.errors import EdgeLlamaError

from .options import GroupedCommand, grammar_options, model_options, open_model, sampling_options

_PATH = click.Path(path_type=Path)


@click.command("batch", cls=GroupedCommand)
@click.argument("source", type=_PATH, metavar="IN.jsonl")
@click.argument("out", type=_PATH, metavar="OUT.jsonl")
@click.option("-m", "--model", help="A model as `run` takes it; the default model when left out.")
@click.option(
    "--task",
    type=click.Choice(["chat", "generate", "answer", "translate", "classify", "score", "embed"]),
    help="Of lines that name none; otherwise what a line holds says which.",
)
@click.option("-n", "--max-tokens", type=click.IntRange(0), help="Most tokens of an answer.")
@click.option(
    "--parallel", default=8, show_default=True, type=click.IntRange(1), help="Answers at a time."
)
@model_options
@click.option("--force", is_flag=True, help="Overwrite OUT.jsonl.")
@sampling_options
@grammar_options
def command(
    source: Path, out: Path, model: str | None, task: str | None, max_tokens: int | None,
    parallel: int, force: bool, **given: Any,
) -> None:  # fmt: skip
    """Do the task in every line of IN.jsonl, and write the results to OUT.jsonl in the same order.

    A line is an object with what its task needs, such as {"prompt": ...}, {"messages": [...]} or
    {"text": ..., "labels": [...]}, options of its own, and an id.  A run that was stopped goes on where
    it was when it is started again.
    """
    from edgellama.batch import run_batch

    with open_model(model, given) as llm:
        defaults = {"max_tokens": max_tokens, **given}
        defaults = {name: value for name, value in defaults.items() if value is not None}
        n_lines, n_failed = run_batch(
            llm, source, out, task=task, defaults=defaults, n_parallel=parallel, force=force,
        )  # fmt: skip
    if n_failed:
        raise EdgeLlamaError(
            f"{n_failed} of {n_lines} lines could not be done; {out} says why in their places"
        )
    click.echo(f"{out}: {n_lines} lines", err=True)
