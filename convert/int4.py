"""Weights that GPTQ or AWQ packed into 32-bit words, read as floats.

Both keep a matrix with inputs as rows, and for a group of inputs a scale and a zero per output:
`weight[out, in] = (q[in, out] - zero[group, out]) * scale[group, out]`.

                    GPTQ                                    AWQ ("gemm")
    qweight i32     (in / n, out): n inputs a word          (in, out / n): n outputs a word
    qzeros  i32     (groups, out / n): n outputs a word     (groups, out / n), as qweight
    scales          (groups, out)                           (groups, out)
    g_idx   i32     (in,): the group of each input

n is 32 / bits.  GPTQ counts places in a word from the lowest bits; AWQ has them in the order 0 2 4 6
1 3 5 7.  Source: AutoGPTQ and GPTQModel `qlinear`; AutoAWQ `WQLinear_GEMM`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError, shown

from .checkpoint import SourceTensor
from .stored import StoredTensor, to_float32

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of outputs 0 to 7
_NOTHING = np.uint32(0)


class PackedTensor(SourceTensor):
    """`X.weight` (out, in) of a packed matrix: its rows are columns of the packed tensors."""

    def __init__(
        self,
        base: str,
        parts: dict[str, StoredTensor],
        *,
        bits: int,
        is_awq: bool,
        zero_offset: int,  # to be added to the words of qzeros
    ) -> None:
        self.name, self.bits, self.is_awq = f"{base}.weight", bits, is_awq
        self.zero_offset = np.uint32(zero_offset)
        self.dtype = f"I{bits}"
        self.nbytes = sum(part.nbytes for part in parts.values())
        self.qweight, self.qzeros = parts["qweight"], parts["qzeros"]
        self.scales, self.g_idx = parts["scales"], parts.get("g_idx")
        n = 32 // bits
        for part in (self.qweight, self.qzeros, self.scales):
            if len(part.shape) != 2 or (part is not self.scales and part.dtype != "I32"):
                raise ModelFileError(
                    f"{part.name} is {part.dtype} of shape {list(part.shape)}; a matrix is needed"
                )
        rows, cols = self.qweight.shape
        self.shape = (cols * n, rows) if is_awq else (cols, rows * n)
        n_out, n_in = self.shape
        n_groups = self.scales.shape[0]
        if (
            self.scales.shape != (n_groups, n_out)
            or self.qzeros.shape != (n_groups, -(-n_out // n))
            or not n_groups
            or (self.g_idx is not None and (self.g_idx.shape, self.g_idx.dtype) != ((n_in,), "I32"))
        ):
            raise ModelFileError(
                f"{self.name} has shape {list(self.shape)}; scales of shape {list(self.scales.shape)} "
                f"and qzeros of shape {list(self.qzeros.shape)} do not fit it"
            )

    def _read(self, start: int, stop: int) -> np.ndarray:
        """As the file has it, inputs by outputs; turned at the end."""
        zeros = self._outputs(self.qzeros, start, stop, self.zero_offset)  # (groups, outputs)
        scales = to_float32(self.scales.columns(start, stop), self.scales.dtype)
        if self.is_awq:
            weight = self._outputs(self.qweight, start, stop)
        else:
            words = self.qweight.columns(start, stop)
            weight = self._unpacked(words, range(32 // self.bits)).swapaxes(0, 1)
            weight = weight.reshape(-1, stop - start)
        group = self._groups()
        weight -= zeros[group]
        weight *= scales[group]
        return np.ascontiguousarray(weight.T)

    def _groups(self) -> np.ndarray:
        """The group of each input, (in,)."""
        n_in, n_groups = self.shape[1], self.scales.shape[0]
        group = None if self.g_idx is None else self.g_idx.raw(0, n_in)
        if group is None or not group.any():  # some writers leave zeros where inputs are in order
            if n_in % n_groups:
                raise ModelFileError(
                    f"{self.name} has {n_in} columns and {n_groups} groups of them"
                )
            return np.arange(n_in) // (n_in // n_groups)
        if group.min() < 0 or group.max() >= n_groups:
            raise ModelFileError(
                f"{self.name}: g_idx names groups {group.min()} to {group.max()}; "
                f"there are {n_groups}"
            )
        return group

    def _outputs(
        self, packed: StoredTensor, start: int, stop: int, add: np.uint32 = _NOTHING
    ) -> np.ndarray:
        """Columns `start` to `stop` of a tensor that packs outputs, f32 (its rows, stop - start)."""
        n = 32 // self.bits
        words = packed.columns(start // n, -(-stop // n)).view("<u4") + add
        places = _AWQ_PLACES if self.is_awq else range(n)
        numbers = np.moveaxis(self._unpacked(words, places), 0, -1).reshape(len(words), -1)
        return numbers[:, start % n :][:, : stop - start]

    def _unpacked(self, words: np.ndarray, places: Iterable[int]) -> np.ndarray:
        """The numbers at places of each word, f32 (places, *words.shape); 0 is the lowest bits."""
        words, mask = words.view("<u4"), np.uint32((1 << self.bits) - 1)
        numbers = [words >> np.uint32(self.bits * place) & mask for place in places]
        return np.stack(numbers, dtype=np.float32, casting="same_kind")


def unpack_gptq(tensors: dict[str, SourceTensor], how: dict[str, Any]) -> dict[str, SourceTensor]:
    """Replace the packed tensors of GPTQ; `how` is its quantization_config.

    Raises: UnsupportedModelError, ModelFileError.
    """
    bits, format_ = how.get("bits"), how.get("checkpoint_format", "gptq")
    if bits not in (4, 8) or format_ not in ("gptq", "gptq_v2") or how.get("dynamic"):
        raise UnsupportedModelError(
            f"this model has GPTQ weights of {shown(bits)} bits in the format {shown(format_)}; 4 and 8 "
            "bits, the same for all, in the formats gptq and gptq_v2 are read"
        )
    # The first format holds every zero less one.  Writers subtract from whole words, with borrow.
    one = {4: 0x11111111, 8: 0x01010101}[bits]
    offset = one if format_ == "gptq" else 0
    return _unpacked(tensors, ("qzeros", "scales", "g_idx"), bits, offset)


def unpack_awq(tensors: dict[str, SourceTensor], how: dict[str, Any]) -> dict[str, SourceTensor]:
    """Replace the packed tensors of AWQ; `how` is its quantization_config (or quant_config.json).

    Raises: UnsupportedModelError, ModelFileError.
    """
    bits, version = how.get("bits", how.get("w_bit")), str(how.get("version", "gemm"))
    if bits != 4 or version.lower() != "gemm":
        raise UnsupportedModelError(
            f"this model has AWQ weights of {shown(bits)} bits in the version {shown(version)}; "
            "4 bits in the version gemm are read"
        )
    return _unpacked(tensors, ("qzeros", "scales"), bits, 0, is_awq=True)


def _unpacked(
    tensors: dict[str, SourceTensor],
    suffixes: tuple[str, ...],
    bits: int,
    zero_offset: int,
    *,
    is_awq: bool = False,
) -> dict[str, SourceTensor]:
    out = dict(tensors)
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        base = name.removesuffix(".qweight")
        parts = {}
        for suffix in ("qweight", *suffixes):
            part = out.pop(f"{base}.{suffix}", None)
            if part is None and suffix != "g_idx":
                raise ModelFileError(f"{shown(name)} has no {suffix} beside it, which it needs")
            if isinstance(part, StoredTensor):
                parts[suffix] = part
        if f"{base}.weight" in tensors:
            raise ModelFileError(f"{shown(base)} has a weight and a qweight; one is needed")
        packed = PackedTensor(base, parts, bits=bits, is_awq=is_awq, zero_offset=zero_offset)
        out[packed.name] = packed
    return out
