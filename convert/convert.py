"""A checkpoint becomes a GGUF file: names and settings by its family, tensors in the chosen formats."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

from edgellama.errors import UsageError
from edgellama.gguf.new_file import check_absent
from edgellama.gguf.writer import NewTensor
from edgellama.kernels.blocks import FORMATS

from .checkpoint import Checkpoint
from .encoder import Encoder
from .families import Plan, PlannedTensor, plan
from .folder import inside, read_file
from .quantize import Quantization, wide_groups, write_quantized
from .recipes import find_recipe
from .runnable import check_runnable
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
    Raises: UnsupportedModelError naming the architecture, tensor or setting that is not known, or
    that edgellama would not open;
    ModelFileError; UsageError; OSError.
    """
    find_recipe(wanted.type_name)  # before anything slow
    folder = tokenizer or checkpoint.folder
    if folder is None:
        raise UsageError(f"{checkpoint.kind} holds no tokenizer; name its folder: --tokenizer")
    check_absent(out, wanted.force, [*_files(folder), *_files(checkpoint.folder)])
    planned = plan(checkpoint)
    sources = [_source(tensor, checkpoint) for tensor in planned.tensors]
    metadata = _metadata(planned, checkpoint, folder, name or _name(folder))
    origin = "config.json" if checkpoint.kind == "huggingface" else ""
    check_runnable(out, metadata, sources, origin)
    return write_quantized(out, metadata, sources, wide_groups(metadata), wanted, encoder)


def _files(folder: Path | None) -> list[Path]:
    """What a checkpoint is made of; a GGUF file beside it may be overwritten."""
    names = folder.iterdir() if folder is not None and folder.is_dir() else ()
    return [path for path in names if path.suffix != ".gguf"]


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
    n_weights = sum(prod(t.shape) for t in plan.tensors)
    out: dict[str, Any] = {"general.architecture": plan.architecture, "general.type": "model"}
    out |= {"general.name": name, "general.size_label": size_label(n_weights)}
    out |= _license(checkpoint.folder or folder) | plan.metadata
    out |= sampling_defaults(read_settings(folder, "generation_config.json"))
    return out | read_vocabulary(folder, checkpoint.config, n_vocab)


def _name(folder: Path) -> str:
    """The folder's name; in Hugging Face's cache, which names folders by commit, the repository's."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        folder = folder.parent.parent
    name = folder.name.removeprefix("models--").replace("--", "/")
    return name.encode(errors="replace").decode()  # a name on the disk need not be text


def _license(folder: Path) -> dict[str, str]:
    """The license that the first lines of a model card name."""
    if not (folder / "README.md").is_file():
        return {}
    card = read_file(inside(folder, "README.md")).decode("utf-8", "replace")
    front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:[ \"']*([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return {"general.license": found[1]} if found else {}


def size_label(n_weights: int) -> str:
    """So many weights as llama.cpp writes them, in at least two digits: 135M, 1.2B."""
    value, unit = next(
        ((n_weights / most, unit) for most, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"))
         if n_weights > most),
        (n_weights / 1e3, "K"),
    )  # fmt: skip
    return f"{value:.{int(round(value) < 10)}f}{unit}"
