"""How operators that move, part or reduce axes are written for values whose axes lie in another order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxsparse.passes.lower_elementwise import Lowering, Rule, binary, cheapest, is_binary, is_unary, name_of, unary
from fxsparse.passes.lower_layouts import AxisOrder, Size, natural, permuted
from fxsparse.passes.lower_products import attention, product
from fxsparse.passes.lower_sites import arguments
from fxsparse.passes.lower_values import ATEN, Channels, Value, sizes_of

CHANNELWISE = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample")


def permute(lowering: Lowering, node: fx.Node) -> Value | None:
    """Nothing moves: the order changes."""
    value = lowering.values[node.all_input_nodes[0]]
    dims = permutation(node, value.rank)
    sizes = sizes_of(node)
    assert sizes is not None
    channels = value.channels
    if channels is not None:
        channels = Channels(dims.index(channels.axis), channels.index, channels.count)
    return Value(value.node, permuted(value.order, dims), sizes, channels)


def permutation(node: fx.Node, rank: int) -> list[int]:
    """The dims of a permute, transpose or t."""
    name, dims = name_of(node), list(range(rank))
    if name == "permute":
        return [int(dim) % rank for dim in arguments(node)["dims"]]
    if name == "t":
        return dims[::-1]
    given = arguments(node)
    one, other = int(given["dim0"]) % rank, int(given["dim1"]) % rank
    dims[one], dims[other] = dims[other], dims[one]
    return dims


def view(lowering: Lowering, node: fx.Node) -> Value | None:
    """Axes that are split or merged where they lie."""
    sizes = sizes_of(node)
    assert sizes is not None
    value = lowering.values[node.args[0]]  # type: ignore[index]  # a node
    return lowering.values.reshaped(value, sizes, lowering.wishes.get(node))


def select(lowering: Lowering, node: fx.Node) -> Value | None:
    """One index of an axis."""
    given = arguments(node)
    value = lowering.values[given["self"]]
    return _selected(lowering, value, int(given["dim"]) % value.rank, given["index"])


def _selected(lowering: Lowering, value: Value, label: int, index: Any) -> Value:
    if value.channels is not None:
        value = lowering.values.settled(value)
    made = lowering.scribe.call(ATEN.select.int, value.node, value.order.index(label), index)
    return Value(made, without(value.order, label), value.sizes[:label] + value.sizes[label + 1 :])


def without(order: AxisOrder, label: int) -> AxisOrder:
    """The order after the model drops an axis."""
    return tuple(found - (found > label) for found in order if found != label)


def slice_(lowering: Lowering, node: fx.Node) -> Value | None:
    """A part of an axis."""
    given = arguments(node)
    value = lowering.values.settled(lowering.values[given["self"]])
    sizes = sizes_of(node)
    assert sizes is not None
    axis = value.order.index(int(given["dim"]) % value.rank)
    made = lowering.scribe.call(ATEN.slice.Tensor, value.node, axis, given["start"], given["end"], given["step"])
    return Value(made, value.order, sizes)


def cat(lowering: Lowering, node: fx.Node) -> Value | None:
    """Tensors one after another, in the order of the first that is moved."""
    given = arguments(node)
    values = [lowering.values[found] for found in given["tensors"]]
    sizes = sizes_of(node)
    assert sizes is not None
    if any(value.rank != len(sizes) for value in values):
        return None
    order = cheapest(values, sizes, lowering.wishes.get(node))
    axis = order.index(int(given["dim"]) % len(sizes))
    made = lowering.scribe.call(ATEN.cat.default, [lowering.values.in_order(value, order) for value in values], axis)
    return Value(made, order, sizes)


def split(lowering: Lowering, node: fx.Node) -> Value | None:
    """Several parts of an axis, written where they are read."""
    given = arguments(node)
    source = given["self"]
    value = lowering.values.settled(lowering.values[source])
    label = int(given["dim"]) % value.rank
    if name_of(node) == "unbind":
        lowering.parts[node] = lambda i: _selected(lowering, value, label, i)
        return None
    if not value.sizes[label].static:
        return None
    parts = [found.shape[label] for found in node.meta["val"]]
    if not all(isinstance(part, int) for part in parts):
        return None

    def one(i: int) -> Value:
        start = sum(parts[:i])
        made = lowering.scribe.call(ATEN.slice.Tensor, value.node, value.order.index(label), start, start + parts[i])
        sizes = (*value.sizes[:label], Size(parts[i], parts[i]), *value.sizes[label + 1 :])
        return Value(made, value.order, sizes)

    lowering.parts[node] = one
    return None


def reduce(lowering: Lowering, node: fx.Node) -> Value | None:
    """A mean, sum or extremum over axes."""
    given = arguments(node)
    value = lowering.values.settled(lowering.values[given["self"]])
    if given.get("dim") is None or given.get("dtype") is not None:
        return None
    dims = given["dim"] if isinstance(given["dim"], list | tuple) else [given["dim"]]
    if not dims:
        return None
    labels = sorted(int(dim) % value.rank for dim in dims)
    axes = [value.order.index(label) for label in labels]
    made = lowering.scribe.call(node.target, value.node, axes, given["keepdim"])
    order = value.order
    if not given["keepdim"]:
        for label in reversed(labels):
            order = without(order, label)
    sizes = sizes_of(node)
    assert sizes is not None
    return Value(made, order, sizes)


def softmax(lowering: Lowering, node: fx.Node) -> Value | None:
    """Over the axis that lies last."""
    given = arguments(node)
    value = lowering.values.settled(lowering.values[given["self"]])
    label = int(given["dim"]) % value.rank
    if value.order[-1] != label or given.get("dtype") is not None:
        return None
    made = lowering.scribe.call(node.target, value.node, len(value.order) - 1)
    return Value(made, value.order, value.sizes)


def layer_norm(lowering: Lowering, node: fx.Node) -> Value | None:
    """Over the axes that lie last, in the model's order."""
    given = arguments(node)
    value = lowering.values.settled(lowering.values[given["input"]])
    count = len(given["normalized_shape"])
    if value.order[-count:] != tuple(range(value.rank - count, value.rank)):
        return None
    made = lowering.scribe.call(node.target, value.node, *node.args[1:], **node.kwargs)
    return Value(made, value.order, value.sizes)


