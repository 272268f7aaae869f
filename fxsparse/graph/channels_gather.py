"""Operators that pick, place or rank entries by values: the dimension that is indexed stays, others pass through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxsparse.graph.channels_atoms import Labels
from fxsparse.graph.channels_flow import Flow, bound, shape_of, tensor_arguments
from fxsparse.graph.channels_rules import Rule, unknown

_INDEXED = "is indexed by values"
_ALIGNMENT = 16  # bytes: grouped products of torch ask for strides that are multiples of it


def created(flow: Flow, node: fx.Node) -> Any:
    """A tensor of one value: its sizes are stated, and follow what it meets."""
    return tuple(flow.made(size) if size > 1 else None for size in shape_of(node))


def _ranked(flow: Flow, node: fx.Node) -> Any:
    """topk, kthvalue: the ranked dimension is read as a whole."""
    a = bound(node)
    source = a["self"]
    dims = list(flow.of(source))
    if dims:
        axis = int(a["dim"]) % len(dims)
        flow.freeze(node, dims[axis], "is ranked by its values")
        dims[axis] = None
    return [tuple(dims)] * 2


def _scattered(flow: Flow, node: fx.Node) -> Any:
    """scatter, scatter_add, scatter_reduce: entry i of an index says where entry i of the source goes."""
    a = bound(node)
    dims, index, source = list(flow.of(a["self"])), a["index"], a.get("src")
    if not dims:
        return unknown(flow, node)
    axis, shape = int(a["dim"]) % len(dims), shape_of(a["self"])
    placed = flow.of(source) if isinstance(source, fx.Node) else (None,) * len(dims)
    for place in range(len(dims)):
        held = (flow.of(index)[place], placed[place])
        if place == axis:
            for labels in (dims[axis], *held):
                flow.freeze(node, labels, _INDEXED)
            dims[axis] = None
        elif not isinstance(source, fx.Node) or not shape_of(index)[place] == shape_of(source)[place] == shape[place]:
            for labels in (dims[place], *held):
                flow.freeze(node, labels, "is written in part")
        else:
            dims[place] = flow.unite(node, dims[place], placed[place])
            if held[0] is not None:
                flow.unite(node, held[0], placed[place])
    return tuple(dims)


def _gathered(flow: Flow, node: fx.Node) -> Any:
    """gather, take_along_dim: as the index; its other dimensions must be as long as those of what is read."""
    a = bound(node)
    source, index = (a["self"], a["index"] if "index" in a else a["indices"])
    dims, own = list(flow.of(source)), flow.of(index)
    if not dims or len(own) != len(dims) or a.get("dim") is None:
        return unknown(flow, node)
    axis = int(a["dim"]) % len(dims)
    for place, (labels, other) in enumerate(zip(dims, own, strict=True)):
        if place == axis:
            flow.freeze(node, labels, _INDEXED)
            flow.freeze(node, other, "holds indices")
            dims[place] = None
        elif shape_of(source)[place] != shape_of(index)[place]:
            for each in (labels, other):
                flow.freeze(node, each, "is read in part")
            dims[place] = None
        elif other is not None:
            dims[place] = flow.unite(node, labels, other)
    return tuple(dims)


def _index_added(flow: Flow, node: fx.Node) -> Any:
    """index_add, index_copy, index_reduce."""
    a = bound(node)
    dims, source = list(flow.of(a["self"])), flow.of(a["source"])
    if not dims or len(source) != len(dims):
        return unknown(flow, node)
    axis = int(a["dim"]) % len(dims)
    for place in range(len(dims)):
        if place == axis:
            for labels in (dims[place], source[place]):
                flow.freeze(node, labels, _INDEXED)
            dims[place] = None
        else:
            dims[place] = flow.unite(node, dims[place], source[place])
    return tuple(dims)


def picks(indices: Sequence[Any]) -> tuple[int, int, int] | None:
    """Of x[indices]: the first indexed dimension, how many there are, and how many the result has instead.

    None where they do not stand side by side, or are masks beside others.
    """
    used = [axis for axis, index in enumerate(indices) if index is not None]
    held = [index for index in indices if index is not None]
    if not used or used != list(range(used[0], used[0] + len(used))) or not all(isinstance(i, fx.Node) for i in held):
        return None
    masks = [str(index.meta.get("dtype")) in ("torch.bool", "torch.uint8") for index in held]
    if any(masks):
        return (used[0], len(shape_of(held[0])), 1) if len(held) == 1 else None
    return used[0], len(used), max(len(shape_of(index)) for index in held)


def indexed(flow: Flow, node: fx.Node) -> Any:
    """x[indices] with index tensors or a mask side by side; what they index keeps all its channels."""
    a = bound(node)
    source = a["self"]
    dims, given = flow.of(source), a.get("indices")
    indices = list(given) if isinstance(given, list | tuple) else []
    found = picks(indices)
    if found is None:
        return unknown(flow, node)
    first, count, rank = found
    if len(shape_of(node)) != len(dims) - count + rank:
        return unknown(flow, node)
    _hold(flow, node, indices, dims[first : first + count])
    return (*dims[:first], *(None for _ in range(rank)), *dims[first + count :])


def _hold(flow: Flow, node: fx.Node, indices: Sequence[Any], picked: Sequence[Labels | None]) -> None:
    for labels in picked:
        flow.freeze(node, labels, _INDEXED)
    for index in indices:
        for labels in flow.of(index):
            flow.freeze(node, labels, "holds indices")


def _index_put(flow: Flow, node: fx.Node) -> Any:
    """x[indices] = values."""
    a = bound(node)
    dims, values = list(flow.of(a["self"])), a["values"]
    found = picks(list(a["indices"]))
    if found is None:
        return unknown(flow, node)
    first, count, rank = found
    kept = [*range(first), *range(first + count, len(dims))]
    _hold(flow, node, list(a["indices"]), dims[first : first + count])
    size = len(kept) + rank
    for axis, labels in zip(range(-len(shape_of(values)), 0), flow.of(values), strict=True):
        place = size + axis
        own = place if place < first else None if place < first + rank else place - rank + count
        if own is None:
            flow.freeze(node, labels, "is placed by indices")
        elif shape_of(values)[axis] != shape_of(a["self"])[own]:
            flow.freeze(node, labels, "is repeated along another dimension")
        else:
            dims[own] = flow.unite(node, dims[own], labels)
    for axis in range(first, first + count):
        dims[axis] = None
    return tuple(dims)


def _grouped_product(flow: Flow, node: fx.Node) -> Any:
    """Rows of one matrix, in runs, times a matrix of their own each: (rows, in) x (runs, in, out)."""
    a = bound(node)
    x, weight = flow.of(a["self"]), flow.of(a["mat2"])
    if len(x) != 2 or len(weight) != 3 or a.get("bias") is not None:
        return unknown(flow, node)
    flow.unite(node, x[1], weight[1])
    step = max(_ALIGNMENT // node.meta["dtype"].itemsize, 1) if "dtype" in node.meta else 1
    flow.aligned += [(labels, step) for labels in weight[1:] if labels is not None]
    for labels in (x[0], weight[0]):
        flow.freeze(node, labels, "is cut into runs by values")
    return (None, weight[2])


def _bilinear(flow: Flow, node: fx.Node) -> Any:
    a = bound(node)
    out, first, second = flow.of(a["weight"])
    flow.unite(node, flow.of(a["input1"])[-1], first)
    flow.unite(node, flow.of(a["input2"])[-1], second)
    if isinstance(a["bias"], fx.Node):
        out = flow.unite(node, out, flow.of(a["bias"])[0])
    batch = [flow._common(node, held) for held in zip(*(flow.of(a[n])[:-1] for n in ("input1", "input2")), strict=True)]
    return (*batch, out)


def _regions(flow: Flow, node: fx.Node) -> Any:
    """Pooling of regions: (images, channels, height, width) and boxes -> (boxes, channels, ...)."""
    x, boxes = tensor_arguments(node)[:2]
    dims = flow.of(x)
    for labels in (dims[0], *dims[2:], *flow.of(boxes)):
        flow.freeze(node, labels, "is read by coordinates")
    result = (None, dims[1], None, None)
    return result if node.meta.get("shape") is not None else [result, (None,) * 4]


def _table(flow: Flow, node: fx.Node) -> Any:
    """nonzero, nms, bincount and the like: which entries there are depends on values."""
    for argument in tensor_arguments(node):
        for labels in flow.of(argument):
            flow.freeze(node, labels, "decides by its values")
    shape = node.meta.get("shape")
    return None if shape is None else (None,) * len(shape)


def stepped(flow: Flow, node: fx.Node, labels: Labels, start: int, step: int) -> Labels | None:
    """x[start::step] where steps divide the dimension: runs of `step` channels go together."""
    if step < 2 or labels.size % step or not 0 <= start < step:
        flow.freeze(node, labels, "is read in steps")
        return None
    runs, inner = flow.atoms.split(labels, (labels.size // step, step))
    flow.freeze(node, inner, "is a step")
    return runs


GATHERS: dict[str, Rule] = {
    **dict.fromkeys("zeros ones full empty new_zeros new_ones new_full new_empty".split(), created),
    **dict.fromkeys(("topk", "kthvalue"), _ranked),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), _scattered),
    **dict.fromkeys(("gather", "take_along_dim"), _gathered),
    **dict.fromkeys(("index_add", "index_copy", "index_reduce"), _index_added),
    **dict.fromkeys(("index", "_unsafe_index"), indexed),
    **dict.fromkeys(("index_put", "_unsafe_index_put", "_index_put_impl"), _index_put),
    "_grouped_mm": _grouped_product,
    "bilinear": _bilinear,
    **dict.fromkeys(("roi_align", "roi_pool"), _regions),
    **dict.fromkeys(("nonzero", "nms", "bincount", "histc", "argwhere"), _table),
}
"""Operator name -> its rule."""
