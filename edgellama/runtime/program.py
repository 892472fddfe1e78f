"""A program: a flat table of operation records over an arena, before and after it has addresses.

`lowering.py` makes one from a forward pass; the kernels run what `bind` writes (`kernels/step.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from edgellama.kernels import layout
from edgellama.kernels.blocks import padded
from edgellama.kernels.compiler import Pack
from edgellama.kernels.team import fill_record
from edgellama.models.rope import RopeConfig

from .arena import Slot
from .kvcache import Layer
from .memory import small_pages


class Weight(NamedTuple):
    """The address of a tensor of the file, filled in when the program is bound."""

    name: str


class Cache(NamedTuple):
    """Where the cache has a layer: a field of `kvcache.Layer` by its name."""

    layer: int
    field: str


Argument = int | float | Slot | Weight | Cache | RopeConfig


class Record(NamedTuple):
    """One operation of the table before addresses are known."""

    operation: str
    arguments: dict[str, Argument]
    parts: int = 1
    tokens: int = 8
    of_out_rows: bool = False
    of_spans: bool = False  # cut into the step's spans besides
    wait: int = 0
    input: Slot | None = None  # of a projection: what it multiplies, as floats,
    n_cols: int = 0  # and how wide that is
    n_macs: int = 0  # per token


class WeightPlaces(Protocol):
    """What a program needs to know of the weights."""

    def address(self, name: str) -> int: ...


class KVPlaces(Protocol):
    """What a program needs to know of the cache."""

    def layer(self, layer: int) -> Layer: ...


class Program(NamedTuple):
    """Records, and the slots they work on; from record `head_first` on they run over wanted rows."""

    records: list[Record]
    head_first: int
    slots: list[Slot]
    logits: Slot
    formats: Mapping[str, str]  # of matrices, by name
    rotations: Mapping[int, RopeConfig]  # of the keys of layers that know positions

    @property
    def operations(self) -> list[str]:
        """Names of the operations to build and load, those that pack its weights among them."""
        names = [record.operation for record in self.records]
        formats = (self.formats[name] for name in self.weights if name in self.formats)
        names += [f"repack.repack[{format_name}]" for format_name in formats]
        return list(dict.fromkeys(names))

    @property
    def weights(self) -> list[str]:
        """Names of the tensors to load."""
        arguments = (a for record in self.records for a in record.arguments.values())
        return list(dict.fromkeys(a.name for a in arguments if isinstance(a, Weight)))

    @property
    def gathered(self) -> set[str]:
        """Tensors of which a step needs only the rows of its tokens."""
        used: dict[bool, set[str]] = {True: set(), False: set()}
        for record in self.records:
            for argument in record.arguments.values():
                if isinstance(argument, Weight):
                    used[record.operation.startswith("matmul.embed")].add(argument.name)
        return used[True] - used[False]

    @property
    def scratch_nbytes(self) -> int:
        """Bytes that the largest operation needs per thread."""
        most = 4096
        for record in self.records:
            a = record.arguments
            if record.operation.startswith("matmul.project"):
                panel = 512 + int(a["n_blocks"]) * 2048  # type: ignore[arg-type]
                most = max(most, layout.I8_SCRATCH_NBYTES, panel)
            if record.operation.startswith("attention.attend"):
                row = 4 * padded(int(a["head_size"]))  # type: ignore[arg-type]
                states = 8 * layout.SPLIT_TOKENS * int(a["n_group"])  # type: ignore[arg-type]
                most = max(most, 64 + 6 * (4 * layout.SPAN + 2 * row) + states)
                most = max(most, layout.PAGE * row)  # keys of a page, for `kv.rotate`
        return most

    def bind(
        self,
        pack: Pack,
        weights: WeightPlaces,
        cache: KVPlaces,
        ropes: Mapping[RopeConfig, np.ndarray],
        *,
        n_batch: int,
        n_out: int,
    ) -> BoundProgram:
        """Lay out the arena and write the table."""
        sizes = [
            slot.stride * (slot.n_rows or (n_out if slot.of_out_rows else n_batch))
            for slot in self.slots
        ]
        offsets = np.cumsum([0, *(padded(size, 64) for size in sizes)])
        arena = small_pages(int(offsets[-1]))
        base = arena.ctypes.data
        address = {slot: base + int(o) for slot, o in zip(self.slots, offsets, strict=False)}

        def value(argument: Argument) -> int | float:
            match argument:
                case Slot():
                    return address[argument]
                case Weight(name):
                    return weights.address(name)
                case Cache(layer, field):
                    place: int = getattr(cache.layer(layer), field)
                    return place
                case RopeConfig():
                    return ropes[argument].ctypes.data
                case _:
                    return argument

        n_records = len(self.records) + len(self.rotations)
        table = np.zeros((n_records, layout.RECORD_NBYTES // 8), np.int64)
        for row, record in zip(table, self.records, strict=False):
            fill_record(
                row,
                pack[record.operation],
                {name: value(a) for name, a in record.arguments.items()},
                parts=record.parts,
                tokens=record.tokens,
                count=layout.STEP_N_OUT if record.of_out_rows else layout.STEP_N_TOKENS,
                wait=record.wait,
                of_spans=record.of_spans,
            )
        logits = address[self.logits] - base
        rows = arena[logits : logits + self.logits.stride * n_out].view(np.float32)
        inputs: list[Input] = []
        for index, record in enumerate(self.records):
            slot, weight = record.input, record.arguments.get("w")
            if slot is None or not isinstance(weight, Weight):
                continue
            at = address[slot] - base
            n_rows = n_out if slot.of_out_rows else n_batch
            floats = arena[at : at + slot.stride * n_rows].view(np.float32).reshape(n_rows, -1)
            floats = floats[:, : record.n_cols]
            inputs.append(Input(index, weight.name, floats, slot.of_out_rows))
        rotations = table[len(self.records) :]
        return BoundProgram(table, arena, rows.reshape(n_out, -1), inputs, rotations)


class Input(NamedTuple):
    """Where the input of a projection lies until its record has run."""

    record: int
    weight: str
    rows: np.ndarray  # f32 (most rows of a step, width)
    of_out_rows: bool


class BoundProgram(NamedTuple):
    """A program with its addresses: the table, the arena, and the rows where logits appear."""

    table: np.ndarray
    arena: np.ndarray
    logits: np.ndarray
    inputs: list[Input]
    rotations: np.ndarray  # rows of the table behind those of the program, for `shift.py`
