"""From a forward pass to a program: every node becomes a record, or is fused with the one before it.

Fused are residual sums (into the projection or norm that made a term), byte forms (into whatever feeds
an integer format), and everything that can be written in place.  A record waits only for those whose
tensors it reads or overwrites: independent ones, like q, k and v, run without a wait between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgellama.gguf import TensorInfo
from edgellama.kernels import layout
from edgellama.kernels.blocks import FORMATS, STRIP, padded
from edgellama.models import FAMILIES
from edgellama.models.builder import Builder, Node, Tensor
from edgellama.models.config import ModelConfig
from edgellama.models.rope import RopeConfig

from .arena import Arena, Slot
from .program import Argument, Cache, Program, Record, Weight

_ALL_TOKENS = 1 << 30
_PARTS = 16
"""Pieces that a projection's rows are cut into at least: a thread should stream long runs of weights, because
every run begins with a wait for memory (on two threads 64 pieces decode a third slower than 16)."""


def compile_program(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    kv_type: str,
    *,
    n_threads: int = 1,
    fuse: bool = True,
) -> Program:
    """Write a model's forward pass and turn it into a program for up to `n_threads` threads."""
    builder = Builder(config, tensors)
    logits = FAMILIES[config.arch](builder)
    n_parts = -(-_PARTS // n_threads) * n_threads  # so that threads end together
    return _Lowering(builder, kv_type, n_parts, fuse).program(logits)


class _Lowering:
    """Makes records of nodes; `_lower_<kind>` is what becomes of a node of that kind."""

    def __init__(self, builder: Builder, kv_type: str, n_parts: int, fuse: bool) -> None:
        self._builder = builder
        self._config = builder.config
        self._kv_type = kv_type
        self._n_parts = n_parts
        self._fuse = fuse
        self._arena = Arena(builder.nodes)
        self._partials: Slot | None = None
        self._kv = Slot(0, False)  # stands for the cache in the order of records
        self._records: list[Record] = []
        self._head_first = 0

    def program(self, logits: Tensor) -> Program:
        nodes = list(self._builder.nodes)
        while nodes:
            self._lower(nodes)
        made_by = {node.output: node for node in self._builder.nodes}
        stores = [node for node in self._builder.nodes if node.kind == "store_kv"]
        keys = {node.settings["layer"]: made_by[node.inputs[0]] for node in stores}
        return Program(
            records=self._records,
            rotations={i: k.settings["rope"] for i, k in keys.items() if k.kind == "rope"},
            head_first=self._head_first,
            slots=self._arena.slots,
            logits=self._arena.floats[logits],
            formats={
                name: info.type_name
                for name, info in self._builder.tensors.items()
                if len(info.shape) == 2
            },
        )

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
            and self._arena.is_used_once(node.output)
            and self._arena.is_used_once(following.inputs[0])
        ):
            return following
        return None

    def _record(self, record: Record, reads: Sequence[Slot], writes: Sequence[Slot]) -> None:
        """Append a record that must wait for whoever wrote what it reads or uses what it writes."""
        index = len(self._records)
        before = [slot.last_writer for slot in (*reads, *writes)]
        before += [reader for slot in writes for reader in slot.readers]
        for slot in reads:
            slot.readers.append(index)
        for slot in writes:
            slot.last_writer = index
            slot.readers = []
        self._records.append(record._replace(wait=max(before, default=-1) + 1))

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
        return {form: self._arena.make(tensor, form) for form in sorted(wanted - {"f32"})}

    def _form(self, tensor: Tensor, form: str) -> Slot:
        """A tensor in some form, made by a record of its own where nothing has written it."""
        found = self._arena.find(tensor, form)
        if found is None:
            source = self._arena.floats[tensor]
            out = found = self._arena.make(tensor, form)
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
        return found

    def _partials_slot(self) -> Slot:
        """The sums of spans that `attend` leaves to `merge`: one slot for all layers."""
        if self._partials is None:
            c = self._config
            stride = padded(c.n_heads * (c.head_size + 2) * 4, 64)
            self._partials = self._arena.add(Slot(stride, False, layout.SPLIT_ROWS))
        return self._partials

    # --- nodes, in the order of a layer ---------------------------------------------------------
    def _lower_embed(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        out = self._arena.make(node.output)
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
        source = self._arena.floats[x]
        group = node.settings["group"]
        result = node.output if add is None else add.output
        residual = None if add is None else self._arena.floats[add.inputs[0]]
        if residual is not None:
            out = self._arena.floats[result] = residual
        elif group < x.width:
            out = self._arena.floats[result] = source
            assert self._arena.is_used_once(x), f"{x.name} is used after it was normalised in place"
        else:
            out = self._arena.make(result)
        forms = self._write_forms(result, nodes) if group == x.width else {}
        arguments: dict[str, Argument] = {
            "out": out, "out_stride": out.stride,
            **_form_arguments(forms),
            "x": source, "x_stride": source.stride,
            "n_groups": x.width // group, "width": group,
            "weight": Weight(node.weight), "eps": self._config.norm_eps,
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
        self._arena.used(x)
        if add is not None:
            self._arena.used(*add.inputs)

    _lower_layer_norm = _lower_rms_norm

    def _lower_linear(self, node: Node, nodes: Sequence[Node], add: Node | None) -> None:
        (x,) = node.inputs
        format_name = self._format(node.weight)
        source = self._form(x, self._activation(node))
        if add is None:
            out = self._arena.make(node.output)
        else:
            out = self._arena.floats[add.output] = self._arena.floats[add.inputs[0]]
        n_cols, n_rows = self._builder.tensors[node.weight].shape
        n_strips = padded(n_rows) // STRIP
        per_part = -(-n_strips // self._n_parts)
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
                input=self._arena.floats[x],
                n_cols=n_cols,
                n_macs=n_rows * n_cols,
            ),
            (source,), (out,),
        )  # fmt: skip
        self._arena.used(x)
        if add is not None:
            self._arena.used(*add.inputs)

    def _lower_rope(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        (x,) = node.inputs
        assert self._arena.is_used_once(x), f"{x.name} is used after it was rotated in place"
        slot = self._arena.floats[node.output] = self._arena.floats[x]
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
        self._arena.used(x)

    def _lower_store_kv(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        k, v = node.inputs
        self._record(
            Record(
                f"kv.store[{self._kv_type}]",
                {
                    "k": self._arena.floats[k], "k_stride": self._arena.floats[k].stride,
                    "v": self._arena.floats[v], "v_stride": self._arena.floats[v].stride,
                    **_cache_arguments(node.settings["layer"]),
                    "n_heads": self._config.n_kv_heads, "head_size": self._config.head_size,
                },
            ),
            (self._arena.floats[k], self._arena.floats[v]), (self._kv,),
        )  # fmt: skip
        self._arena.used(k, v)

    def _lower_attend(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        q, stored = node.inputs
        out = self._arena.make(node.output)
        forms = self._write_forms(node.output, nodes)
        c = self._config
        partials = self._partials_slot()
        self._record(
            Record(
                f"attention.attend[{self._kv_type}]",
                {
                    "out": out, "out_stride": out.stride,
                    "q": self._arena.floats[q], "q_stride": self._arena.floats[q].stride,
                    **_cache_arguments(node.settings["layer"]),
                    "partials": partials, "partials_stride": partials.stride,
                    "n_kv_heads": c.n_kv_heads, "n_group": c.n_heads // c.n_kv_heads,
                    "head_size": c.head_size, "window": node.settings["window"],
                    "scale": float(node.settings["scale"]), "cap": float(node.settings["soft_cap"]),
                },
                parts=c.n_kv_heads,
                tokens=layout.SPLIT_TOKENS,
                of_spans=True,
            ),
            (self._arena.floats[q], self._kv), (out, partials),
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
        self._arena.used(q, stored)

    def _lower_gated(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        gate, up = (self._arena.floats[tensor] for tensor in node.inputs)
        out = self._arena.make(node.output)
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
        self._arena.used(*node.inputs)

    def _lower_add(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        x, y = (self._arena.floats[tensor] for tensor in node.inputs)
        out = self._arena.make(node.output)
        arguments: dict[str, Argument] = {
            "out": out, "x": x, "y": y, "stride": out.stride,
            "factor": float(node.settings["scale"]),
        }  # fmt: skip
        self._record(
            Record("activation.add", arguments, of_out_rows=node.output.of_out_rows),
            (x, y), (out,),
        )  # fmt: skip
        self._arena.used(*node.inputs)

    def _lower_take(self, node: Node, nodes: Sequence[Node], add: None) -> None:
        source = self._arena.floats[node.inputs[0]]
        self._head_first = len(self._records)
        self._arena.begin_head()
        out = self._arena.make(node.output)
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
        assert self._arena.is_used_once(x), f"{x.name} is used after it was changed in place"
        slot = self._arena.floats[node.output] = self._arena.floats[x]
        arguments: dict[str, Argument] = {"x": slot, "stride": slot.stride}
        arguments |= {name: float(value) for name, value in node.settings.items()}
        self._record(
            Record(f"activation.{node.kind}", arguments, of_out_rows=x.of_out_rows),
            (slot,), (slot,),
        )  # fmt: skip
        self._arena.used(x)

    _lower_scale = _lower_soft_cap


def _cache_arguments(layer: int) -> dict[str, Argument]:
    return {
        "cache": Cache(layer, "pages"), "cache_stride": Cache(layer, "stride"),
        "page_nbytes": Cache(layer, "page_nbytes"), "table_offset": Cache(layer, "table_offset"),
    }  # fmt: skip


def _form_arguments(forms: dict[str, Slot]) -> dict[str, Argument]:
    arguments: dict[str, Argument] = {}
    for form in ("i8", "i16"):
        slot = forms.get(form)
        arguments[form] = slot or 0
        arguments[f"{form}_stride"] = slot.stride if slot else 0
    return arguments
