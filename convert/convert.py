"""A checkpoint becomes a GGUF file: names and settings by its family, tensors in the chosen formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgellama.errors import UsageError
from edgellama.gguf.writer import NewTensor, check_absent
from edgellama.kernels.blocks import FORMATS

from .checkpoint import Checkpoint
from .encoder import Encoder
from .families import Plan, PlannedTensor, plan
from .quantize import Quantization, wide_groups, write_quantized
from .recipes import find_recipe
from .vocabulary import read_settings, read_vocabulary, sampling_defaults
from .write import Source, TensorReport

# Formats that hold what a checkpoint's types hold; vectors are always f32.
_KEPT_AS = {"F16": "f16", "BF16": "bf16", "F8_E4M3": "bf16", "F8_E5M2": "bf16"}


def convert(
    checkpoint: Checkpoint,
    out: Path,
    wanted: Quantization,
    encoder: Encoder,
    *,
    name: str | None = None,
    tokenizer: Path | None = None,
) -> list[TensorReport]:
    """Write a checkpoint as one GGUF file.

    `tokenizer` is the folder of the tokenizer's files, where it is not the checkpoint's own.
    Raises: UnsupportedModelError naming the architecture, tensor or setting that is not known;
    ModelFileError; UsageError; OSError.
    """
    find_recipe(wanted.type_name)  # before anything slow
    check_absent(out, wanted.force)
    planned = plan(checkpoint)
    folder = tokenizer or checkpoint.folder
    if folder is None:
        raise UsageError(f"{checkpoint.kind} holds no tokenizer; name its folder: --tokenizer")
    sources = [_source(tensor, checkpoint) for tensor in planned.tensors]
    metadata = _metadata(planned, checkpoint, folder, name or folder.resolve().name)
    return write_quantized(out, metadata, sources, wide_groups(metadata), wanted, encoder)


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
