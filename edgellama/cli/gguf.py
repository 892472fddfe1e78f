"""`edgellama gguf`: split, merge, set, dump and diff."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import numpy as np

from edgellama.cli import plain
from edgellama.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@click.group("gguf")
def command() -> None:
    """Cut, join, edit, print and compare GGUF files."""


def _nbytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.lower())
    nbytes = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not nbytes:
        raise UsageError(f"{text!r} is no size; write 500M or 2G")
    return nbytes


@command.command("split")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("prefix")
@click.option("--max-size", help="Most bytes of a part: 500M, 2G; 2G if nothing is given.")
@click.option("--max-tensors", type=click.IntRange(1), help="Most tensors of a part.")
@click.option("--force", is_flag=True, help="Overwrite parts that exist.")
def split(
    source: Path, prefix: str, max_size: str | None, max_tensors: int | None, force: bool
) -> None:
    """Cut SOURCE into PREFIX-00001-of-0000N.gguf; the first part opens all."""
    from edgellama.convert.edit import split

    size = _nbytes(max_size or "2G") if max_size or not max_tensors else 0
    paths = split(source, prefix, max_nbytes=size, max_tensors=max_tensors or 0, force=force)
    for path in paths:
        click.echo(path)


@command.command("merge")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def merge(source: Path, out: Path, force: bool) -> None:
    """Join the parts of which SOURCE is the first into OUT."""
    from edgellama.convert.edit import merge

    merge(source, out, force=force)


@command.command("set")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("pairs", nargs=-1, metavar="KEY=VALUE...")
@click.option("--type", "kind", default="", help="Value type: u32, i32, f32, bool, str ...")
@click.option("--remove", multiple=True, metavar="KEY", help="Take a key out.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write here, keep SOURCE.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def set_(
    source: Path, pairs: tuple[str, ...], kind: str, remove: tuple[str, ...], out: Path | None,
    force: bool,
) -> None:  # fmt: skip
    """Set metadata of SOURCE; a key keeps its type unless --type names one."""
    from edgellama.convert.edit import parse_value, rewrite
    from edgellama.gguf import open_gguf

    if not pairs and not remove:
        raise UsageError("nothing to set; give KEY=VALUE, or --remove KEY")
    changes = {}
    with open_gguf(source) as gguf:
        for pair in pairs:
            key, equals, text = pair.partition("=")
            if not key or not equals:
                raise UsageError(f"{pair!r} is no KEY=VALUE")
            old = gguf.raw_value(key) if key in gguf.metadata else None
            changes[key] = parse_value(text, kind, old)
    rewrite(source, out or source, changes, remove, force=force or out is None)


@command.command("dump")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--key", multiple=True, help="Print only this metadata value, whole.")
def dump(source: Path, as_json: bool, key: tuple[str, ...]) -> None:
    """Print every metadata value and every tensor of SOURCE."""
    from edgellama.gguf import open_gguf

    with open_gguf(source) as gguf:
        for name in key:
            if name not in gguf.metadata:
                raise UsageError(f"{source.name} has no key {name!r}")
        metadata = {k: _plain_value(v) for k, v in gguf.metadata.items() if k in key or not key}
        tensors: list[dict[str, Any]] = [
            {"name": t.name, "shape": list(t.shape), "type": t.type_name, "offset": t.offset,
             "nbytes": t.nbytes}
            for t in gguf.tensors.values()
        ]  # fmt: skip
    if as_json:
        document = metadata if key else {"metadata": metadata, "tensors": tensors}
        click.echo(json.dumps(document, ensure_ascii=False, indent=1))
        return
    for name, value in metadata.items():
        click.echo(f"{plain(name)} = {plain(json.dumps(value, ensure_ascii=False))}")
    for t in () if key else tensors:
        shape = "x".join(map(str, t["shape"]))
        click.echo(
            f"{plain(t['name']):40} {t['type']:8} {shape:16} {t['nbytes']} B at {t['offset']}"
        )


def _plain_value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain_value(v) for v in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


@command.command("diff")
@click.argument("one", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
@click.pass_context
def diff(ctx: click.Context, one: Path, other: Path) -> None:
    """Compare metadata and tensors of two files; exit with 1 when they differ."""
    from edgellama.convert.edit import differences
    from edgellama.convert.encoder import Encoder
    from edgellama.gguf import open_gguf

    with open_gguf(one) as a, open_gguf(other) as b, Encoder() as encoder:
        n_found = 0
        for difference in differences(a, b, encoder.decode):
            click.echo(f"{plain(difference.name)}: {plain(difference.what)}")
            n_found += 1
    if n_found:
        ctx.exit(1)
    click.echo("no difference")
