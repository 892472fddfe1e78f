"""One GGUF file becomes another in other block formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import UnsupportedModelError, UsageError
from edgellama.gguf import GGUFFile, open_gguf

from .edit import new_tensor, raw_metadata
from .encoder import Encoder
from .recipes import AS_THE_RECIPE_SAYS, Choices, choose_formats, find_recipe
from .write import Source, TensorReport, write_model

_QUANTIZATION_VERSION = 2


def quantize(
    source: Path,
    out: Path,
    type_name: str,
    encoder: Encoder,
    *,
    choices: Choices = AS_THE_RECIPE_SAYS,
    importance: Mapping[str, np.ndarray] | None = None,
    importance_file: str = "",
    measure: bool = False,
    force: bool = False,
) -> list[TensorReport]:
    """Write the tensors of `source` as the recipe `type_name` has them; metadata are kept.

    Raises: UsageError for an unknown type, an importance matrix that does not fit, or an `out` that
    exists or is the source; ModelFileError; OSError.
    """
    _, recipe = find_recipe(type_name)
    if out.exists() and out.samefile(source):
        raise UsageError(f"{out} is the file to be read; give the new one another name")
    with open_gguf(source) as gguf:
        sources = [gguf_source(gguf, name) for name in gguf.tensors]
        check_importance(importance or {}, sources)
        tensors = choose_formats(
            [s.tensor for s in sources], recipe, choices,
            wide_groups=wide_groups(gguf.metadata), importance=importance or (),
        )  # fmt: skip
        metadata = raw_metadata(gguf) | type_metadata(recipe.file_type)
        if importance:
            metadata["quantize.imatrix.file"] = importance_file
            metadata["quantize.imatrix.entries_count"] = len(importance)
        return write_model(
            out, metadata, sources, [t.format for t in tensors], encoder,
            importance=importance, measure=measure, force=force,
        )  # fmt: skip


def type_metadata(file_type: int) -> dict[str, Any]:
    """The keys that say what the blocks are."""
    return {
        "general.quantization_version": _QUANTIZATION_VERSION,
        "general.file_type": file_type,
    }


def wide_groups(metadata: Mapping[str, Any]) -> bool:
    """Whether four or more query heads share their keys and values."""
    arch = metadata.get("general.architecture")
    heads, kv_heads = (
        metadata.get(f"{arch}.attention.{key}") for key in ("head_count", "head_count_kv")
    )
    return isinstance(heads, int) and isinstance(kv_heads, int) and heads >= 4 * max(kv_heads, 1)


def check_importance(importance: Mapping[str, np.ndarray], sources: list[Source]) -> None:
    """Raise: UsageError for an entry of another width than its tensor, or when none fits."""
    tensors = {s.tensor.name: s.tensor for s in sources}
    if importance and not importance.keys() & tensors.keys():
        raise UsageError("the importance matrix is of another model: no tensor has a name in it")
    for name in importance.keys() & tensors.keys():
        if len(importance[name]) != tensors[name].shape[0]:
            raise UsageError(
                f"the importance matrix has {len(importance[name])} columns for {name}, which has "
                f"{tensors[name].shape[0]}; it is of another model"
            )


def gguf_source(gguf: GGUFFile, name: str) -> Source:
    """The rows of a tensor of an open file, in its own format."""
    info = gguf.tensors[name]
    if not info.format.packed:
        raise UnsupportedModelError(
            f"{name} is of type {info.type_name}, which edgellama does not decode; start from "
            "another file of this model"
        )
    reader, row_nbytes = gguf.bytes_of(name), info.format.row_nbytes(info.shape[0])

    def read(start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, row_nbytes), np.uint8)
        reader.read_into(rows.reshape(-1), start * row_nbytes)
        return rows

    return Source(new_tensor(info), read)
