"""Sizes written into graphs and module attributes, brought in line with shorter dimensions.

1. A node of a captured graph that states sizes (view, split, slices, groups...): its arguments are rewritten.
2. An operator inside a module that stays Python: integer attributes of that module that equal a size which changed take
   the new one. The comparison that follows shows whether that was what they meant.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxsparse.graph import edit, graphs_of
from fxsparse.graph.channels import Channels
from fxsparse.graph.channels_atoms import Labels
from fxsparse.graph.channels_flow import bound, op_of, shape_of
from fxsparse.nn import masked_weight
from fxsparse.passes import compact_attention, compact_norms
from fxsparse.passes.compact_sinks import Bools

_STATED = frozenset(
    ("view", "reshape", "_unsafe_view", "unflatten", "expand", "slice", "narrow")
    + ("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk")
    + ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
)


class Sizes:
    """The sizes of all values before and after.

    Args:
        channels: the channels.
        removed: for every class whether it goes.
    """

    def __init__(self, channels: Channels, removed: Bools) -> None:
        self.channels, self.removed = channels, removed

    def kept(self, labels: Labels | None, size: int) -> int:
        """How many of these stay; all `size` where they have no labels."""
        return size if labels is None else int((~self.removed[self.channels.classes[labels]]).sum())

    def values(self, path: str, name: str) -> list[Any]:
        """What the runs of a node of a captured graph returned."""
        found = (graph.module_nodes.get((path, name)) for graph in self.channels.graphs)
        return next((values for values in found if values), [])

    def new(self, node: fx.Node) -> tuple[int, ...]:
        """The new shape of a value."""
        dims, shape = self.channels.flow.of(node), shape_of(node)
        return tuple(self.kept(labels, size) for labels, size in zip(dims, shape, strict=True)) if dims else shape

    def groups(self, labels: Labels | None, groups: int) -> int:
        """How many of `groups` equal runs of channels keep any."""
        if labels is None:
            return groups
        return int((~self.removed[self.channels.classes[labels]]).reshape(groups, -1).any(1).sum())


def rewrite(model: nn.Module, channels: Channels, removed: Bools) -> None:
    """Bring all stated sizes in line; the model is edited in place."""
    sizes = Sizes(channels, removed)
    graphs = graphs_of(model)
    for path, module in graphs.items():
        touched = [_rewrite_node(sizes, path, node) for node in list(module.graph.nodes)]
        if any(touched):
            module.graph.lint()
            module.recompile()
    _follow(model, sizes, set(graphs))
    compact_attention.resize(model, channels, removed)
    compact_norms.resize(model, channels, removed)


def _rewrite_node(sizes: Sizes, path: str, node: fx.Node) -> bool:
    values = sizes.values(path, node.name)
    if not values or node.op not in ("call_function", "call_method"):
        return False
    rule = _RULES.get(_name(node))
    if rule is None:
        return False
    before = (node.args, dict(node.kwargs), node.target)
    rule(sizes, node, values[0], _operand(sizes, path, node))
    return before != (node.args, dict(node.kwargs), node.target)


def _name(node: fx.Node) -> str:
    """The plain name of a function or method: ``getitem`` for ``Tensor.__getitem__``."""
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")).strip("_")


def _operand(sizes: Sizes, path: str, node: fx.Node) -> fx.Node | None:
    """The operator-graph node of the first argument."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, fx.Node):
        return None
    if first.target is masked_weight:  # the folded model, which was run, has the weight itself here
        first = first.all_input_nodes[0]
    values = sizes.values(path, first.name)
    return values[0] if values and isinstance(values[0], fx.Node) else None


def _axis(value: Any) -> int:
    return int(value)


def _stated(given: Sequence[Any], old: Sequence[int], new: Sequence[int]) -> list[Any]:
    return [n if o != n and g != -1 else g for g, o, n in zip(given, old, new, strict=True)]


def _view(sizes: Sizes, node: fx.Node, value: Any, operand: fx.Node | None) -> None:
    if not isinstance(value, fx.Node):
        return
    old, new = shape_of(value), sizes.new(value)
    if old == new:
        return
    x, *rest = node.args
    if rest and isinstance(rest[0], list | tuple):
        node.args = (x, tuple(_stated(rest[0], old, new)), *rest[1:])
    elif len(rest) == len(old) and not isinstance(rest[0], torch.dtype):
        node.args = (x, *_stated(rest, old, new))
    elif len(rest) == 1 and isinstance(rest[0], fx.Node):  # a shape that is computed: only what changes is written down
        sizes_of = [
            _entry(node, rest[0], axis) if o == n else n for axis, (o, n) in enumerate(zip(old, new, strict=True))
        ]
        node.args = (x, tuple(sizes_of))
    elif not rest:
        key = "shape" if "shape" in node.kwargs else "size"
        node.kwargs = {**node.kwargs, key: tuple(_stated(node.kwargs[key], old, new))}  # type: ignore[arg-type]


