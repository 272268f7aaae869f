"""Rules of operators that turn, merge, add or drop axes; what all rules of moves share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_channels import Channels, Keep, Track
from fxsparse.exporters.file_graph import Array, integer, integers, sizes, whole
from fxsparse.graph.channels_atoms import Labels

Sizes = list[int | None]


def operand_of(channels: Channels, node: ir.Node) -> tuple[Track | None, Sizes | None]:
    """The channels of the first operand and its sizes; all of them are needed where its rank is unknown."""
    value = node.inputs[0]
    track = channels.tracks.get(value) if value is not None else None
    found = sizes(value)
    if track is not None and found is None:
        channels.freeze(node, value, "meets an operand of unknown rank")
    return track, found


def axes_of(node: ir.Node, index: int) -> list[int] | None:
    """Axes given as an operand, or as an attribute before operator set 13 (18 for reductions)."""
    if len(node.inputs) > index and node.inputs[index] is not None:
        return whole(node.inputs[index])
    return integers(node, "axes")


def transpose(channels: Channels, node: ir.Node) -> None:
    """The axis moves."""
    track, found = operand_of(channels, node)
    if track is not None and found is not None:
        order = integers(node, "perm") or list(reversed(range(len(found))))
        channels.follow(node.outputs[0], order.index(track.axis), track.labels, track.known)


def flatten(channels: Channels, node: ir.Node) -> None:
    """Channels before the axis stay where they are alone there; those behind it are merged with what follows them."""
    track, found = operand_of(channels, node)
    if track is None or found is None:
        return
    first = integer(node, "axis", 1) % (len(found) + 1)
    start, end, place = (first, len(found), 1) if track.axis >= first else (0, first, 0)
    merged = _merged(track, found[start:end], track.axis - start)
    if merged is None:
        channels.freeze(node, node.inputs[0], "merges channels with an axis of free size")
        return
    channels.follow(node.outputs[0], place, *merged)


def reshape(channels: Channels, node: ir.Node) -> None:
    """Channels pass where their axis stays whole, also merged with fixed axes beside it; else all of them stay."""
    track, found = operand_of(channels, node)
    channels.freeze(node, node.inputs[1], "is a shape")
    if track is None or found is None:
        return
    target, into = whole(node.inputs[1]), _target_sizes(node, found)
    place = _place(track, found, into) if into is not None else None
    if place is None or into is None or (target is not None and _copies(target, track.axis, place[0])):
        channels.freeze(node, node.inputs[0], "cuts or merges the channels' axis")
        return
    axis, start, end = place
    merged = _merged(track, found[start:end], track.axis - start)
    free = sum(size is None for size in into)
    if merged is None or (target is None and free > 1):
        channels.freeze(node, node.inputs[0], "reshapes to sizes that are computed")
        return
    labels, known = merged
    channels.follow(node.outputs[0], axis, labels, known)
    channels.edit(lambda keep: _edit_target(channels, node, target, into, axis, labels, keep))


def _target_sizes(node: ir.Node, found: Sizes) -> Sizes | None:
    """The sizes of the result, as far as they are known."""
    target, made = whole(node.inputs[1]), sizes(node.outputs[0])
    if target is None:
        return made
    copies = not integer(node, "allowzero", 0)
    if not copies and 0 in target:
        return None
    into: Sizes = [found[i] if size == 0 and i < len(found) else size for i, size in enumerate(target)]
    if -1 in into:
        at = into.index(-1)
        rest = [size for i, size in enumerate(into) if i != at]
        known = None not in found and None not in rest
        whole_size = math.prod(size for size in found if size is not None)
        others = math.prod(size for size in rest if size is not None)
        into[at] = whole_size // others if known and others else None
        if into[at] is None and made is not None and len(made) == len(into):
            into[at] = made[at]
    return into


def _copies(target: Sequence[int], before: int, behind: int) -> bool:
    """Whether a 0 in the target copies the number of channels to another axis, or another size to theirs."""
    zeros = {axis for axis, size in enumerate(target) if size == 0}
    return before != behind and bool(zeros & {before, behind})


def _place(track: Track, found: Sizes, into: Sizes) -> tuple[int, int, int] | None:
    """The axis of the result that holds the channels, and the axes [start, end) of the operand that it merges."""
    for end in range(track.axis + 1, len(found) + 1):
        behind = _product(found[end:])
        for start in range(track.axis, -1, -1):
            size = _product(found[start:end])
            if size is None or behind is None:
                continue
            for axis, candidate in enumerate(into):
                if candidate == size and _product(into[axis + 1 :]) == behind:
                    return axis, start, end
    return None


def _product(found: Sequence[int | None]) -> int | None:
    return None if None in found else math.prod(size for size in found if size is not None)


def _merged(track: Track, found: Sizes, axis: int) -> tuple[Labels, Array] | None:
    """Labels and constants of the axis that is made of `found`, of which the channels are number `axis`."""
    outer, inner = _product(found[:axis]), _product(found[axis + 1 :])
    if outer is None or inner is None:
        return None
    return np.tile(np.repeat(track.labels, inner), outer), np.tile(np.repeat(track.known, inner), outer)


def _edit_target(
    channels: Channels, node: ir.Node, target: list[int] | None, into: Sizes, axis: int, labels: Labels, keep: Keep
) -> None:
    left = int(keep(labels).size)
    if left == labels.size:
        return
    if target is None:
        made = [-1 if size is None else size for size in into]
    else:
        made = list(target)
    if made[axis] > 0:
        made[axis] = left
    channels.replace(node, 1, np.asarray(made, np.int64))


def squeeze(channels: Channels, node: ir.Node) -> None:
    """Axes of size 1 go."""
    track, found = operand_of(channels, node)
    if track is None or found is None:
        return
    axes = axes_of(node, 1)
    if axes is None or track.axis in {axis % len(found) for axis in axes}:
        channels.freeze(node, node.inputs[0], "squeezes axes that are not known")
        return
    gone = {axis % len(found) for axis in axes}
    channels.follow(node.outputs[0], track.axis - sum(a < track.axis for a in gone), track.labels, track.known)


def unsqueeze(channels: Channels, node: ir.Node) -> None:
    """Axes of size 1 come."""
    track, found = operand_of(channels, node)
    if track is None or found is None:
        return
    axes = axes_of(node, 1)
    if axes is None:
        channels.freeze(node, node.inputs[0], "adds axes that are not known")
        return
    rank = len(found) + len(axes)
    come = {axis % rank for axis in axes}
    left = [axis for axis in range(rank) if axis not in come]
    channels.follow(node.outputs[0], left[track.axis], track.labels, track.known)


RULES: dict[str, Callable[[Channels, ir.Node], None]] = {
    "Transpose": transpose,
    "Flatten": flatten,
    "Reshape": reshape,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
}
