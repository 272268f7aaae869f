"""Constant propagation through operators that move values without computing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxsparse.graph.channels_flow import bound, factor_groups, op_of, shape_of
from fxsparse.graph.channels_moves import piece_sizes
from fxsparse.passes.compact_known import Known, broadcast, get, or_unknown


def _moved(node: fx.Node, found: Mapping[fx.Node, Known]) -> Any:
    """Operators that only rename dimensions work on the short tensors as they are."""
    source = get(node.args[0], found)
    if source is None:
        return None
    target = node.target
    return Known(
        target(source.value, *node.args[1:], **node.kwargs),  # type: ignore[operator]
        target(source.known, *node.args[1:], **node.kwargs),  # type: ignore[operator]
    )


def _squeeze(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    source, shape = get(node.args[0], found), shape_of(node.args[0])  # type: ignore[arg-type]
    if source is None:
        return None
    given = bound(node).get("dim")
    axes = range(len(shape)) if given is None else (given if isinstance(given, list | tuple) else [given])
    gone = {int(axis) % len(shape) for axis in axes}
    kept = [n for axis, n in enumerate(source.value.shape) if not (axis in gone and shape[axis] == 1)]
    return Known(source.value.reshape(kept), source.known.reshape(kept))


def _reshape(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    source = get(node.args[0], found)
    if source is None:
        return None
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    middle, target = list(source.value.shape), list(after)
    for old, new in factor_groups(before, after):
        if all(source.value.shape[axis] == 1 for axis in old):
            for axis in new:
                target[axis] = 1
        else:
            for axis in old:
                middle[axis] = before[axis]
    return Known(source.value.expand(middle).reshape(target), source.known.expand(middle).reshape(target))


def _expand(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    source = get(node.args[0], found)
    if source is None:
        return None
    added = len(shape_of(node)) - source.value.ndim
    shape = (1,) * added + tuple(source.value.shape)
    return Known(source.value.reshape(shape), source.known.reshape(shape))


def _repeat(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    source = _expand(node, found)
    if source is None:
        return None
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    before = (1,) * (len(after) - len(before)) + before
    times = [1 if n == 1 else new // old for n, old, new in zip(source.value.shape, before, after, strict=True)]
    return Known(source.value.repeat(times), source.known.repeat(times))


def _repeat_interleave(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    a, source = bound(node), get(node.args[0], found)
    if source is None or not isinstance(a.get("repeats"), int) or a.get("dim") is None:
        return None
    axis = int(a["dim"]) % source.value.ndim
    if source.value.shape[axis] == 1:
        return Known(source.value, source.known)
    repeats = a["repeats"]
    return Known(source.value.repeat_interleave(repeats, axis), source.known.repeat_interleave(repeats, axis))


def _cat(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    a = bound(node)
    axis = int(a["dim"]) % len(shape_of(node))
    tensors = [t for t in a["tensors"] if shape_of(t) != (0,)]
    held = [or_unknown(t, found) for t in tensors]
    others = broadcast(*([1 if i == axis else n for i, n in enumerate(k.value.shape)] for k in held))
    values, knowns = [], []
    for tensor, each in zip(tensors, held, strict=True):
        shape = [shape_of(tensor)[i] if i == axis else n for i, n in enumerate(others)]
        values.append(each.value.expand(shape))
        knowns.append(each.known.expand(shape))
    return Known(torch.cat(values, axis), torch.cat(knowns, axis))


def _stack(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    a = bound(node)
    held = [or_unknown(t, found) for t in a["tensors"]]
    shape = broadcast(*(k.value.shape for k in held))
    values = [k.value.expand(shape) for k in held]
    return Known(torch.stack(values, a["dim"]), torch.stack([k.known.expand(shape) for k in held], a["dim"]))


def _pieces(node: fx.Node, found: Mapping[fx.Node, Known]) -> list[Known | None] | None:
    """Split and chunk."""
    source = get(node.args[0], found)
    if source is None:
        return None
    shape = shape_of(node.args[0])  # type: ignore[arg-type]
    axis = int(bound(node)["dim"]) % len(shape)
    sizes = piece_sizes(node, shape[axis])
    if source.value.shape[axis] == 1:
        return [Known(source.value, source.known) for _ in sizes]
    pairs = zip(torch.split(source.value, sizes, axis), torch.split(source.known, sizes, axis), strict=True)
    return [Known(value, known) for value, known in pairs]


def _unbind(node: fx.Node, found: Mapping[fx.Node, Known]) -> list[Known | None] | None:
    source = get(node.args[0], found)
    if source is None:
        return None
    shape = shape_of(node.args[0])  # type: ignore[arg-type]
    axis = int(bound(node)["dim"]) % len(shape)
    wide = list(source.value.shape)
    wide[axis] = shape[axis]
    values, knowns = source.value.expand(wide).unbind(axis), source.known.expand(wide).unbind(axis)
    return [Known(value, known) for value, known in zip(values, knowns, strict=True)]


def _piece(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """select, slice and narrow."""
    source = get(node.args[0], found)
    if source is None:
        return None
    axis = int(bound(node)["dim"]) % source.value.ndim
    if source.value.shape[axis] > 1:
        return _moved(node, found)  # type: ignore[no-any-return]  # of one tensor
    if op_of(node) == "select":
        return Known(source.value.squeeze(axis), source.known.squeeze(axis))
    return Known(source.value, source.known) if 0 not in shape_of(node) else None


def _pad(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    a, source = bound(node), get(node.args[0], found)
    if source is None:
        return None
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    if op_of(node) not in ("pad", "constant_pad_nd") or a.get("mode") not in (None, "constant"):
        wide = any(old != new and n > 1 for old, new, n in zip(before, after, source.value.shape, strict=True))
        return None if wide else Known(source.value, source.known)
    filler = float(a.get("value") or 0.0)
    pads, value, known = list(a["pad"]), source.value, source.known
    sides: list[int] = []
    for place in range(0, len(pads), 2):
        axis = value.ndim - 1 - place // 2
        if value.shape[axis] == 1 and before[axis] != after[axis]:
            known = known & (value == filler)
            sides += [0, 0]
        else:
            sides += pads[place : place + 2]
    value = torch.nn.functional.pad(value, sides, value=filler)
    return Known(value, torch.nn.functional.pad(known, sides, value=True))


def _pixel_shuffle(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    source, factor = get(node.args[0], found), int(bound(node)["upscale_factor"])
    if source is None or source.value.shape[-2:] != (1, 1):
        return None
    channels = shape_of(node)[-3]
    wide = (*source.value.shape[:-3], channels * factor**2)
    value = source.value[..., 0, 0].expand(wide).reshape(*wide[:-1], channels, factor**2)
    known = source.known[..., 0, 0].expand(wide).reshape(value.shape)
    same = known.all(-1) & (value == value[..., :1]).all(-1)
    return Known(value[..., 0][..., None, None], same[..., None, None])


MOVES = "permute transpose t numpy_T mT movedim swapaxes swapdims unsqueeze".split()
RESHAPES = "view reshape _unsafe_view flatten unflatten view_as reshape_as".split()
RULES: dict[str, Callable[[fx.Node, Mapping[fx.Node, Known]], Any]] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk"), _pieces),
    **dict.fromkeys(("select", "slice", "narrow"), _piece),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"), _pad),
    "pixel_shuffle": _pixel_shuffle,
    "squeeze": _squeeze,
    "stack": _stack,
    "unbind": _unbind,
}
"""Operator name -> what it keeps known."""