def _created(sizes: Sizes, node: fx.Node, value: Any, operand: fx.Node | None) -> None:
    """zeros((2, 3)), zeros(2, 3), x.new_zeros((2, 3)): the sizes begin behind the tensor, if there is one."""
    if not isinstance(value, fx.Node):
        return
    old, new = shape_of(value), sizes.new(value)
    start = 1 if node.args and isinstance(node.args[0], fx.Node) and "new" in _name(node) else 0
    given = node.args[start:]
    if old == new or not given:
        return
    if isinstance(given[0], list | tuple):
        node.args = (*node.args[:start], tuple(_stated(given[0], old, new)), *given[1:])
    elif len(given) >= len(old):
        node.args = (*node.args[:start], *_stated(given[: len(old)], old, new), *given[len(old) :])


def _entry(node: fx.Node, shape: fx.Node, axis: int) -> fx.Node:
    return edit.insert_call(
        node.graph, operator.getitem, (shape, axis), pass_name="compact_channels", what="a size that stays", before=node
    )


def _unflatten(sizes: Sizes, node: fx.Node, value: Any, operand: fx.Node | None) -> None:
    old, new = shape_of(value), sizes.new(value)
    if old == new or operand is None or len(node.args) < 3:
        return
    rank = len(shape_of(operand))
    axis = _axis(node.args[1]) % rank
    stop = axis + len(old) - rank + 1
    node.args = (*node.args[:2], tuple(_stated(list(node.args[2]), old[axis:stop], new[axis:stop])))  # type: ignore[arg-type]


def _split(sizes: Sizes, node: fx.Node, value: Any, operand: fx.Node | None) -> None:
    pieces = [piece for piece in value if isinstance(piece, fx.Node)]
    axis = _axis(node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0))
    old, new = [shape_of(piece)[axis] for piece in pieces], [sizes.new(piece)[axis] for piece in pieces]
    if old == new:
        return
    node.target = "split" if node.op == "call_method" else torch.split
    node.args, node.kwargs = (node.args[0], new, axis), {}


def _getitem(sizes: Sizes, node: fx.Node, value: Any, operand: fx.Node | None) -> None:
    if operand is None or not isinstance(value, fx.Node):
        return
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    used = sum(item is not None and item is not Ellipsis for item in index)
    dims, shape = sizes.channels.flow.of(operand), shape_of(operand)
    result: list[Any] = []
    axis = 0
    for item in index:
        if item is Ellipsis:
            axis += len(shape) - used
        elif item is not None:
            if isinstance(item, slice) and axis < len(dims) and dims[axis] is not None:
                item = _slice(sizes, item, dims[axis], shape[axis])  # type: ignore[arg-type]
            axis += 1
        result.append(item)
    node.args = (node.args[0], tuple(result) if isinstance(node.args[1], tuple) else result[0])


def _slice(sizes: Sizes, item: slice, labels: Labels, size: int) -> slice:
    """The same channels among those that stay."""
    if sizes.kept(labels, size) == size or item == slice(None):
        return item
    bounds = [b if b is None or isinstance(b, int) else None for b in (item.start, item.stop, item.step)]
    if any(b is None and g is not None for b, g in zip(bounds, (item.start, item.stop, item.step), strict=True)):
        return item  # computed while running
    start, stop, step = slice(*bounds).indices(size)
    return slice(sizes.kept(labels[:start], start), sizes.kept(labels[:stop], stop), item.step) if step == 1 else item


def _narrow(sizes: Sizes, node: fx.Node, value: Any, operand: fx.Node | None) -> None:
    if operand is None or len(node.args) != 4 or not all(isinstance(a, int) for a in node.args[1:]):
        return
    axis, start, length = (_axis(a) for a in node.args[1:])
    labels = sizes.channels.flow.of(operand)[axis]
    if labels is not None:
        part = labels[start : start + length]
        node.args = (node.args[0], axis, sizes.kept(labels[:start], start), sizes.kept(part, length))


