"""`edgellama info` and `verify`: what is in a file, and whether it is sound."""

from __future__ import annotations

import json
from typing import Any

import click
import numpy as np

from edgellama.catalog import resolve
from edgellama.errors import ModelFileError
from edgellama.gguf import GGUFFile, TensorInfo, open_gguf
from edgellama.models.config import read_config


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
            text = json.dumps(_short(value), ensure_ascii=False)
            click.echo(f"  {key} = {text if len(text) <= 100 else text[:97] + '...'}")
        sizes = ", ".join(f"{name} {n / 1e6:.1f} MB" for name, n in sorted(by_type.items()))
        click.echo(f"{len(gguf.tensors)} tensors, {n_weights / 1e6:.1f} M weights: {sizes}")
        for t in gguf.tensors.values() if tensors else ():
            click.echo(f"  {t.name:32} {t.type_name:8} {'x'.join(map(str, t.shape))}")


def _short(value: Any) -> Any:
    """A value fit for display: the first elements of long arrays."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list) and len(value) > 8:
        return [*value[:8], f"... {len(value)} in all"]
    return value


@click.command("verify")
@click.argument("model")
def verify(model: str) -> None:
    """Check MODEL: its structure, its hyper-parameters, and every number in it."""
    with open_gguf(resolve(model, offline=True)) as gguf:
        if "general.architecture" in gguf.metadata and "token_embd.weight" in gguf.tensors:
            read_config(gguf)
        bad = [t.name for t in gguf.tensors.values() if not _is_finite(gguf, t)]
        if bad:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise ModelFileError(
                f"{gguf.path.name}: NaN or infinite values in {', '.join(bad[:5])}{more}; "
                "fetch or convert the file again"
            )
        click.echo(f"{gguf.path}: {len(gguf.tensors)} tensors, sound")


# Where the f16 scales of a block lie; formats not named here have none that could be NaN.
_SCALES_AT = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82),
    "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,), "iq4_xs": (0,),
}  # fmt: skip


def _is_finite(gguf: GGUFFile, tensor: TensorInfo) -> bool:
    raw = gguf.data(tensor.name)
    if tensor.type_name in ("f32", "f64", "f16"):
        dtype = {"f32": "<f4", "f64": "<f8", "f16": "<f2"}[tensor.type_name]
        return bool(np.isfinite(raw.view(dtype)).all())
    if tensor.type_name == "bf16":
        return bool(((raw.view("<u2") & 0x7F80) != 0x7F80).all())
    blocks = raw.reshape(-1, tensor.nbytes * _block(tensor) // max(tensor.n_weights, 1) or 1)
    for at in _SCALES_AT.get(tensor.type_name, ()):
        scales = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")
        if not np.isfinite(scales).all():
            return False
    if tensor.type_name == "mxfp4":
        return bool((blocks[:, 0] != 255).all())
    return True


def _block(tensor: TensorInfo) -> int:
    from edgellama.kernels.blocks import FORMAT_BY_ID, OTHER_TYPES

    return (FORMAT_BY_ID.get(tensor.type_id) or OTHER_TYPES[tensor.type_id]).n_weights
