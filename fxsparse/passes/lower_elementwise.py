"""Operators that map elements by themselves, written for values whose axes lie in another order than the model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import torch
from torch import fx

from fxsparse.passes.lower_layouts import UNIT, AxisOrder, Size, natural
from fxsparse.passes.lower_sites import Constants, arguments
from fxsparse.passes.lower_values import ATEN, Channels, Scribe, Value, Values, sizes_of

UNARY = frozenset(
    "relu gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu selu celu mish softplus relu6 neg exp "
    "log log1p expm1 sqrt rsqrt abs erf sin cos square reciprocal sign clamp clamp_min clamp_max logit softsign "
    "hardshrink softshrink threshold log_sigmoid round floor ceil".split()
)
SAME = frozenset({"clone", "contiguous", "alias", "detach", "detach_", "lift_fresh_copy"})
BINARY = frozenset("add sub rsub mul div pow maximum minimum".split())


class Lowering(Protocol):
    """What a rule may use."""

    values: Values
    scribe: Scribe
    constants: Constants
    wishes: Mapping[fx.Node, AxisOrder]
    parts: dict[fx.Node, Callable[[int], Value]]


Rule: TypeAlias = Callable[[Lowering, fx.Node], "Value | None"]
"""Writes a node for moved values; None where it can only be written for the model's own tensors."""


def name_of(node: fx.Node) -> str:
    """The operator's name without its overload: "add" for aten.add.Tensor."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return ""
    return node.target._schema.name.partition("::")[2]


def is_unary(node: fx.Node) -> bool:
    """Whether the node maps each element of its only tensor by itself."""
    name = name_of(node)
    if name in ("dropout", "feature_dropout", "alpha_dropout"):
        return arguments(node)["train"] is False
    one = len(node.all_input_nodes) == 1 and node.args[:1] == (node.all_input_nodes[0],)
    scalar = name in BINARY or name in ("to", "_to_copy")
    return one and (name in UNARY or name in SAME or scalar) and "out" not in node.kwargs


def is_binary(node: fx.Node) -> bool:
    """Whether the node maps each pair of elements of two tensors by itself, with broadcasting."""
    two = len(node.args) >= 2 and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], fx.Node)
    return name_of(node) in BINARY and two and len(node.all_input_nodes) <= 2 and not _symbolic(node)


def _symbolic(node: fx.Node) -> bool:
    return any(sizes_of(found) is None for found in node.all_input_nodes)


def unary(lowering: Lowering, node: fx.Node) -> Value | None:
    """Element by element: wherever the axes lie."""
    value = lowering.values[node.all_input_nodes[0]]
    if name_of(node) in SAME or name_of(node).endswith("dropout"):
        return value
    made = lowering.scribe.call(node.target, value.node, *node.args[1:], **node.kwargs)
    return Value(made, value.order, value.sizes, value.channels)


def binary(lowering: Lowering, node: fx.Node) -> Value | None:
    """Two tensors: both in the order that costs least to bring them into."""
    sizes = sizes_of(node)
    assert sizes is not None
    given = [lowering.values[found] for found in node.args[:2]]  # type: ignore[index]  # both are nodes
    pair = [aligned(lowering, value, sizes) for value in given]
    channels = _common_channels(pair)
    if channels is None:
        pair = [lowering.values.settled(value) for value in pair]
    order = cheapest(pair, sizes, lowering.wishes.get(node))
    nodes = [_placed(lowering, value, order, channels) for value in pair]
    made = lowering.scribe.call(node.target, *nodes, *node.args[2:], **node.kwargs)
    return Value(made, order, sizes, channels)


def aligned(lowering: Lowering, value: Value, sizes: tuple[Size, ...]) -> Value:
    """The value with axes of size 1 in front, as broadcasting adds them."""
    missing = len(sizes) - value.rank
    if not missing:
        return value
    full = (Size(1, 1),) * missing + value.sizes
    if value.constant is not None:
        tensor = value.constant.reshape((1,) * missing + tuple(value.constant.shape))
        return Value(value.node, natural(len(sizes)), full, None, tensor)
    value = lowering.values.settled(value)
    made = value.node
    for _ in range(missing):
        made = lowering.scribe.call(ATEN.unsqueeze.default, made, 0)
    order = tuple(range(missing)) + tuple(label if label == UNIT else label + missing for label in value.order)
    return Value(made, order, full)


def _common_channels(pair: list[Value]) -> Channels | None:
    """Where the channels of both are, if the other is the same for all channels, or known."""
    held = [value.channels for value in pair if value.channels is not None]
    if not held:
        return None
    axis = held[0].axis
    for value in pair:
        same = value.channels is not None and value.channels.axis == axis
        if same and value.channels is not None and torch.equal(value.channels.index, held[0].index):
            if value.channels.count == held[0].count:
                continue
        if value.channels is None and (value.sizes[axis].expression == 1 or value.constant is not None):
            continue
        return None
    return held[0]


def cheapest(pair: list[Value], sizes: tuple[Size, ...], wish: AxisOrder | None) -> AxisOrder:
    """The order in which the fewest elements have to be moved, now and by who reads the result."""
    total = 1
    for size in sizes:
        total *= size.hint
    wanted = natural(len(sizes)) if wish is None else wish

    def cost(order: AxisOrder) -> float:
        moved = sum(
            value.hint for value in pair if order != value.order and value.constant is None and order not in value.forms
        )
        return moved / total + (0.75 if order != wanted else 0.0)

    candidates = [value.order for value in pair if value.constant is None and value.hint == total]
    candidates += [value.order for value in pair if value.constant is None]
    candidates += [wanted]
    return min(candidates, key=cost)


def _placed(lowering: Lowering, value: Value, order: AxisOrder, channels: Channels | None) -> fx.Node:
    if channels is None or value.channels is not None or value.sizes[channels.axis].expression == 1:
        if value.channels is None:
            return lowering.values.in_order(value, order)
        if value.order == order:
            return value.node
        moved = Value(value.node, value.order, value.sizes)  # its channels stay where they are
        return lowering.values.in_order(moved, order)
    assert value.constant is not None
    shape = list(value.constant.shape)
    shape[channels.axis] = channels.count
    tensor = value.constant.new_zeros(shape).index_copy(channels.axis, channels.index, value.constant.detach())
    tensor.requires_grad_(value.constant.requires_grad)
    return (
        lowering.values.in_order(Value(value.node, value.order, value.sizes, None, tensor), order)
        if order != value.order
        else _written(lowering, value, tensor)
    )


def _written(lowering: Lowering, value: Value, tensor: torch.Tensor) -> fx.Node:
    name = str(value.node.target) if value.node.op == "get_attr" else "lowered"
    trainable = tensor.requires_grad if tensor.is_floating_point() else None
    return lowering.scribe.tensor(f"{name}_moved", tensor.detach(), trainable=trainable)