def _groups(position: int, key: str) -> Callable[[Sizes, fx.Node, Any, fx.Node | None], None]:
    def rule(sizes: Sizes, node: fx.Node, value: Any, operand: fx.Node | None) -> None:
        if not isinstance(value, fx.Node):
            return
        labels = sizes.channels.flow.of(value)[1] if len(shape_of(value)) > 1 else None
        given = node.args[position] if len(node.args) > position else node.kwargs.get(key, 1)
        if not isinstance(given, int) or given == 1:
            return
        groups = sizes.groups(labels, given)
        if len(node.args) > position:
            node.args = (*node.args[:position], groups, *node.args[position + 1 :])
        else:
            node.kwargs = {**node.kwargs, key: groups}

    return rule


def _attention(sizes: Sizes, node: fx.Node, value: Any, operand: fx.Node | None) -> None:
    """The scale is that of the old head size."""
    if operand is None or node.kwargs.get("scale") is not None or len(node.args) > 6:
        return
    old, new = shape_of(operand)[-1], sizes.new(operand)[-1]
    if old != new:
        node.kwargs = {**node.kwargs, "scale": 1.0 / math.sqrt(old)}


_RULES: Mapping[str, Callable[[Sizes, fx.Node, Any, fx.Node | None], None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _view),
    **dict.fromkeys(("split", "chunk", "split_with_sizes"), _split),
    **dict.fromkeys(("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full"), _created),
    **{f"conv{n}d": _groups(6, "groups") for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _groups(6, "groups") for n in (1, 2, 3)},
    "group_norm": _groups(1, "num_groups"),
    "unflatten": _unflatten,
    "getitem": _getitem,
    "narrow": _narrow,
    F.scaled_dot_product_attention.__name__: _attention,
}


def _follow(model: nn.Module, sizes: Sizes, graphs: set[str]) -> None:
    """Case 2, and the groups of convolutions and norms."""
    pairs: dict[str, dict[int, set[int]]] = {}
    for node in [node for graph in sizes.channels.graphs for node in graph.graph.nodes]:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        path, place, name = str(node.meta.get("path", "")), node.meta.get("place"), op_of(node)
        if place is not None and place[0] == path:
            continue  # a node of a captured graph itself: case 1
        if "conv" in name or "group_norm" in name:
            _follow_groups(model, sizes, node, path)
        elif name in _STATED:
            for old, new in _changes(sizes, node):
                pairs.setdefault(path, {}).setdefault(old, set()).add(new)
    for path, changes in pairs.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
            continue  # their sizes are read off their parameters
        single = {old: next(iter(new)) for old, new in changes.items() if len(new) == 1}
        _update(module, {old: new for old, new in single.items() if old != new})


def _follow_groups(model: nn.Module, sizes: Sizes, node: fx.Node, path: str) -> None:
    a, module = bound(node), model.get_submodule(path)
    key = "groups" if "groups" in a else "num_groups"
    labels = sizes.channels.flow.of(node)
    own = getattr(module, key, None)
    if a.get(key, 1) == 1 or own != a[key] or len(labels) < 2:
        return
    setattr(module, key, sizes.groups(labels[1], a[key]))
    from fxsparse.passes.compact_apply import describe

    describe(module)


def _changes(sizes: Sizes, node: fx.Node) -> list[tuple[int, int]]:
    """The sizes that a view, split or slice states, with their new values."""
    results = (
        [node] if node.meta.get("shape") is not None else [u for u in node.users if u.meta.get("shape") is not None]
    )
    found: list[tuple[int, int]] = []
    for result in results:
        changed = [(o, n) for o, n in zip(shape_of(result), sizes.new(result), strict=True)]
        found += [(o, n) for o, n in changed if o != n]
    if op_of(node) == "slice":
        a = bound(node)
        labels = sizes.channels.flow.of(a["self"])[int(a["dim"])]
        for edge in (a["start"], a["end"]):
            if labels is not None and isinstance(edge, int) and 0 < edge < labels.size:
                found.append((edge, sizes.kept(labels[:edge], edge)))
    return found


def _update(module: nn.Module, changes: Mapping[int, int]) -> None:
    for name, value in list(module.__dict__.items()):
        if isinstance(value, bool) or name.startswith("_") or name == "training":
            continue
        if isinstance(value, int) and value in changes:
            module.__dict__[name] = changes[value]
        elif type(value) in (tuple, list) and any(type(v) is int and v in changes for v in value):
            if all(type(v) is int for v in value):
                module.__dict__[name] = type(value)(changes.get(v, v) for v in value)
