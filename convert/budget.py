"""Formats that fit a size: `--target-bpw` gives bits to the tensors where they lower the error most.

A tensor's error is relative: the weighted squared error over the weighted squares, on rows spread over
the tensor.  Relative errors of different matrices add up alike in what the model computes, whatever the
size of the matrix, so small matrices get more bits than large ones.  Only the head's error meets nothing
that would damp it: it counts as that of three matrices per layer (SmolLM2 in 6.17 bits per weight: as one
matrix mean KL 0.092, as ten 0.045, as a hundred 0.025; the recipe q4_k_m of this size has 0.047).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from edgellama.errors import UsageError
from edgellama.gguf.writer import NewTensor
from edgellama.kernels.blocks import FORMATS, BlockFormat
from edgellama.progress import progress

from .encoder import Encoder
from .recipes import EMBEDDINGS, OUTPUT, Choices, check_overrides, is_kept
from .write import Source

CANDIDATES = ("q2_k", "q3_k", "iq4_xs", "iq4_nl", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0", "f16")
"""Formats by size; of equal size, the better one comes later."""
_SAMPLE_ROWS = 128
_OF_THE_HEAD = 3


def choose_by_size(
    sources: Sequence[Source],
    encoder: Encoder,
    target_bpw: float,
    choices: Choices,
    importance: Mapping[str, np.ndarray],
) -> list[NewTensor]:
    """Give every tensor a format, so that all of them have at most `target_bpw` bits per weight.

    Raises: UsageError when even the smallest formats take more, and as `check_overrides`.
    """
    choices = check_overrides(choices, (s.tensor for s in sources))
    encoder.prepare(set(CANDIDATES) | {s.tensor.format.name for s in sources})
    budget = target_bpw / 8 * sum(prod(s.tensor.shape) for s in sources)
    n_layers = sum(s.tensor.name.endswith(".ffn_down.weight") for s in sources)
    options = []
    with progress("measure", len(sources), unit="") as advance:
        for source in sources:
            advance(0, source.tensor.name)
            options.append(
                _options(source, n_layers, encoder, choices, importance.get(source.tensor.name))
            )
            advance(1)
    least = sum(min(nbytes for _, nbytes in of_tensor.values()) for of_tensor in options)
    if least > budget:
        n = sum(prod(s.tensor.shape) for s in sources)
        raise UsageError(
            f"--target-bpw {target_bpw:g} is too small: this model needs {8 * least / n:.2f} bits per "
            "weight in the smallest formats"
        )
    names = _cheapest(options, budget)
    return [s.tensor._replace(format=FORMATS[name]) for s, name in zip(sources, names, strict=True)]


Options = dict[str, tuple[float, int]]
"""Relative squared error and bytes by format."""


def _options(
    source: Source,
    n_layers: int,
    encoder: Encoder,
    choices: Choices,
    importance: np.ndarray | None,
) -> Options:
    tensor = source.tensor
    if is_kept(tensor, choices):
        return {tensor.format.name: (0.0, tensor.nbytes)}
    forced = choices.override(tensor)
    weight = _OF_THE_HEAD * n_layers if tensor.name in (*OUTPUT, *EMBEDDINGS) else 1
    fitting = [
        FORMATS[name]
        for name in ((forced,) if forced else CANDIDATES)
        if tensor.shape[0] % FORMATS[name].n_weights == 0
    ] or [FORMATS["f16"]]
    rows = _sample(source, encoder)
    return {
        f.name: (
            weight * _relative_error(rows, f, encoder, importance),
            tensor._replace(format=f).nbytes,
        )
        for f in fitting
    }


def _sample(source: Source, encoder: Encoder) -> np.ndarray:
    """Rows spread evenly over a tensor, f32."""
    n_rows = prod(source.tensor.shape[1:])
    places = np.unique(np.linspace(0, n_rows - 1, min(n_rows, _SAMPLE_ROWS)).astype(int))
    rows = np.concatenate([source.read(i, i + 1) for i in places.tolist()])
    return encoder.decode(source.tensor.format.name, rows) if rows.dtype == np.uint8 else rows


def _relative_error(
    rows: np.ndarray, format_: BlockFormat, encoder: Encoder, importance: np.ndarray | None
) -> float:
    decoded = encoder.decode(format_.name, encoder.encode(format_.name, rows, importance))
    share = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
    total = float(np.square(rows, dtype=np.float64).sum(0) @ share)
    error = float(np.square(rows - decoded, dtype=np.float64).sum(0) @ share)
    return error / total if total else 0.0


def _cheapest(options: Sequence[Options], budget: float) -> list[str]:
    """Minimise the sum of errors within a budget of bytes, by a price per byte (Lagrange)."""

    def chosen(price: float) -> list[str]:
        return [min(o, key=lambda name: o[name][0] + price * o[name][1]) for o in options]

    def size(names: Sequence[str]) -> int:
        return sum(o[name][1] for o, name in zip(options, names, strict=True))

    low, high = 0.0, 1.0  # a price of 1 per byte takes the smallest of everything
    for _ in range(200):
        middle = (low * high) ** 0.5 if low else high / 2**8
        low, high = (middle, high) if size(chosen(middle)) > budget else (low, middle)
        if low and high / low < 1 + 1e-9:
            break
    names = chosen(high)
    # What is left over goes where it helps most.
    for i in sorted(range(len(names)), key=lambda i: -options[i][names[i]][0]):
        left = budget - size(names) + options[i][names[i]][1]
        names[i] = min(
            (name for name, (_, nbytes) in options[i].items() if nbytes <= left),
            key=lambda name: options[i][name][0],
        )
    return names
