"""`edgellama convert` and `quantize`: checkpoints and GGUF files into GGUF files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellama.errors import UsageError

if TYPE_CHECKING:
    from edgellama.convert.quantize import Quantization
    from edgellama.convert.write import TensorReport

_PATH = click.Path(path_type=Path)


def _quantizing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that convert and quantize share."""
    for option in reversed((
        click.option("--imatrix", type=_PATH, help="Importance matrix (edgellama imatrix)."),
        click.option("--tensor-type", "overrides", multiple=True, metavar="REGEX=FORMAT",
                     help="Format of the tensors whose name matches; may be repeated."),
        click.option("--keep-output", is_flag=True, help="Leave output.weight as it is."),
        click.option("--pure", is_flag=True, help="One format for all matrices, no mix."),
        click.option("--target-bpw", type=click.FloatRange(1, 32), metavar="BITS",
                     help="Choose formats for this many bits per weight, in place of TYPE's mix."),
        click.option("--report", type=_PATH, metavar="FILE.json|html",
                     help="Write size and error of every tensor."),
        click.option("-t", "--threads", type=click.IntRange(1), help="Threads; default: all cores."),
        click.option("--force", is_flag=True, help="Overwrite OUT."),
    )):  # fmt: skip
        function = option(function)
    return function


@click.command("quantize")
@click.argument("source", type=_PATH, metavar="IN.gguf")
@click.argument("out", type=_PATH, metavar="OUT.gguf")
@click.argument("type_name", metavar="TYPE")
@_quantizing
def quantize(
    source: Path,
    out: Path,
    type_name: str,
    report: Path | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Write IN.gguf in the block formats of TYPE: q4_k_m, q8_0, q5_0, f16 ..."""
    from edgellama.convert.encoder import Encoder
    from edgellama.convert.quantize import quantize

    start = time.monotonic()
    wanted = _wanted(type_name, report, **options)
    with Encoder(threads) as encoder:
        reports = quantize(source, out, wanted, encoder)
    floats = {"f32", "f16", "bf16"}
    again = (r for r in reports if r.type not in floats | {r.source_type})
    if twice := {r.source_type for r in again} - floats:
        click.echo(
            f"{source} was quantized before ({', '.join(sorted(twice))}); a float file loses less",
            err=True,
        )
    _finish(out, reports, report, time.monotonic() - start)


@click.command("convert")
@click.argument("source", metavar="SRC")
@click.option("-o", "--out", type=_PATH, required=True, metavar="OUT.gguf", help="File to write.")
@click.option("--type", "type_name", default="f16", show_default=True, metavar="TYPE",
              help="Block formats: q4_k_m, q8_0, q5_0, f16 ...")  # fmt: skip
@click.option("--name", help="Name of the model in the file.")
@click.option("--tokenizer", type=_PATH, metavar="FOLDER", help="Where the tokenizer's files are.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
@_quantizing
def convert(
    source: str, out: Path, type_name: str, name: str | None, tokenizer: Path | None, offline: bool,
    report: Path | None, threads: int | None, **options: Any,
) -> None:  # fmt: skip
    """Convert SRC to one GGUF file.

    SRC is a folder of Hugging Face (safetensors, pytorch_model.bin) or of Meta (consolidated.*.pth), a
    .bin of llama2.c, or hf:ORG/REPO, which is fetched.
    """
    from edgellama.catalog import is_repository
    from edgellama.convert.checkpoint import open_checkpoint
    from edgellama.convert.convert import convert
    from edgellama.convert.download import fetch_checkpoint
    from edgellama.convert.encoder import Encoder

    start = time.monotonic()
    wanted = _wanted(type_name, report, **options)
    if is_repository(source):
        source, name = str(fetch_checkpoint(source, offline=offline)), name or source[3:]
    with open_checkpoint(source) as checkpoint, Encoder(threads) as encoder:
        reports = convert(checkpoint, out, wanted, encoder, name=name, tokenizer=tokenizer)
    _finish(out, reports, report, time.monotonic() - start)


def _wanted(
    type_name: str, report: Path | None, imatrix: Path | None, overrides: tuple[str, ...],
    keep_output: bool, pure: bool, target_bpw: float | None, force: bool,
) -> Quantization:  # fmt: skip
    """The options that both commands share, checked."""
    from edgellama.convert.importance import read_importance
    from edgellama.convert.quantize import Quantization
    from edgellama.convert.recipes import Choices
    from edgellama.convert.report import check_name

    pairs = []
    for text in overrides:
        pattern, equals, format_name = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"--tensor-type {text!r} is no REGEX=FORMAT")
        pairs.append((pattern, format_name))
    if report is not None:
        check_name(report)
    return Quantization(
        type_name,
        Choices(pairs, keep_output, pure),
        target_bpw or 0.0,
        read_importance(imatrix) if imatrix else {},
        imatrix.name if imatrix else "",
        measure=report is not None,
        force=force,
    )


def _finish(out: Path, reports: list[TensorReport], report: Path | None, seconds: float) -> None:
    """Say on stderr what was written, and write the report."""
    from edgellama.convert.report import summary, write_report

    if report is not None:
        write_report(report, out.name, reports)
    click.echo(f"{out}: {summary(reports)}, {seconds:.1f} s", err=True)
