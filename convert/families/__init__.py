"""From a checkpoint to the metadata and tensors of a GGUF file: a small file per family.

`plan` is where to begin.  A family reads hyper-parameters from `Hyper` (hyper.py) and tensors from
`TensorMap` (plan.py), plans what the file will hold, and returns patterns of what may be left out.
Names and meanings in GGUF are llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from edgellama.errors import ModelFileError, UnsupportedModelError, shown

from . import gemma, internlm, llama, meta, olmo, phi, qwen, stablelm
from .hyper import Hyper
from .plan import Checkpoint, Plan, PlannedTensor, TensorMap

__all__ = ["FAMILIES", "Family", "Plan", "PlannedTensor", "plan"]

_PREFIXES = ("model.", "", "model.language_model.", "language_model.model.")


class Family(NamedTuple):
    """The architecture of a `model_type` in GGUF, and who plans it."""

    architecture: str
    plan: Callable[[Hyper, TensorMap], tuple[str, ...]]
    eps: str = "rms_norm_eps"
    defaults: Mapping[str, Any] = {}


FAMILIES = {
    "gemma": Family("gemma", gemma.gemma),
    "gemma2": Family("gemma2", gemma.gemma2),
    "gemma3": Family("gemma3", gemma.gemma3, defaults=gemma.GEMMA3_DEFAULTS),
    "gemma3_text": Family("gemma3", gemma.gemma3, defaults=gemma.GEMMA3_DEFAULTS),
    "granite": Family("granite", llama.granite),
    "internlm2": Family("internlm2", internlm.internlm2),
    "llama": Family("llama", llama.llama),
    "mistral": Family("llama", llama.mistral),
    "olmo2": Family("olmo2", olmo.olmo2),
    "olmo3": Family("olmo2", olmo.olmo3),
    "phi3": Family("phi3", phi.phi3),
    "qwen2": Family("qwen2", qwen.qwen2),
    "qwen3": Family("qwen3", qwen.qwen3),
    "smollm3": Family("smollm3", llama.smollm3),
    "stablelm": Family("stablelm", stablelm.stablelm, eps="layer_norm_eps"),
}
"""By `model_type` of config.json."""


def plan(checkpoint: Checkpoint) -> Plan:
    """Plan the GGUF file of a checkpoint; nothing but names and shapes is read yet.

    Raises: UnsupportedModelError for a family, hyper-parameter or tensor that is not known;
    ModelFileError for one that is missing or does not fit.
    """
    config = checkpoint.config
    if "model_type" not in config and "dim" in config:  # params.json
        embedding = checkpoint.tensors.get("tok_embeddings.weight")
        config = meta.translated(config, embedding.shape[0] if embedding is not None else 0)
        return _plan(Family("llama", meta.meta), config, checkpoint)
    text_config = config.get("text_config", {})
    if not isinstance(text_config, dict):
        raise ModelFileError(f"config.json: text_config is {shown(text_config)}; it is an object")
    config = config | text_config | {"model_type": config.get("model_type")}
    model_type = config["model_type"]
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"config.json: model_type is {shown(model_type)}; edgellama converts: "
            f"{', '.join(FAMILIES)}"
        )
    return _plan(family, config, checkpoint)


def _plan(family: Family, config: Mapping[str, Any], checkpoint: Checkpoint) -> Plan:
    hyper = Hyper(config, family.architecture, family.defaults)
    hyper.sizes(family.eps)
    tensors = TensorMap(checkpoint.tensors, _PREFIXES)
    droppable = family.plan(hyper, tensors)
    return Plan(family.architecture, hyper.metadata, tensors.finish(droppable))
