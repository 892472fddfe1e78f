"""Checkpoints that were quantized already, presented as plain floats: `X.weight`, whatever it was.

`quantization_config` (in older folders a file of its own) says which method; `int4.py` undoes GPTQ and
AWQ; here are 8-bit weights with a scale beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError, shown

from .checkpoint import SourceTensor
from .folder import inside, read_json
from .int4 import unpack_awq, unpack_gptq

_OLDER = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_SCALED = ("fp8", "modelopt", "compressed-tensors")
_SCALED_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
_BLOCK = (128, 128)
# Of activations and of the KV cache: nothing that weights need.
_UNUSED = (".input_scale", ".output_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale")


def as_floats(
    tensors: dict[str, SourceTensor], config: dict[str, Any], folder: Path
) -> dict[str, SourceTensor]:
    """Return the tensors with every quantized weight as one float tensor.

    Raises: UnsupportedModelError for a method that is not read; ModelFileError for what does not fit.
    """
    how = _quantization(config, folder)
    method = how.get("quant_method")
    if not how:
        return scaled(tensors, {})
    if method == "gptq":
        return unpack_gptq(tensors, how)
    if method == "awq":
        return unpack_awq(tensors, how)
    format_ = how.get("format", _SCALED_FORMATS[0])
    fp8 = method != "modelopt" or how.get("quant_algo") == "FP8"
    if method in _SCALED and format_ in _SCALED_FORMATS and fp8:
        return scaled(tensors, how)
    detail = how.get("format") or how.get("quant_algo")
    raise UnsupportedModelError(
        f"{folder.name} was quantized with {shown(method)}{f' ({shown(detail)})' if detail else ''}; "
        f"gptq, awq, {', '.join(_SCALED)} (8 bits) are read. Convert the original model instead"
    )


def _quantization(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    how = config.get("quantization_config") or config.get("compression_config")
    if how is None:
        for name, method in _OLDER.items():
            if (folder / name).exists():
                return {"quant_method": method, **read_json(inside(folder, name))}
        return {}
    if not isinstance(how, dict):
        raise ModelFileError(
            f"config.json: quantization_config is {shown(how)}; an object is needed"
        )
    return how


class ScaledTensor(SourceTensor):
    """8-bit weights times a scale: one for all, one a row, or one a block of rows and columns."""

    def __init__(self, weight: SourceTensor, scale: SourceTensor, block: tuple[int, int]) -> None:
        self.weight, self.scale = weight, scale
        self.name, self.shape, self.dtype = weight.name, weight.shape, weight.dtype
        self.nbytes = weight.nbytes + scale.nbytes
        if scale.shape in ((), (1,), (1, 1)):
            self.block = (max(self.n_rows, 1), 0)
        elif scale.shape in ((self.n_rows,), (self.n_rows, 1)):
            self.block = (1, 0)
        else:
            self.block = block
            needed = tuple(-(-n // b) for n, b in zip(self.shape, block, strict=False))
            if len(self.shape) != 2 or scale.shape != needed:
                raise ModelFileError(
                    f"{scale.name} has shape {list(scale.shape)}; {self.name} of shape "
                    f"{list(self.shape)} needs one scale, one a row, or one a block of {list(block)}"
                )

    def _read(self, start: int, stop: int) -> np.ndarray:
        rows, cols = self.block
        values = self.weight.read(start, stop)
        if not self.scale.shape:
            return values * self.scale.read()
        first, last = start // rows, -(-stop // rows)
        scales = self.scale.read(first, last)  # (blocks of rows, blocks of columns)
        scales = scales[np.arange(start, stop) // rows - first]
        if cols:
            return values * np.repeat(scales, cols, axis=1)[:, : self.shape[1]]
        return values * scales.reshape(-1, *[1] * (values.ndim - 1))


def scaled(tensors: dict[str, SourceTensor], how: dict[str, Any]) -> dict[str, SourceTensor]:
    """Join 8-bit weights with their scales (`X.weight_scale`, or `X.weight_scale_inv`, which is
    multiplied too); drop the scales of activations."""
    block = how.get("weight_block_size", list(_BLOCK))
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(n) is int and n > 0 for n in block)
    ):
        raise ModelFileError("config.json: weight_block_size must be two sizes, such as [128, 128]")
    out = dict(tensors)
    for name, scale in tensors.items():
        base, found, _ = name.rpartition("_scale_inv" if name.endswith("_inv") else "_scale")
        if found and base.endswith("weight") and base in tensors:
            weight = tensors[base]
            if f"{base}_zero_point" in tensors or weight.dtype not in ("F8_E4M3", "F8_E5M2", "I8"):
                raise UnsupportedModelError(
                    f"{shown(base)} is {weight.dtype} with scales; 8-bit weights without zero points "
                    "are read. Convert the original model instead"
                )
            out[base] = ScaledTensor(weight, scale, (block[0], block[1]))
            del out[name]
        elif how and name.endswith(_UNUSED):
            del out[name]
    return out
