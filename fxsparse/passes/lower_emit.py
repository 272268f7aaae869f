"""The nodes that take the place of a layer: gathers and small dense products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxsparse.passes.lower_forms import Form
from fxsparse.passes.lower_layouts import AxisOrder, fits_convolution, linear_order, natural, product_order
from fxsparse.passes.lower_sites import Site
from fxsparse.passes.lower_support import Batch, Support
from fxsparse.passes.lower_values import ATEN, Channels, Value, Values, sizes_of

_WIDER = 2.0  # outputs over inputs from which on a bias is better computed than added
_CONVOLUTION = {3: ATEN.conv1d.default, 4: ATEN.conv2d.default, 5: ATEN.conv3d.default}


@dataclass(frozen=True, eq=False)
class Lowered:
    """What a site becomes.

    Attributes:
        site: The site.
        form: Its form, not DENSE.
        support: The groups of its weight.
        trainable: Whether its weight is trained.
        tensors: The names of the tensors that it reads, made at its first use: shared by all uses of the weight.
    """

    site: Site
    form: Form
    support: Support
    trainable: bool
    tensors: dict[str, str]


class Emitter:
    """Writes lowered layers.

    Args:
        values: The values of the graph.
        inside: Whether a bias may become a column of the weight that meets a channel of ones.
    """

    def __init__(self, values: Values, inside: bool = True) -> None:
        self.values = values
        self.scribe = values.scribe
        self.inside = inside
        self._widened: dict[fx.Node, fx.Node] = {}

    def emit(self, lowered: Lowered, wish: AxisOrder | None = None) -> Value | None:
        """Write one layer before the present place; None where its input has a form that it cannot take."""
        value = self.values[lowered.site.input]
        if lowered.site.kind == "conv":
            return self._conv(lowered, value)
        return (
            self._gather_matmul(lowered, value)
            if lowered.form is Form.GATHER_MATMUL
            else self._gather_conv(lowered, value)
        )

    def _conv(self, lowered: Lowered, value: Value) -> Value | None:
        if value.order != natural(value.rank):
            value = Value(self.values.natural(value), natural(value.rank), value.sizes)
        site = lowered.site
        given = [site.options["stride"], site.options["padding"], site.options["dilation"]]

        def one(node: fx.Node, weight: fx.Node, bias: fx.Node | None, batch: Batch) -> fx.Node:
            if site.node.target is ATEN.convolution.default:
                return self.scribe.call(
                    site.node.target, node, weight, bias, *given, False, [0] * len(given[0]), batch.groups
                )
            return self.scribe.call(site.node.target, node, weight, bias, *given, batch.groups)

        return self._batches(lowered, value, 1, one, ())

    def _gather_conv(self, lowered: Lowered, value: Value) -> Value | None:
        rank = value.rank
        order = next((o for o in (value.order, *value.forms) if fits_convolution(o, rank)), None)
        order = linear_order(value.sizes) if order is None else order
        if order is None:
            return None
        value = self._placed(value, order, rank - 1)

        def one(node: fx.Node, weight: fx.Node, bias: fx.Node | None, batch: Batch) -> fx.Node:
            spatial = len(order) - 2
            call = _CONVOLUTION[len(order)]
            return self.scribe.call(call, node, weight, bias, [1] * spatial, [0] * spatial, [1] * spatial, batch.groups)

        return self._batches(lowered, value, 1, one, (1,) * (len(order) - 2))

    def _placed(self, value: Value, order: AxisOrder, channel: int) -> Value:
        """The value in an order; channels of the axis `channel` may lie anywhere."""
        if value.order == order and (value.channels is None or value.channels.axis == channel):
            return value
        return Value(self.values.in_order(value, order), order, value.sizes)

    def _batches(self, lowered: Lowered, value: Value, axis: int, one: Any, kernel: tuple[int, ...]) -> Value:
        """Gather, compute and join all batches; `kernel` are the axes that a linear weight is widened by."""
        parts = []
        inside = self.inside and _bias_pays_inside(lowered, value)
        for i, batch in enumerate(lowered.support.batches):
            node = self._gather(lowered, value, axis, i, batch, inside)
            rows = batch.groups * batch.group
            offsets = kernel or tuple(lowered.site.weight.shape[2:])
            made = partial(_blocks, lowered, batch, (rows, batch.k, *offsets))
            weight, bias = self._tensor(lowered, f"blocks{i}@{len(kernel)}", made), None
            if lowered.site.bias is not None:
                shape = (rows, 1, *offsets) if inside else (rows,)
                made = partial(_bias, lowered, batch, shape)
                bias = self._tensor(lowered, f"bias{i}@{id(lowered.site.bias)} {len(shape)}", made)
            if inside:
                weight, bias = self.scribe.call(ATEN.cat.default, [weight, bias], 1), None
            parts.append(one(node, weight, bias, batch))
        return self._joined(lowered, parts, axis, value.order)

    def _joined(self, lowered: Lowered, parts: list[fx.Node], axis: int, order: AxisOrder) -> Value:
        node = parts[0] if len(parts) == 1 else self.scribe.call(ATEN.cat.default, parts, axis)
        sizes = sizes_of(lowered.site.node)
        assert sizes is not None
        index, label, device = lowered.support.index, order[axis], lowered.site.weight.device
        channels = None if index is None else Channels(label, index.to(device), len(lowered.support.computed))
        return Value(node, order, sizes, channels)

    def _gather(
        self, lowered: Lowered, value: Value, axis: int, number: int, batch: Batch, inside: bool = False
    ) -> fx.Node:
        """The positions of all groups, one after the other; with ones behind those of each where a bias is `inside`."""
        wanted, node = batch.positions.to(lowered.site.weight.device), value.node
        size = lowered.support.positions
        moved = value.channels is not None and value.channels.axis == value.order[axis]
        if value.channels is not None and moved:
            wanted, size = value.channels.index[wanted], value.channels.count
        if inside:
            node = self._with_ones(value)
            wanted = torch.cat([wanted, wanted.new_full((batch.groups, 1), size)], 1)
            size += 1
        wanted = wanted.flatten()
        if torch.equal(wanted, torch.arange(size, device=wanted.device)):
            return node
        key = f"positions{number}" + (f"@{value.node.name}" if moved else "@" if inside else "")
        index = self._tensor(lowered, key, lambda: wanted, index=True)
        return self.scribe.call(ATEN.index_select.default, node, axis, index)

    def _with_ones(self, value: Value) -> fx.Node:
        """The value with a channel of ones, its last."""
        if value.node not in self._widened:
            spatial = len(value.order) - 2
            made = self.scribe.call(ATEN.constant_pad_nd.default, value.node, [0, 0] * spatial + [0, 1], 1.0)
            self._widened[value.node] = made
        return self._widened[value.node]

    def _tensor(self, lowered: Lowered, key: str, make: Any, *, index: bool = False) -> fx.Node:
        if key in lowered.tensors:
            return self.scribe.read(lowered.tensors[key])
        kind = key.partition("@")[0]
        name = f"{lowered.site.name}_{kind[:-1] if len(lowered.support.batches) == 1 else kind}"
        node = self.scribe.tensor(name, make(), trainable=None if index else lowered.trainable)
        lowered.tensors[key] = str(node.target)
        return node

    def _gather_matmul(self, lowered: Lowered, value: Value) -> Value | None:
        rank = value.rank
        order = product_order(rank)
        if order is None:
            return None
        value = self._placed(value, order, rank - 1)
        axis = rank - 2
        parts = []
        for i, batch in enumerate(lowered.support.batches):
            node = self._gather(lowered, value, axis, i, batch)
            node = self._split(value, node, [batch.groups, batch.k])
            shape = (batch.groups, batch.group, batch.k)
            weight = self._tensor(lowered, f"blocks{i}", partial(_blocks, lowered, batch, shape))
            node = self.scribe.call(ATEN.matmul.default, weight, node)
            node = self._split(value, node, [batch.groups * batch.group])
            if lowered.site.bias is not None:
                made = partial(_bias, lowered, batch, (batch.groups * batch.group, 1))
                added = self._tensor(lowered, f"bias{i}@{id(lowered.site.bias)}", made)
                node = self.scribe.call(ATEN.add.Tensor, node, added)
            parts.append(node)
        return self._joined(lowered, parts, axis, order)

    def _split(self, value: Value, node: fx.Node, middle: list[int]) -> fx.Node:
        """Reshape [leading axes, anything, last axis] to [leading axes, *middle, last axis]."""
        labels = [*value.order[: value.rank - 2], None, value.order[-1]]
        written: list[Any] = []
        for axis, label in enumerate(labels):
            if label is None:
                written += middle
            elif value.sizes[label].static:
                written.append(value.sizes[label].expression)
            elif -1 not in written:
                written.append(-1)
            else:
                written.append(self.scribe.call(ATEN.sym_size.int, value.node, axis))
        return self.scribe.call(ATEN.reshape.default, node, written)


def _bias_pays_inside(lowered: Lowered, value: Value) -> bool:
    """Whether a convolution is faster with its bias as a column of the weight, by a rule from measurements.

    A runtime adds a bias in a pass over the output; a channel of ones costs a copy of the input. With an offset beside
    the first or with padding the ones would not be met everywhere, or cost a product for each offset.
    """
    site, read = lowered.site, lowered.support.positions
    if value.channels is not None:
        read = value.channels.count
    if site.bias is None or len(site.bias) < _WIDER * read:
        return False
    padding = site.options.get("padding", 0)
    padded = padding not in (0, "valid") if isinstance(padding, int | str) else any(padding)
    return site.kind == "conv" and math.prod(site.weight.shape[2:]) == 1 and not padded


def _blocks(lowered: Lowered, batch: Batch, shape: tuple[int, ...]) -> Tensor:
    return batch.blocks(lowered.site.wide()).reshape(shape).contiguous()


def _bias(lowered: Lowered, batch: Batch, shape: tuple[int, ...]) -> Tensor:
    assert lowered.site.bias is not None
    return batch.bias(lowered.site.bias.detach()).reshape(shape)