def batch_norm(lowering: Lowering, node: fx.Node) -> Value | None:
    """In eval mode, over the channels, where those lie second."""
    given = arguments(node)
    value = lowering.values[given["input"]]
    if given["training"] or len(value.order) < 2 or value.order[1] != 1:
        return None
    tensors = [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if value.channels is not None and value.channels.axis == 1:
        found = [lowering.constants(tensor) for tensor in tensors]
        if any(tensor is not None and known is None for tensor, known in zip(tensors, found, strict=True)):
            return None
        tensors = [
            _spread(lowering, tensor, known, value.channels) for tensor, known in zip(tensors, found, strict=True)
        ]
    elif value.channels is not None:
        value = lowering.values.settled(value)
    options = (False, given["momentum"], given["eps"], given["cudnn_enabled"])
    made = lowering.scribe.call(ATEN.batch_norm.default, value.node, *tensors, *options)
    return Value(made, value.order, value.sizes, value.channels)


def _spread(lowering: Lowering, node: Any, known: torch.Tensor | None, channels: Channels) -> fx.Node | None:
    """A vector of the channels, where they are; 1 at padding."""
    if known is None:
        return None
    tensor = known.new_ones(channels.count).index_copy(0, channels.index, known.detach())
    trainable = known.requires_grad if node.op == "get_attr" and isinstance(known, torch.nn.Parameter) else None
    return lowering.scribe.tensor(
        f"{node.target if node.op == 'get_attr' else 'lowered'}_moved", tensor, trainable=trainable
    )


def channelwise(lowering: Lowering, node: fx.Node) -> Value | None:
    """Pooling and the like: each channel by itself, wherever it is."""
    value = lowering.values[node.args[0]]  # type: ignore[index]  # a node
    sizes = sizes_of(node)
    if sizes is None or value.order != natural(value.rank) or value.channels is None or value.channels.axis != 1:
        return None
    if value.rank < 3 or len(node.all_input_nodes) != 1:
        return None
    made = lowering.scribe.call(node.target, value.node, *node.args[1:], **node.kwargs)
    return Value(made, value.order, sizes, value.channels)


VIEWS = frozenset("view reshape _unsafe_view flatten unflatten squeeze unsqueeze".split())
PARTS = frozenset({"split", "split_with_sizes", "chunk", "unbind"})
PERMUTES = frozenset({"permute", "transpose", "t"})
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(VIEWS, view),
    **dict.fromkeys(PERMUTES, permute),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), reduce),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax"), softmax),
    **dict.fromkeys(PARTS, split),
    **dict.fromkeys(("matmul", "bmm"), product),
    "select": select,
    "slice": slice_,
    "cat": cat,
    "layer_norm": layer_norm,
    "batch_norm": batch_norm,
    "scaled_dot_product_attention": attention,
}


def rule_for(node: fx.Node) -> Rule | None:
    """The rule of a node's operator."""
    if is_unary(node):
        return unary
    if is_binary(node):
        return binary
    name = name_of(node)
    if name.startswith(CHANNELWISE):
        return channelwise
    return RULES.get(name)
