"""The words in which a forward pass is written: unfused operations over named tensors.

A family's `forward` (llama.py and its neighbours) calls these; the result is a list of nodes in order.
`edgellama/runtime/lowering.py` fuses them into the records of a program, which the kernels run.
Rows are tokens: a tensor is (T, width) float32, and after `take` (wanted rows, width).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from edgellama.gguf import TensorInfo

from .config import ModelConfig
from .rope import RopeConfig


class Tensor:
    """A value in the pass: (T, width), or (n_out, width) when `of_out_rows`."""

    __slots__ = ("name", "of_out_rows", "width")

    def __init__(self, name: str, width: int, of_out_rows: bool = False) -> None:
        self.name, self.width, self.of_out_rows = name, width, of_out_rows


class Node(NamedTuple):
    """One operation: what it reads, what it writes, and its settings."""

    kind: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    weight: str
    bias: str
    settings: dict[str, Any]


class Builder:
    """Collects the nodes of one model's forward pass."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> None:
        self.config = config
        self.tensors = tensors
        self.nodes: list[Node] = []

    def _emit(self, kind: str, inputs: tuple[Tensor, ...], width: int, **rest: Any) -> Tensor:
        weight = rest.pop("weight", "")
        bias = rest.pop("bias", "")
        name = rest.pop("name", "") or f"{kind}_{len(self.nodes)}"
        of_out_rows = rest.pop("of_out_rows", bool(inputs) and inputs[0].of_out_rows)
        output = Tensor(name, width, of_out_rows)
        self.nodes.append(Node(kind, inputs, output, weight, bias, rest))
        return output

    def embed(self, weight: str, scale: float = 1.0) -> Tensor:
        """Rows of the embedding of the step's token ids, times `scale`."""
        return self._emit("embed", (), self.config.width, weight=f"{weight}.weight", scale=scale)

    def rms_norm(self, x: Tensor, weight: str, head_size: int = 0) -> Tensor:
        """x / rms(x) * weight, over whole rows, or over each head of `head_size`."""
        return self._emit(
            "rms_norm", (x,), x.width, weight=f"{weight}.weight", group=head_size or x.width,
            name=weight,
        )  # fmt: skip

    def layer_norm(self, x: Tensor, weight: str, head_size: int = 0) -> Tensor:
        """(x - mean) / deviation * weight, plus the bias where the file has one.

        Over whole rows, or over each head of `head_size` with weights of its own.
        """
        bias = f"{weight}.bias" if f"{weight}.bias" in self.tensors else ""
        return self._emit(
            "layer_norm", (x,), x.width, weight=f"{weight}.weight", bias=bias,
            group=head_size or x.width, name=weight,
        )  # fmt: skip

    def linear(self, x: Tensor, weight: str) -> Tensor:
        """x @ W^T, plus the bias where the file has one."""
        bias = f"{weight}.bias" if f"{weight}.bias" in self.tensors else ""
        n_rows = self.tensors[f"{weight}.weight"].shape[1]
        return self._emit("linear", (x,), n_rows, weight=f"{weight}.weight", bias=bias, name=weight)

    def rope(self, x: Tensor, n_heads: int, rope: RopeConfig) -> Tensor:
        """Rotate every head by the position of its token."""
        return self._emit("rope", (x,), x.width, n_heads=n_heads, rope=rope)

    def attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int = 0,
        soft_cap: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Put k and v into the cache of `layer`; softmax(q K^T scale) V over what a token may see."""
        stored = self._emit("store_kv", (k, v), 0, layer=layer)
        return self._emit(
            "attend", (q, stored), q.width, layer=layer, scale=scale, window=window,
            soft_cap=soft_cap, name=f"blk.{layer}.attn",
        )  # fmt: skip

    def gated(self, gate: Tensor, up: Tensor, function: str) -> Tensor:
        """f(gate) * up, f being silu or gelu."""
        return self._emit("gated", (gate, up), gate.width, function=function)

    def add(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """The residual sum x + y * scale."""
        return self._emit("add", (x, y), x.width, scale=scale)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """x * factor."""
        return self._emit("scale", (x,), x.width, factor=factor)

    def take(self, x: Tensor) -> Tensor:
        """Keep only the rows whose logits are wanted."""
        return self._emit("take", (x,), x.width, of_out_rows=True)

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        """cap * tanh(x / cap)."""
        return self._emit("soft_cap", (x,), x.width, cap=cap)
