"""One GGUF file becomes another in other block formats."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgellama.errors import UnsupportedModelError, UsageError, shown
from edgellama.gguf import GGUFFile, open_gguf
from edgellama.gguf.new_file import check_absent
from edgellama.gguf.writer import NewTensor

from .budget import choose_by_size
from .edit import new_tensor, raw_metadata, read_rows
from .encoder import Encoder
from .recipes import RECIPES, Choices, choose_formats, find_recipe
from .write import Source, TensorReport, write_model

_QUANTIZATION_VERSION = 2


class Quantization(NamedTuple):
    """How tensors are to be stored, whatever they come from."""

    type_name: str  # a recipe
    choices: Choices = Choices()
    target_bpw: float = 0.0  # when given, formats are chosen by size instead
    importance: Mapping[str, np.ndarray] = {}  # f32 (n_cols,) by tensor name
    importance_file: str = ""
    measure: bool = False  # errors for the report
    force: bool = False  # overwrite


def quantize(source: Path, out: Path, wanted: Quantization, encoder: Encoder) -> list[TensorReport]:
    """Write the tensors of a GGUF file in other formats; metadata are kept.

    Raises: UsageError for an unknown type, an importance matrix that does not fit, a file that is no
    model, or an `out` that exists or is a part of the source; ModelFileError; OSError.
    """
    with open_gguf(source) as gguf:
        check_absent(out, wanted.force, gguf.paths)
        kind = gguf.metadata.get("general.type", "model")
        if kind != "model" or not gguf.tensors:
            what = f"is of type {shown(kind)}" if gguf.tensors else "holds no tensors"
            raise UsageError(f"{source} {what}; a model is needed")
        sources = [gguf_source(gguf, name) for name in gguf.tensors]
        groups = wide_groups(gguf.metadata)
        return write_quantized(out, raw_metadata(gguf), sources, groups, wanted, encoder)


def write_quantized(
    out: Path,
    metadata: Mapping[str, Any],
    sources: list[Source],
    wide_groups: bool,
    wanted: Quantization,
    encoder: Encoder,
) -> list[TensorReport]:
    """Choose formats and write a file; `wide_groups` as in `recipes.Layers`."""
    _, recipe = find_recipe(wanted.type_name)
    importance = wanted.importance
    check_importance(importance, sources)
    if wanted.target_bpw:
        tensors = choose_by_size(sources, encoder, wanted.target_bpw, wanted.choices, importance)
    else:
        tensors = choose_formats(
            [s.tensor for s in sources], recipe, wanted.choices,
            wide_groups=wide_groups, importance=importance,
        )  # fmt: skip
    said: dict[str, Any] = {
        "general.quantization_version": _QUANTIZATION_VERSION,
        "general.file_type": _commonest(tensors) if wanted.target_bpw else recipe.file_type,
    }
    if importance:
        said |= {
            "quantize.imatrix.file": wanted.importance_file,
            "quantize.imatrix.entries_count": len(importance),
        }
    return write_model(
        out, {**metadata, **said}, sources, [t.format for t in tensors], encoder,
        importance=importance, measure=wanted.measure, force=wanted.force,
    )  # fmt: skip


def _commonest(tensors: list[NewTensor]) -> int:
    """The file type of the format that most weights have."""
    n_weights: dict[str, int] = {}
    for t in tensors:
        n_weights[t.format.name] = n_weights.get(t.format.name, 0) + prod(t.shape)
    most = max(n_weights, key=n_weights.__getitem__)
    return next((r.file_type for r in RECIPES.values() if r.base == most), 0)


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
    return Source(new_tensor(info), lambda start, stop: read_rows(gguf, info, start, stop - start))
