"""A forward pass becomes a flat table of operation records over an arena.

`compile_program` fuses (residual sums into projections and norms, byte forms into whatever feeds an
integer format), gives every tensor a slot of the arena, and says for every record which records must
be complete before it: independent ones, like q, k and v, run without a wait between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from edgellama.kernels import layout
from edgellama.kernels.blocks import FORMATS, STRIP, padded
from edgellama.kernels.compiler import Pack
from edgellama.kernels.team import fill_record
from edgellama.models.builder import Builder, Node, Tensor
from edgellama.models.config import ModelConfig
from edgellama.models.rope import RopeConfig

from .memory import small_pages

_ALL_TOKENS = 1 << 30
_PARTS = 16
"""Pieces that a projection's rows are cut into: a thread should stream long runs of weights, because
every run begins with a wait for memory (on two threads 64 pieces decode a third slower than 16)."""


@dataclass(eq=False, slots=True)
class Slot:
    """A piece of the arena: `n_rows` rows of `stride` bytes."""

    stride: int
    of_out_rows: bool
    n_rows: int = 0  # where it does not follow from the step
    last_writer: int = -1
    readers: list[int] = field(default_factory=list)


class Weight(NamedTuple):
    """The address of a tensor of the file, filled in when the program is bound."""

    name: str


class Cache(NamedTuple):
    """The address of a layer's pages, or without a layer a size of the cache by its name."""

    layer: int = -1
    size: str = ""


Argument = int | float | Slot | Weight | Cache | RopeConfig


@dataclass(slots=True)
class Record:
    """One operation of the table before addresses are known."""

    operation: str
    arguments: dict[str, Argument]
    parts: int = 1
    tokens: int = 8
    of_out_rows: bool = False
    of_spans: bool = False  # cut into the step's spans besides
    wait: int = 0
    n_macs: int = 0  # per token
    n_position_macs: int = 0  # per token and position that it sees
    n_positions: int = 1 << 40  # that it sees at most


class KVShape(Protocol):
    """What a program needs to know of the cache."""

    kv_type: str
    head_nbytes: int
    page_nbytes: int

    def layer_address(self, layer: int) -> int: ...


