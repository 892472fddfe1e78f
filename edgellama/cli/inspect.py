"""`edgellama info` and `verify`: what is in a file, and whether it is sound."""

from __future__ import annotations

import json
import math
from typing import Any

import click
import numpy as np

from edgellama.catalog import resolve
from edgellama.cli import plain
from edgellama.gguf import GGUFFile, open_gguf
from edgellama.models.config import read_config
from edgellama.tokenizer import load_tokenizer


@click.command("info")
@click.argument("model", required=False)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
def info(model: str | None, tensors: bool, as_json: bool, offline: bool) -> None:
    """Show the metadata and the tensors of MODEL."""
    with open_gguf(resolve(model, offline=offline)) as gguf:
        by_type: dict[str, int] = {}
        for tensor in gguf.tensors.values():
            by_type[tensor.type_name] = by_type.get(tensor.type_name, 0) + tensor.nbytes
        n_weights = sum(t.n_weights for t in gguf.tensors.values())
        if as_json:
            document = {
                "path": str(gguf.path),
                "version": gguf.version,
                "alignment": gguf.alignment,
                "parameters": n_weights,
                "bytes_by_type": by_type,
                "metadata": {key: _short(value) for key, value in gguf.metadata.items()},
                "tensors": [
                    {"name": t.name, "shape": list(t.shape), "type": t.type_name}
                    for t in gguf.tensors.values()
                ],
            }
            click.echo(json.dumps(document, ensure_ascii=False, indent=1))
            return
        click.echo(f"{gguf.path}: GGUF version {gguf.version}, alignment {gguf.alignment}")
        for key, value in gguf.metadata.items():
            text = plain(json.dumps(_short(value), ensure_ascii=False)[:101])
            click.echo(f"  {plain(key)} = {text if len(text) <= 100 else text[:97] + '...'}")
        sizes = ", ".join(f"{name} {n / 1e6:.1f} MB" for name, n in sorted(by_type.items()))
        click.echo(f"{len(gguf.tensors)} tensors, {n_weights / 1e6:.1f} M weights: {sizes}")
        for t in gguf.tensors.values() if tensors else ():
            click.echo(f"  {plain(t.name):32} {t.type_name:8} {'x'.join(map(str, t.shape))}")


def _short(value: Any) -> Any:
    """A value fit for display and for JSON: the first elements of long arrays, no NaN."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        more = [f"... {len(value)} in all"] if len(value) > 8 else []
        return [*map(_short, value[:8]), *more]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@click.command("verify")
@click.argument("model")
def verify(model: str) -> None:
    """Check MODEL: its structure, hyper-parameters, tokenizer, and every number in it."""
    with open_gguf(resolve(model, offline=True)) as gguf:
        if _is_model(gguf):
            read_config(gguf)
            load_tokenizer(gguf.metadata)
        for name in gguf.tensors:
            gguf.bytes_of(name).check()
        click.echo(f"{gguf.path}: {len(gguf.tensors)} tensors, sound")


def _is_model(gguf: GGUFFile) -> bool:
    """Whether the file claims to be a model, not an adapter, a vocabulary or something else."""
    arch, kind = (gguf.metadata.get(f"general.{key}") for key in ("architecture", "type"))
    named = isinstance(kind, str) and kind != "model"
    has_embedding = "token_embd.weight" in gguf.tensors
    has_layers = bool(gguf.tensors) and f"{arch}.block_count" in gguf.metadata
    return not named and (has_embedding or has_layers)
