"""Tensors that some files store together: listed as their parts, which are what a forward pass names.

Rows of a matrix lie one after the other, so that a run of them is a tensor of its own: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgellama.errors import ModelFileError
from edgellama.gguf import GGUFFile


def split_projections(
    gguf: GGUFFile, n_layers: int, width: int, stack: str, parts: Mapping[str, int]
) -> None:
    """Replace a projection of `width` columns by the `parts` stacked in it, and so its bias.

    `parts` maps the name of each to its rows, in order; a layer without the stack, or with each part
    beside it, stays as it is.
    Raises: ModelFileError naming the tensor and both shapes.
    """
    for layer in range(n_layers):
        for kind, columns in (("weight", (width,)), ("bias", ())):
            info = gguf.tensors.get(f"blk.{layer}.{stack}.{kind}")
            names = [f"blk.{layer}.{part}.{kind}" for part in parts]
            if info is None or all(name in gguf.tensors for name in names):
                continue
            shape = (*columns, sum(parts.values()))
            if info.shape != shape:
                raise ModelFileError(
                    f"{gguf.path.name}: tensor {info.name} has shape {list(info.shape)}; the "
                    f"hyper-parameters need {list(shape)}"
                )
            del gguf.tensors[info.name]
            offset = info.offset
            for name, n_rows in zip(names, parts.values(), strict=True):
                if name in gguf.tensors:
                    raise ModelFileError(
                        f"{gguf.path.name}: tensor {name} is also part of {info.name}"
                    )
                part = info._replace(
                    name=name, shape=(*columns, n_rows), offset=offset,
                    n_weights=info.n_weights // shape[-1] * n_rows,
                    nbytes=info.nbytes // shape[-1] * n_rows,
                )  # fmt: skip
                gguf.tensors[name] = part
                offset += part.nbytes


def flatten_vectors(gguf: GGUFFile, n_layers: int, head_size: int, names: tuple[str, ...]) -> None:
    """List norms that are stored as a row of `head_size` for each head as the vectors they are."""
    for layer in range(n_layers):
        for name in names:
            info = gguf.tensors.get(f"blk.{layer}.{name}.weight")
            if info is not None and len(info.shape) == 2 and info.shape[0] == head_size:
                gguf.tensors[info.name] = info._replace(shape=(info.n_weights,))
