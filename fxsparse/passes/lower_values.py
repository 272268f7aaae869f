"""The values of a graph that is being lowered: in which order their axes lie, and how they are brought into another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsparse.graph import edit
from fxsparse.passes.lower_layouts import UNIT, AxisOrder, Size, natural, through_view

ATEN = torch.ops.aten
NAME = "lower_shared_support"


@dataclass(frozen=True, eq=False)
class Channels:
    """Channels that lie elsewhere than the model has them.

    Attributes:
        axis: The model's axis.
        index: int64, for each channel of the model where it is.
        count: How many channels there are in memory; those that no entry of `index` names are padding.
    """

    axis: int
    index: Tensor
    count: int


@dataclass(eq=False)
class Value:
    """What stands for one tensor of the model.

    Attributes:
        node: The node that makes it.
        order: The order of its axes.
        sizes: The sizes that the model's tensor has.
        channels: Where its channels are; None for the model's own places.
        constant: Its values, where they are known.
        forms: The same in other orders, made so far.
    """

    node: fx.Node
    order: AxisOrder
    sizes: tuple[Size, ...]
    channels: Channels | None = None
    constant: Tensor | None = None
    forms: dict[AxisOrder, fx.Node] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Axes of the model's tensor."""
        return len(self.sizes)

    @property
    def moved(self) -> bool:
        """Whether it is anything else than the model's own tensor."""
        return self.order != natural(self.rank) or self.channels is not None

    @property
    def hint(self) -> int:
        """Elements on the example inputs."""
        total = 1
        for size in self.sizes:
            total *= size.hint
        return total


class Scribe:
    """Writes nodes into the graph of a module, each before a given one, and tensors into the module."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self.at: fx.Node | None = None
        self.source = ""
        self._names: set[str] = set()

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator."""
        assert self.at is not None
        return edit.insert_call(
            self.graph, target, args, kwargs, pass_name=NAME, what="lowered", source=self.source, before=self.at
        )

    def tensor(self, name: str, value: Tensor, *, trainable: bool | None = None) -> fx.Node:
        """A read of a new tensor: a parameter where `trainable` says whether it is trained, else a buffer."""
        name = self._free(name)
        path, _, attribute = name.rpartition(".")
        owner = self.module.get_submodule(path)
        if trainable is None:
            owner.register_buffer(attribute, value)
        else:
            owner.register_parameter(attribute, nn.Parameter(value, requires_grad=trainable))
        return self.read(name)

    def read(self, name: str) -> fx.Node:
        """A read of a tensor that is there."""
        assert self.at is not None
        return edit.insert_get_attr(
            self.module, name, pass_name=NAME, what="lowered", source=self.source, before=self.at
        )

    def _free(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self._names or edit.resolve(self.module, candidate) is not None:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate


class Values:
    """The values of all nodes; a node that nothing is known of makes the model's own tensor.

    Args:
        scribe: Where conversions are written.
    """

    def __init__(self, scribe: Scribe) -> None:
        self.scribe = scribe
        self._values: dict[fx.Node, Value] = {}
        self._selected: dict[Value, Value] = {}

    def __setitem__(self, node: fx.Node, value: Value) -> None:
        self._values[node] = value

    def __getitem__(self, node: fx.Node) -> Value:
        if node not in self._values:
            sizes = sizes_of(node)
            assert sizes is not None, node
            self._values[node] = Value(node, natural(len(sizes)), sizes)
        return self._values[node]

    def known(self, node: fx.Node) -> Value | None:
        """The value, where something is known of it."""
        return self._values.get(node)

    def in_order(self, value: Value, order: AxisOrder) -> fx.Node:
        """The value with its axes in an order and its channels in the model's places."""
        value = self.settled(value)
        if order == value.order:
            return value.node
        if order not in value.forms:
            value.forms[order] = self._converted(value, order)
        return value.forms[order]

    def natural(self, value: Value) -> fx.Node:
        """The model's own tensor."""
        return self.in_order(value, natural(value.rank))

    def settled(self, value: Value) -> Value:
        """The same with its channels in the model's places."""
        if value.channels is None:
            return value
        if value not in self._selected:
            node = self._select(value.node, value.order.index(value.channels.axis), value.channels)
            self._selected[value] = Value(node, value.order, value.sizes)
        return self._selected[value]

    def _select(self, node: fx.Node, axis: int, channels: Channels) -> fx.Node:
        if torch.equal(channels.index, torch.arange(len(channels.index), device=channels.index.device)):
            return self.scribe.call(ATEN.slice.Tensor, node, axis, 0, len(channels.index))
        index = self.scribe.tensor(f"{self.scribe.source or 'lowered'}_rows", channels.index)
        return self.scribe.call(ATEN.index_select.default, node, axis, index)

    def _converted(self, value: Value, order: AxisOrder) -> fx.Node:
        old = [label for label in value.order if label != UNIT]
        dims = [old.index(label) for label in order if label != UNIT]
        if value.constant is not None:
            tensor = value.constant.squeeze(tuple(units(value.order))).permute(dims)
            for axis in units(order):
                tensor = tensor.unsqueeze(axis)
            trainable = value.constant.requires_grad if value.constant.is_floating_point() else None
            name = str(value.node.target) if value.node.op == "get_attr" else "lowered"
            return self.scribe.tensor(f"{name}_moved", tensor.detach().contiguous(), trainable=trainable)
        node = value.node
        if units(value.order):
            node = self.scribe.call(ATEN.squeeze.dims, node, units(value.order))
        if dims != sorted(dims):
            node = self.scribe.call(ATEN.permute.default, node, dims)
        for axis in units(order):
            node = self.scribe.call(ATEN.unsqueeze.default, node, axis)
        return node

    def view(self, value: Value, order: AxisOrder, sizes: Sequence[Size]) -> Value | None:
        """A reshaped value; None where its symbolic sizes cannot be told from those of the node."""
        written: list[Any] = []
        open_axis = False
        for label in order:
            size = Size(1, 1) if label == UNIT else sizes[label]
            if size.static:
                written.append(size.expression)
                continue
            same = [i for i, old in enumerate(value.order) if old != UNIT and value.sizes[old] == size]
            if not open_axis:
                written.append(-1)
                open_axis = True
            elif same:
                written.append(self.scribe.call(ATEN.sym_size.int, value.node, same[0]))
            else:
                return None
        node = self.scribe.call(ATEN.reshape.default, value.node, written)
        return Value(node, order, tuple(sizes))

    def reshaped(self, value: Value, sizes: Sequence[Size], wish: AxisOrder | None) -> Value | None:
        """The value after the model reshapes it, moved in memory only where that is asked for or unavoidable."""
        value = self.settled(value)
        order = through_view(value.order, value.sizes, sizes)
        if order is None and wish is not None:
            before = through_view(wish, sizes, value.sizes)
            if before is not None:
                value = Value(self.in_order(value, before), before, value.sizes)
                order = through_view(before, value.sizes, sizes)
        return None if order is None else self.view(value, order, sizes)


def units(order: AxisOrder) -> list[int]:
    """The axes of size 1 that the model's tensor does not have."""
    return [axis for axis, label in enumerate(order) if label == UNIT]


def sizes_of(node: fx.Node) -> tuple[Size, ...] | None:
    """The sizes of the tensor that a node of the exported graph makes; None where it makes none."""
    found = node.meta.get("val")
    return tuple(Size.of(size) for size in found.shape) if isinstance(found, Tensor) else None
