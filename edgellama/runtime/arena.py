"""Where the tensors of a program lie: slots of one arena, used again when nobody needs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from edgellama.kernels import layout
from edgellama.kernels.blocks import padded
from edgellama.models.builder import Node, Tensor


class Slot:
    """A piece of the arena: `n_rows` rows of `stride` bytes (0: as many as follow from the step)."""

    __slots__ = ("last_writer", "n_rows", "of_out_rows", "readers", "stride")

    def __init__(self, stride: int, of_out_rows: bool, n_rows: int = 0) -> None:
        self.stride, self.of_out_rows, self.n_rows = stride, of_out_rows, n_rows
        self.last_writer = -1
        self.readers: list[int] = []


class Arena:
    """Slots, and which of them holds which tensor in which form of activations."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.slots: list[Slot] = []
        self.floats: dict[Tensor, Slot] = {}
        self._forms: dict[str, dict[Tensor, Slot]] = {"f32": self.floats, "i8": {}, "i16": {}}
        self._free: list[Slot] = []
        self._n_uses = Counter(tensor for node in nodes for tensor in node.inputs)

    def find(self, tensor: Tensor, form: str) -> Slot | None:
        """Return where a tensor lies in some form, if it has been written in it."""
        return self._forms[form].get(tensor)

    def make(self, tensor: Tensor, form: str = "f32") -> Slot:
        """Return a slot for some form of a tensor."""
        stride = padded(tensor.width) // 32 * layout.ACTIVATION_NBYTES[form]
        slot = self._forms[form][tensor] = self._take(stride, tensor.of_out_rows)
        return slot

    def add(self, slot: Slot) -> Slot:
        """Take in a slot that holds no tensor and is never free."""
        self.slots.append(slot)
        return slot

    def _take(self, stride: int, of_out_rows: bool) -> Slot:
        for i, slot in enumerate(self._free):
            if slot.stride == stride and slot.of_out_rows == of_out_rows:
                return self._free.pop(i)
        return self.add(Slot(stride, of_out_rows))

    def is_used_once(self, tensor: Tensor) -> bool:
        """Say whether whoever reads the tensor next may write in its place."""
        return self._n_uses[tensor] == 1

    def used(self, *tensors: Tensor) -> None:
        """Count a use; after the last one the tensor's slots are free again."""
        for tensor in tensors:
            self._n_uses[tensor] -= 1
            if self._n_uses[tensor] == 0:
                for slots in self._forms.values():
                    slot = slots.pop(tensor, None)
                    if slot is not None and slot not in self.floats.values():
                        self._free.append(slot)

    def begin_head(self) -> None:
        """Leave the slots of all tokens alone: the head runs again for every block of wanted rows."""
        self._free = [slot for slot in self._free if slot.of_out_rows]
