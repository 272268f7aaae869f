"""Operators that move values without computing: their rules act on the labels as the operators act on the values."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from fxsparse.graph.channels_atoms import FIXED, Labels
from fxsparse.graph.channels_flow import Flow, axes_of, bound, op_of, shape_of
from fxsparse.graph.channels_gather import stepped
from fxsparse.graph.channels_rules import Rule, fixed, unknown


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _count(value: Any) -> int:
    return int(value)


def _reshape(flow: Flow, node: fx.Node) -> Any:
    if 0 in shape_of(node):
        return unknown(flow, node)
    return flow.reshape(node, _source(node), shape_of(node))


def _permute(flow: Flow, node: fx.Node) -> Any:
    dims = flow.of(_source(node))
    a, rank = bound(node), len(dims)
    name = op_of(node)
    if name in ("t", "numpy_T", "mT", "adjoint", "matrix_H"):
        order = [*range(rank - 2), rank - 1, rank - 2] if name in ("mT", "adjoint") else list(range(rank))[::-1]
    elif name in ("transpose", "swapaxes", "swapdims"):
        one, two = (int(d) % rank for d in list(node.args[1:3])) if rank else (0, 0)  # type: ignore[arg-type]
        order = list(range(rank))
        if rank:
            order[one], order[two] = two, one
    elif name in ("movedim", "moveaxis"):
        old, new = axes_of(node.args[1], rank), axes_of(node.args[2], rank)
        order = [axis for axis in range(rank) if axis not in old]
        for target, axis in sorted(zip(new, old, strict=True)):
            order.insert(target, axis)
    else:
        order = axes_of(a["dims"], rank)
    return tuple(dims[axis] for axis in order)


def _squeeze(flow: Flow, node: fx.Node) -> Any:
    source = _source(node)
    dims, shape = flow.of(source), shape_of(source)
    given = bound(node).get("dim")
    axes = range(len(dims)) if given is None else axes_of(given, len(dims))
    gone = {axis for axis in axes if shape[axis] == 1}
    for axis in gone:
        flow.freeze(node, dims[axis], "is squeezed away")
    return tuple(labels for axis, labels in enumerate(dims) if axis not in gone)


def _unsqueeze(flow: Flow, node: fx.Node) -> Any:
    dims = list(flow.of(_source(node)))
    dims.insert(int(bound(node)["dim"]) % (len(dims) + 1), None)
    return tuple(dims)


def _expand(flow: Flow, node: fx.Node) -> Any:
    source, shape = _source(node), shape_of(node)
    dims, before = flow.of(source), shape_of(source)
    added = len(shape) - len(before)
    for labels, old, new in zip(dims, before, shape[added:], strict=True):
        if old != new:
            flow.freeze(node, labels, "is repeated along another dimension")
    model = node.args[1] if op_of(node) == "expand_as" else None  # as long as that one, whatever it loses
    wide = flow.of(model) if isinstance(model, fx.Node) else (None,) * len(shape)
    kept = [
        labels if old == new else other
        for labels, other, old, new in zip(dims, wide[added:], before, shape[added:], strict=True)
    ]
    return (*wide[:added], *kept)


def _repeat(flow: Flow, node: fx.Node) -> Any:
    source, shape = _source(node), shape_of(node)
    dims, before = flow.of(source), shape_of(source)
    added = len(shape) - len(before)
    kept: list[Labels | None] = []
    for labels, old, new in zip(dims, before, shape[added:], strict=True):
        kept.append(None if labels is None or old == 0 else np.tile(labels, new // old) if new != old else labels)
    return (*(None for _ in range(added)), *kept)


def _repeat_interleave(flow: Flow, node: fx.Node) -> Any:
    a, source = bound(node), _source(node)
    dims = list(flow.of(source))
    repeats = a.get("repeats")
    if not isinstance(repeats, int) or a.get("dim") is None:
        return unknown(flow, node)
    axis = int(a["dim"]) % len(dims)
    labels = dims[axis]
    dims[axis] = None if labels is None else np.repeat(labels, repeats)
    return tuple(dims)


def _cat(flow: Flow, node: fx.Node) -> Any:
    a = bound(node)
    given = a.get("tensors")
    tensors = [t for t in given or () if isinstance(t, fx.Node) and shape_of(t) != (0,)]
    axis = int(a["dim"]) % len(shape_of(node))
    dims: list[Labels | None] = []
    for place in range(len(shape_of(node))):
        held = [flow.of(t)[place] for t in tensors]
        if place != axis:
            dims.append(flow._common(node, held))
        elif all(labels is None for labels in held):
            dims.append(None)
        else:
            sizes = [shape_of(t)[place] for t in tensors]
            parts = [
                np.full(size, FIXED, dtype=np.int64) if labels is None else labels
                for labels, size in zip(held, sizes, strict=True)
            ]
            dims.append(np.concatenate(parts) if len(parts) > 1 else parts[0])
    return tuple(dims)


def _stack(flow: Flow, node: fx.Node) -> Any:
    a = bound(node)
    tensors = [t for t in a["tensors"] if isinstance(t, fx.Node)]
    dims = [flow._common(node, [flow.of(t)[place] for t in tensors]) for place in range(len(shape_of(tensors[0])))]
    dims.insert(int(a["dim"]) % (len(dims) + 1), None)
    return tuple(dims)


def _split(flow: Flow, node: fx.Node) -> Any:
    """split, chunk, split_with_sizes, tensor_split: the pieces are found by their sizes."""
    source, a = _source(node), bound(node)
    dims, shape = flow.of(source), shape_of(source)
    axis = int(a["dim"]) % len(shape)
    sizes = piece_sizes(node, shape[axis])
    labels, start, pieces = dims[axis], 0, []
    for size in sizes:
        piece = None if labels is None else labels[start : start + size]
        pieces.append((*dims[:axis], piece, *dims[axis + 1 :]))
        start += size
    return pieces


def piece_sizes(node: fx.Node, total: int) -> list[int]:
    """The sizes into which a split or chunk cuts a dimension of `total` indices."""
    a, name = bound(node), op_of(node)
    given: Any = a.get("split_sizes", a.get("split_size", a.get("chunks")))
    if isinstance(given, list | tuple):
        return [int(size) for size in given]
    if name == "chunk" or name == "unsafe_chunk":
        size = -(-total // int(given))
    else:
        size = int(given)
    return [min(size, total - start) for start in range(0, total, max(size, 1))]


def _unbind(flow: Flow, node: fx.Node) -> Any:
    source = _source(node)
    dims, shape = flow.of(source), shape_of(source)
    axis = int(bound(node)["dim"]) % len(shape)
    flow.freeze(node, dims[axis], "is taken apart")
    return [(*dims[:axis], *dims[axis + 1 :])] * shape[axis]


def _select(flow: Flow, node: fx.Node) -> Any:
    dims = flow.of(_source(node))
    axis = int(bound(node)["dim"]) % len(dims)
    flow.freeze(node, dims[axis], "is read at one index")
    return (*dims[:axis], *dims[axis + 1 :])


def _slice(flow: Flow, node: fx.Node) -> Any:
    source, a = _source(node), bound(node)
    dims, shape = list(flow.of(source)), shape_of(source)
    axis = int(a["dim"]) % len(dims)
    labels = dims[axis]
    if labels is None:
        return tuple(dims)
    if op_of(node) == "narrow":
        start, stop, step = a["start"], a["start"] + a["length"], 1
    else:
        start, stop, step = a["start"], a["end"], a["step"]
    if step not in (None, 1):
        whole = stop is None or int(stop) >= shape[axis]
        dims[axis] = stepped(flow, node, labels, int(start or 0) if whole else -1, int(step))
        return tuple(dims)
    piece = labels[slice(start, stop, step)]
    dims[axis] = labels if piece.size == shape[axis] else piece
    return tuple(dims)


def _index_select(flow: Flow, node: fx.Node) -> Any:
    dims = list(flow.of(_source(node)))
    axis = int(bound(node)["dim"]) % len(dims)
    flow.freeze(node, dims[axis], "is indexed by values")
    dims[axis] = None
    return tuple(dims)


def _reorder(flow: Flow, node: fx.Node) -> Any:
    """Flips and rolls: a moved dimension keeps all its channels."""
    dims = list(flow.of(_source(node)))
    for axis in axes_of(bound(node)["dims"], len(dims)):
        flow.freeze(node, dims[axis], "is reordered")
    return tuple(dims)


def _pad(flow: Flow, node: fx.Node) -> Any:
    source = _source(node)
    dims, before, after = list(flow.of(source)), shape_of(source), shape_of(node)
    pads = list(bound(node).get("pad") or bound(node).get("padding") or ())
    for axis in range(len(dims)):
        labels = dims[axis]
        place = 2 * (len(dims) - 1 - axis)
        if labels is None or place >= len(pads) or before[axis] == after[axis]:
            continue
        if op_of(node) not in ("pad", "constant_pad_nd") or min(pads[place : place + 2]) < 0:
            flow.freeze(node, labels, "is padded")
            dims[axis] = None
        else:
            dims[axis] = np.pad(labels, (pads[place], pads[place + 1]), constant_values=FIXED)
    return tuple(dims)


def _pixel_shuffle(flow: Flow, node: fx.Node) -> Any:
    source, factor = _source(node), _count(node.args[1])
    dims, shape = flow.of(source), shape_of(source)
    channels = shape[-3] // factor**2
    kept, *inner = flow.atoms.split(dims[-3], (channels, factor, factor))
    for labels in (*inner, *dims[-2:]):
        flow.freeze(node, labels, "becomes part of a spatial dimension")
    return (*dims[:-3], kept, None, None)


def _pixel_unshuffle(flow: Flow, node: fx.Node) -> Any:
    source, factor = _source(node), _count(node.args[1])
    dims, shape = flow.of(source), shape_of(source)
    for labels in dims[-2:]:
        flow.freeze(node, labels, "is a spatial dimension")
    merged = flow.atoms.merge((dims[-3], None, None), (shape[-3], factor, factor))
    return (*dims[:-3], merged, None, None)


def _channel_shuffle(flow: Flow, node: fx.Node) -> Any:
    source, groups = _source(node), _count(node.args[1])
    dims, channels = flow.of(source), shape_of(source)[1]
    outer, inner = flow.atoms.split(dims[1], (groups, channels // groups))
    return (dims[0], flow.atoms.merge((inner, outer), (channels // groups, groups)), *dims[2:])


MOVES: dict[str, Rule] = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "_reshape_alias"), _reshape
    ),
    **dict.fromkeys(
        ("permute", "transpose", "t", "numpy_T", "mT", "adjoint", "movedim", "moveaxis", "swapaxes", "swapdims"),
        _permute,
    ),
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk"), _split),
    "unbind": _unbind,
    "select": _select,
    **dict.fromkeys(("slice", "narrow"), _slice),
    "index_select": _index_select,
    **dict.fromkeys(("flip", "roll"), _reorder),
    **dict.fromkeys(("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"), _pad),
    **dict.fromkeys(("replication_pad1d", "replication_pad2d", "replication_pad3d"), _pad),
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _channel_shuffle),
    **dict.fromkeys(
        "arange rand randn randint scalar_tensor linspace eye tril_indices triu_indices randperm".split(), fixed
    ),
}
"""Operator name -> its rule."""
