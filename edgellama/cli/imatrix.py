"""`edgellama imatrix`: which columns of the weights matter, on a text."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command("imatrix")
@click.argument("model")
@click.option(
    "-f",
    "--file",
    "text",
    type=_PATH,
    required=True,
    metavar="TEXT",
    help="UTF-8 text, a few hundred kB of what the model is for.",
)
@click.option("-o", "--out", type=_PATH, required=True, metavar="FILE", help="File to write.")
@click.option(
    "-c",
    "--ctx",
    type=click.IntRange(2),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of a chunk.",
)
@click.option("--chunks", type=click.IntRange(1), metavar="N", help="Read only so many chunks.")
@click.option("--process-output", is_flag=True, help="The head's matrix as well.")
@click.option("-t", "--threads", type=click.IntRange(1), help="Threads; default: all cores.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
def command(
    model: str, text: Path, out: Path, ctx: int, chunks: int | None, process_output: bool,
    threads: int | None, force: bool, offline: bool,
) -> None:  # fmt: skip
    """Collect the importance matrix of MODEL while it reads TEXT, for quantize --imatrix."""
    from edgellama.catalog import resolve
    from edgellama.imatrix import collect_importance

    n = collect_importance(
        Path(resolve(model, offline=offline)), text, out, chunk_size=ctx, n_chunks=chunks,
        with_head=process_output, n_threads=threads, force=force,
    )  # fmt: skip
    click.echo(f"{out}: {n} chunks of {ctx} tokens", err=True)
