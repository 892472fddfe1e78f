"""`edgellama bench`: a table of measurements on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgellama.errors import UsageError

if TYPE_CHECKING:
    from edgellama.bench import Open, Row

_BATCH, _UBATCH, _KV = ("2048",), ("512",), "f16"


@click.command("bench")
@click.argument("model", required=False)
@click.option(
    "-p", "--n-prompt", metavar="LIST", multiple=True, default=["512"], show_default=True,
    help="Tokens of a prompt; 0 leaves the test out.",
)  # fmt: skip
@click.option(
    "-n", "--n-gen", metavar="LIST", multiple=True, default=["128"], show_default=True,
    help="Tokens generated one by one; 0 leaves the test out.",
)  # fmt: skip
@click.option("-pg", "n_both", metavar="P,N", multiple=True, help="A prompt and an answer in one.")
@click.option(
    "-d", "--n-depth", metavar="LIST", multiple=True, default=["0"], show_default=True,
    help="Positions that are in the cache before a test.",
)  # fmt: skip
@click.option("-r", "--repetitions", metavar="N", default="5", show_default=True, help="Repeats.")
@click.option("-t", "--threads", metavar="LIST", multiple=True, help="Threads; physical cores.")
@click.option(
    "-b", "--batch-size", metavar="LIST", multiple=True, default=_BATCH, show_default=True,
    help="Most tokens of a step.",
)  # fmt: skip
@click.option(
    "-ub", "--ubatch-size", metavar="LIST", multiple=True, default=_UBATCH, show_default=True,
    help="The same; the smaller of the two counts.",
)  # fmt: skip
@click.option(
    "-ctk", "--cache-type-k", metavar="LIST", default=_KV, show_default=True,
    help="Type of cached keys: f16, f32 or q8_0.",
)  # fmt: skip
@click.option(
    "-ctv", "--cache-type-v", metavar="LIST", default=_KV, show_default=True,
    help="Type of cached values; that of the keys.",
)  # fmt: skip
@click.option(
    "-o", "--output", metavar="FORMAT", default="md", show_default=True,
    help="md, csv, json or jsonl.",
)  # fmt: skip
@click.option("--shape", metavar="NAME", help="Measure a model of this shape with random weights.")
@click.option("--type", "format_name", metavar="FORMAT", help="Its weight format; q4_0 by default.")
@click.option("--profile", is_flag=True, help="Time operations in place of whole tests.")
@click.option(
    "--plot", "picture", metavar="FILE", type=click.Path(path_type=Path),
    help="Draw the results into a .png or .svg file.",
)  # fmt: skip
@click.option("--offline", is_flag=True, help="Never touch the network.")
def command(
    model: str | None, n_prompt: tuple[str, ...], n_gen: tuple[str, ...], n_both: tuple[str, ...],
    n_depth: tuple[str, ...], repetitions: str, threads: tuple[str, ...],
    batch_size: tuple[str, ...], ubatch_size: tuple[str, ...], cache_type_k: str,
    cache_type_v: str, output: str, shape: str | None, format_name: str | None, profile: bool,
    picture: Path | None, offline: bool,
) -> None:  # fmt: skip
    """Measure how fast MODEL runs, with llama-bench's options, columns and JSON keys.

    Without MODEL the default model is used, and fetched on first use. A LIST is 1,2,4 or a range:
    128-512+128 adds, 128-4096*2 multiplies. Ids are random; neither text nor sampling is timed.

    GB/s counts the packed weights and the cached positions that a generated token reads, GMAC/s the
    multiply-adds of a prompt; the ceilings are measured in the same run.

    \b
      edgellama bench -p 512 -n 128 -d 0-4096+2048 -t 1,2
      edgellama bench --shape llama-3.2-1b --type q4_k -o json
    """
    from edgellama import bench, cpu, report
    from edgellama.runtime.cost import FORMS

    if output not in report.FORMATS:
        raise UsageError(f"-o {output!r} is no format; formats: {', '.join(report.FORMATS)}")
    kv = bench.kv_types(cache_type_k, cache_type_v)
    n_batch = bench.numbers("-b", batch_size, 1)
    n_ubatch = bench.numbers("-ub", ubatch_size, 1)
    n_threads = bench.numbers("-t", threads, 1, 256) if threads else [cpu.n_usable_cores()]
    choices = bench.settings(n_batch, n_ubatch, kv, n_threads)
    todo = bench.tests(
        bench.numbers("-p", n_prompt, 0), bench.numbers("-n", n_gen, 0),
        bench.pairs("-pg", n_both), bench.numbers("-d", n_depth, 0),
    )  # fmt: skip
    (n_repeats, *more) = bench.numbers("-r", [repetitions], 1, 10_000)
    if more:
        raise UsageError(f"-r {repetitions} must be one number")
    if picture is not None:
        if profile:
            raise UsageError("--plot draws whole tests; leave out --profile")
        report.check_picture(picture)
    open_file = _opener(model, shape, format_name, offline)

    measured: list[Row] = []
    if profile:
        rows, columns = bench.profile(open_file, choices, todo, n_repeats), report.profile_columns()
    else:
        unusual = {
            "n_batch": batch_size != _BATCH, "n_ubatch": ubatch_size != _UBATCH,
            "type_k": cache_type_k != _KV, "type_v": cache_type_v != _KV,
        }  # fmt: skip
        rows = bench.run(open_file, choices, todo, n_repeats)
        columns = report.bench_columns(name for name, is_so in unusual.items() if is_so)
    for line in report.lines(_kept(rows, measured), output, columns):
        click.echo(line)
    for row in {row["n_threads"]: row for row in measured}.values():
        macs = (f"{form} {row[f'ceiling_{form}_gmac_s']:.1f} GMAC/s" for form in FORMS)
        click.echo(
            f"ceilings, threads {row['n_threads']}: read {row['ceiling_read_gb_s']:.1f} GB/s, "
            + ", ".join(macs),
            err=True,
        )
    if picture is not None:
        report.plot(measured, picture)


def _opener(model: str | None, shape: str | None, format_name: str | None, offline: bool) -> Open:
    """Return what opens the model, after checking that it can be."""
    if shape is not None:
        if model is not None:
            raise UsageError("give MODEL or --shape, not both")
        from edgellama.gguf.synthetic import synthetic

        synthetic(shape, format_name or "q4_0")
        return lambda: synthetic(shape, format_name or "q4_0")
    if format_name is not None:
        raise UsageError("--type goes with --shape; a file has its own")
    from edgellama.catalog import resolve
    from edgellama.gguf import open_gguf

    path = resolve(model, offline=offline)
    return lambda: open_gguf(path)


def _kept(rows: Iterable[Row], to: list[Row]) -> Iterator[Row]:
    for row in rows:
        to.append(row)
        yield row
