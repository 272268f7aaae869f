"""Rules of operators that turn, merge, add or drop axes; what all rules of moves share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_channels import Channels, Track
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


def _product(found: Sequence[int | None]) -> int | None:
    return None if None in found else math.prod(size for size in found if size is not None)


def _merged(track: Track, found: Sizes, axis: int) -> tuple[Labels, Array] | None:
    """Labels and constants of the axis that is made of `found`, of which the channels are number `axis`."""
    outer, inner = _product(found[:axis]), _product(found[axis + 1 :])
    if outer is None or inner is None:
        return None
    return np.tile(np.repeat(track.labels, inner), outer), np.tile(np.repeat(track.known, inner), outer)


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
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
}