class Program:
    """Records, slots and where the head begins."""

    def __init__(self, builder: Builder, logits: Tensor, kv_type: str, *, fuse: bool = True):
        self.config: ModelConfig = builder.config
        self.records: list[Record] = []
        self.slots: list[Slot] = []
        self.kv_type = kv_type
        self.head_first = 0
        self._builder = builder
        self._fuse = fuse
        self._free: list[Slot] = []
        self._forms: dict[str, dict[Tensor, Slot]] = {"f32": {}, "i8": {}, "i16": {}}
        self._floats = self._forms["f32"]
        self._uses: dict[Tensor, int] = {}
        self._partials: Slot | None = None
        self._kv = Slot(0, False)  # stands for the cache in the order of records
        for node in builder.nodes:
            for tensor in node.inputs:
                self._uses[tensor] = self._uses.get(tensor, 0) + 1
        nodes = list(builder.nodes)
        while nodes:
            self._lower(nodes)
        self.logits = self._floats[logits]

    # --- slots ------------------------------------------------------------------------------------
    def _slot(self, stride: int, of_out_rows: bool) -> Slot:
        for i, slot in enumerate(self._free):
            if slot.stride == stride and slot.of_out_rows == of_out_rows:
                return self._free.pop(i)
        slot = Slot(stride, of_out_rows)
        self.slots.append(slot)
        return slot

    def _form_slot(self, tensor: Tensor, form: str = "f32") -> Slot:
        stride = padded(tensor.width) // 32 * layout.ACTIVATION_NBYTES[form]
        slot = self._forms[form][tensor] = self._slot(stride, tensor.of_out_rows)
        return slot

    def _slot_of_partials(self) -> Slot:
        """The sums of spans that `attend` leaves to `merge`: one slot for all layers."""
        if self._partials is None:
            stride = padded(self.config.n_heads * (self.config.head_size + 2) * 4, 64)
            self._partials = Slot(stride, False, layout.SPLIT_ROWS)
            self.slots.append(self._partials)
        return self._partials

    def _used(self, *tensors: Tensor) -> None:
        """Count a use; after the last one the tensor's slots are free again."""
        for tensor in tensors:
            self._uses[tensor] -= 1
            if self._uses[tensor] == 0:
                for slots in self._forms.values():
                    slot = slots.pop(tensor, None)
                    if slot is not None and slot not in self._floats.values():
                        self._free.append(slot)

    # --- records ----------------------------------------------------------------------------------
    def _record(self, record: Record, reads: Sequence[Slot], writes: Sequence[Slot]) -> None:
        """Append a record that must wait for whoever wrote what it reads or uses what it writes."""
        index = len(self.records)
        before = [slot.last_writer for slot in (*reads, *writes)]
        before += [reader for slot in writes for reader in slot.readers]
        record.wait = max(before, default=-1) + 1
        for slot in reads:
            slot.readers.append(index)
        for slot in writes:
            slot.last_writer = index
            slot.readers = []
        self.records.append(record)

    def _format(self, weight: str) -> str:
        return self._builder.tensors[weight].type_name

    def _activation(self, node: Node) -> str:
        """The form in which a projection takes its input."""
        return FORMATS[self._format(node.weight)].activation

    def _write_forms(self, tensor: Tensor, nodes: Sequence[Node]) -> dict[str, Slot]:
        """Slots of the integer forms that projections will want of a tensor just being made."""
        wanted = {
            self._activation(node)
            for node in nodes
            if self._fuse and node.kind == "linear" and node.inputs[0] is tensor
        }
        return {form: self._form_slot(tensor, form) for form in sorted(wanted - {"f32"})}

    def _lower(self, nodes: list[Node]) -> None:
        """Turn the next node, and what is fused with it, into records."""
        node = nodes.pop(0)
        add = self._fusable_add(node, nodes)
        if add is not None:
            nodes.remove(add)
        getattr(self, f"_lower_{node.kind}")(node, nodes, add)

    def _fusable_add(self, node: Node, nodes: Sequence[Node]) -> Node | None:
        """The sum x + node that can be written in place of x: nobody else reads either."""
        following = nodes[0] if nodes else None
        if (
            self._fuse
            and node.kind in ("linear", "rms_norm")
            and following is not None
            and following.kind == "add"
            and following.inputs[1] is node.output
            and following.settings["scale"] == 1.0
            and self._uses[node.output] == 1
            and self._uses[following.inputs[0]] == 1
        ):
            return following
        return None

    def _lower_embed(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        out = self._form_slot(node.output)
        self._record(
            Record(
                f"matmul.embed[{self._format(node.weight)}]",
                {
                    "out": out, "out_stride": out.stride, "w": Weight(node.weight),
                    "n_blocks": out.stride // 128, "factor": float(node.settings["scale"]),
                },
            ),
            (), (out,),
        )  # fmt: skip

    def _lower_rms_norm(self, node: Node, nodes: Sequence[Node], add: Node | None) -> None:
        """Also `layer_norm`: over whole rows, or in place over the heads of a row."""
        (x,) = node.inputs
        source = self._floats[x]
        group = node.settings["group"]
        result = node.output if add is None else add.output
        residual = None if add is None else self._floats[add.inputs[0]]
        if residual is not None:
            out = self._floats[result] = residual
        elif group < x.width:
            out = self._floats[result] = source
            assert self._uses[x] == 1, f"{x.name} is used after it was normalised in place"
        else:
            out = self._form_slot(result)
        forms = self._write_forms(result, nodes) if group == x.width else {}
        arguments: dict[str, Argument] = {
            "out": out, "out_stride": out.stride,
            **_form_arguments(forms),
            "x": source, "x_stride": source.stride,
            "n_groups": x.width // group, "width": group,
            "weight": Weight(node.weight), "eps": self.config.norm_eps,
        }  # fmt: skip
        if node.kind == "rms_norm":
            arguments["add"] = residual or 0
        else:
            arguments["weight_stride"] = group * 4
            arguments["bias"] = Weight(node.bias) if node.bias else 0
        self._record(
            Record(f"norm.{node.kind}", arguments, of_out_rows=x.of_out_rows),
            (source,), (out, *forms.values()),
        )  # fmt: skip
        self._used(x)
        if add is not None:
            self._used(*add.inputs)

    _lower_layer_norm = _lower_rms_norm

    def _form(self, tensor: Tensor, form: str) -> Slot:
        """A tensor in some form, made by a record of its own where nothing has written it."""
        if tensor not in self._forms[form]:
            source = self._floats[tensor]
            out = self._form_slot(tensor, form)
            self._record(
                Record(
                    f"quantize.quantize[{form}]",
                    {
                        "out": out, "out_stride": out.stride, "x": source,
                        "x_stride": source.stride, "n_blocks": source.stride // 128,
                    },
                    of_out_rows=tensor.of_out_rows,
                ),
                (source,), (out,),
            )  # fmt: skip
        return self._forms[form][tensor]

    def _lower_linear(self, node: Node, nodes: Sequence[Node], add: Node | None) -> None:
        (x,) = node.inputs
        format_name = self._format(node.weight)
        source = self._form(x, self._activation(node))
        if add is None:
            out = self._form_slot(node.output)
        else:
            out = self._floats[add.output] = self._floats[add.inputs[0]]
        n_cols, n_rows = self._builder.tensors[node.weight].shape
        n_strips = padded(n_rows) // STRIP
        per_part = -(-n_strips // _PARTS)
        self._record(
            Record(
                f"matmul.project[{format_name}]",
                {
                    "out": out, "out_stride": out.stride, "x": source, "x_stride": source.stride,
                    "w": Weight(node.weight), "bias": Weight(node.bias) if node.bias else 0,
                    "n_blocks": padded(n_cols) // 32, "n_strips": n_strips,
                    "per_part": per_part, "residual": int(add is not None),
                },
                parts=-(-n_strips // per_part),
                tokens=_ALL_TOKENS,
                of_out_rows=x.of_out_rows,
                n_macs=n_rows * n_cols,
            ),
            (source,), (out,),
        )  # fmt: skip
        self._used(x)
        if add is not None:
            self._used(*add.inputs)

    def _lower_rope(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        (x,) = node.inputs
        assert self._uses[x] == 1, f"{x.name} is used after it was rotated in place"
        slot = self._floats[node.output] = self._floats[x]
        rope: RopeConfig = node.settings["rope"]
        n_heads = node.settings["n_heads"]
        self._record(
            Record(
                "rope.rope",
                {
                    "x": slot, "x_stride": slot.stride, "n_heads": n_heads,
                    "head_size": x.width // n_heads, "n_dims": rope.n_dims, "table": rope,
                    "neox": int(rope.kind == "neox"),
                },
            ),
            (slot,), (slot,),
        )  # fmt: skip
        self._used(x)

    def _lower_store_kv(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        k, v = node.inputs
        self._record(
            Record(
                f"kv.store[{self.kv_type}]",
                {
                    "k": self._floats[k], "k_stride": self._floats[k].stride,
                    "v": self._floats[v], "v_stride": self._floats[v].stride,
                    "cache": Cache(node.settings["layer"]),
                    "head_nbytes": Cache(size="head_nbytes"),
                    "page_nbytes": Cache(size="page_nbytes"),
                    "n_heads": self.config.n_kv_heads, "head_size": self.config.head_size,
                },
            ),
            (self._floats[k], self._floats[v]), (self._kv,),
        )  # fmt: skip
        self._used(k, v)

    def _lower_attend(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        q, stored = node.inputs
        out = self._form_slot(node.output)
        forms = self._write_forms(node.output, nodes)
        c = self.config
        partials = self._slot_of_partials()
        self._record(
            Record(
                f"attention.attend[{self.kv_type}]",
                {
                    "out": out, "out_stride": out.stride,
                    "q": self._floats[q], "q_stride": self._floats[q].stride,
                    "cache": Cache(node.settings["layer"]),
                    "cache_stride": Cache(size="head_nbytes"),
                    "page_nbytes": Cache(size="page_nbytes"),
                    "partials": partials, "partials_stride": partials.stride,
                    "n_kv_heads": c.n_kv_heads, "n_group": c.n_heads // c.n_kv_heads,
                    "head_size": c.head_size, "window": node.settings["window"],
                    "scale": float(node.settings["scale"]), "cap": float(node.settings["soft_cap"]),
                },
                parts=c.n_kv_heads,
                tokens=layout.SPLIT_TOKENS,
                of_spans=True,
                n_position_macs=2 * c.n_heads * c.head_size,
                n_positions=node.settings["window"] or 1 << 40,
            ),
            (self._floats[q], self._kv), (out, partials),
        )  # fmt: skip
        self._record(
            Record(
                "attention.merge",
                {
                    "out": out, "out_stride": out.stride,
                    **_form_arguments(forms),
                    "partials": partials, "partials_stride": partials.stride,
                    "n_heads": c.n_heads, "head_size": c.head_size,
                    "window": node.settings["window"],
                },
            ),
            (out, partials), (out, *forms.values()),
        )  # fmt: skip
        self._used(q, stored)

    def _lower_gated(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        gate, up = (self._floats[tensor] for tensor in node.inputs)
        out = self._form_slot(node.output)
        forms = self._write_forms(node.output, nodes)
        self._record(
            Record(
                f"activation.gated[{node.settings['function']}]",
                {
                    "out": out, "out_stride": out.stride,
                    **_form_arguments(forms),
                    "gate": gate, "up": up, "stride": gate.stride,
                },
            ),
            (gate, up), (out, *forms.values()),
        )  # fmt: skip
        self._used(*node.inputs)

    def _lower_add(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        x, y = (self._floats[tensor] for tensor in node.inputs)
        out = self._form_slot(node.output)
        arguments: dict[str, Argument] = {
            "out": out, "x": x, "y": y, "stride": out.stride,
            "factor": float(node.settings["scale"]),
        }  # fmt: skip
        self._record(
            Record("activation.add", arguments, of_out_rows=node.output.of_out_rows),
            (x, y), (out,),
        )  # fmt: skip
        self._used(*node.inputs)

    def _lower_take(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        source = self._floats[node.inputs[0]]
        self.head_first = len(self.records)
        # The head runs again for every block of wanted rows: it must leave the body's slots alone.
        self._free = [slot for slot in self._free if slot.of_out_rows]
        out = self._form_slot(node.output)
        self._record(
            Record(
                "activation.take",
                {"out": out, "x": source, "stride": out.stride},
                of_out_rows=True,
            ),
            (source,), (out,),
        )  # fmt: skip

    def _lower_soft_cap(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        """Also `scale`: a function of one number, in place."""
        (x,) = node.inputs
        assert self._uses[x] == 1, f"{x.name} is used after it was changed in place"
        slot = self._floats[node.output] = self._floats[x]
        arguments: dict[str, Argument] = {"x": slot, "stride": slot.stride}
        arguments |= {name: float(value) for name, value in node.settings.items()}
        self._record(
            Record(f"activation.{node.kind}", arguments, of_out_rows=x.of_out_rows),
            (slot,), (slot,),
        )  # fmt: skip
        self._used(x)

    _lower_scale = _lower_soft_cap

    # --- what the runtime asks --------------------------------------------------------------------
    @property
    def operations(self) -> list[str]:
        """Names of the operations to build and load, those that pack its weights among them."""
        names = [record.operation for record in self.records]
        matrices = [name for name in self.weights if len(self._builder.tensors[name].shape) == 2]
        names += [f"repack.repack[{self._format(name)}]" for name in matrices]
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
                most = max(most, 512 + int(a["n_blocks"]) * 2048)  # type: ignore[arg-type]
            if record.operation.startswith("attention.attend"):
                row = 4 * padded(int(a["head_size"]))  # type: ignore[arg-type]
                states = 8 * layout.SPLIT_TOKENS * int(a["n_group"])  # type: ignore[arg-type]
                most = max(most, 64 + 6 * (4 * layout.SPAN + 2 * row) + states)
        return most

    def bind(
        self,
        pack: Pack,
        weights: object,
        cache: KVShape,
        ropes: dict[RopeConfig, np.ndarray],
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
                    return weights.address(name)  # type: ignore[attr-defined]
                case Cache(-1, size):
                    nbytes: int = getattr(cache, size)
                    return nbytes
                case Cache(layer):
                    return cache.layer_address(layer)
                case RopeConfig():
                    return ropes[argument].ctypes.data
                case _:
                    return argument

        table = np.zeros((len(self.records), layout.RECORD_NBYTES // 8), np.int64)
        for row, record in zip(table, self.records, strict=True):
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
        return BoundProgram(self, table, arena, rows.reshape(n_out, -1))


def _form_arguments(forms: dict[str, Slot]) -> dict[str, Argument]:
    arguments: dict[str, Argument] = {}
    for form in ("i8", "i16"):
        slot = forms.get(form)
        arguments[form] = slot or 0
        arguments[f"{form}_stride"] = slot.stride if slot else 0
    return arguments


@dataclass(slots=True)
class BoundProgram:
    """A program with its addresses: the table, the arena, and the rows where logits appear."""

    program: Program
    table: np.ndarray
    arena: np.ndarray
    logits: np.ndarray
