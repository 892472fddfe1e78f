"""A checkpoint becomes a GGUF file: names and settings by its family, tensors in the chosen formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import UsageError
from edgellama.gguf.writer import NewTensor
from edgellama.kernels.blocks import FORMATS

from .checkpoint import Checkpoint
from .encoder import Encoder
from .families import Plan, PlannedTensor, plan
from .quantize import check_importance, type_metadata, wide_groups
from .recipes import AS_THE_RECIPE_SAYS, Choices, choose_formats, find_recipe
from .vocabulary import read_settings, read_vocabulary, sampling_defaults
from .write import Source, TensorReport, write_model

# Formats that hold what a checkpoint's types hold; vectors are always f32.
_KEPT_AS = {"F16": "f16", "BF16": "bf16", "F8_E4M3": "bf16", "F8_E5M2": "bf16"}


def convert(
    checkpoint: Checkpoint,
    out: Path,
    type_name: str,
    encoder: Encoder,
    *,
    choices: Choices = AS_THE_RECIPE_SAYS,
    importance: Mapping[str, np.ndarray] | None = None,
    importance_file: str = "",
    name: str | None = None,
    tokenizer: Path | None = None,
    measure: bool = False,
    force: bool = False,
) -> list[TensorReport]:
    """Write a checkpoint as one GGUF file.

    `tokenizer` is the folder of the tokenizer's files, where it is not the checkpoint's own.
    Raises: UnsupportedModelError naming the architecture, tensor or setting that is not known;
    ModelFileError; UsageError; OSError.
    """
    _, recipe = find_recipe(type_name)
    planned = plan(checkpoint)
    folder = tokenizer or checkpoint.folder
    if folder is None:
        raise UsageError(f"{checkpoint.kind} holds no tokenizer; name its folder: --tokenizer")
    sources = [_source(tensor, checkpoint) for tensor in planned.tensors]
    check_importance(importance or {}, sources)
    metadata = _metadata(planned, checkpoint, folder, name or folder.resolve().name)
    metadata |= type_metadata(recipe.file_type)
    if importance:
        metadata["quantize.imatrix.file"] = importance_file
        metadata["quantize.imatrix.entries_count"] = len(importance)
    tensors = choose_formats(
        [s.tensor for s in sources], recipe, choices,
        wide_groups=wide_groups(metadata), importance=importance or (),
    )  # fmt: skip
    return write_model(
        out, metadata, sources, [t.format for t in tensors], encoder,
        importance=importance, measure=measure, force=force,
    )  # fmt: skip


def _source(tensor: PlannedTensor, checkpoint: Checkpoint) -> Source:
    dtypes = {checkpoint.tensors[source].dtype for source in tensor.sources}
    kept = _KEPT_AS.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"
    kept = "f32" if len(tensor.shape) == 1 else kept
    new = NewTensor(tensor.name, tuple(reversed(tensor.shape)), FORMATS[kept])
    if len(tensor.shape) > 1:
        return Source(new, tensor.read)
    return Source(new, lambda start, stop: tensor.read(0, tensor.shape[0]).reshape(1, -1))


def _metadata(plan: Plan, checkpoint: Checkpoint, folder: Path, name: str) -> dict[str, Any]:
    n_vocab = next(t.shape[0] for t in plan.tensors if t.name == "token_embd.weight")
    out: dict[str, Any] = {"general.architecture": plan.architecture, "general.type": "model"}
    out |= {"general.name": name} | plan.metadata
    out |= sampling_defaults(read_settings(folder, "generation_config.json"))
    return out | read_vocabulary(folder, checkpoint.config, n_vocab)
