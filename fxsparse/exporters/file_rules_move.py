"""Rules of operators that join, cut, pad, resize or shrink axes, or read their sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_channels import Channels, Keep
from fxsparse.exporters.file_graph import Array, fixed, integer, integers, opset, sizes, text, whole
from fxsparse.exporters.file_rules_reshape import axes_of, operand_of
from fxsparse.graph.channels_atoms import Labels


def concat(channels: Channels, node: ir.Node) -> None:
    """Along the channels: theirs one after the other. Along another axis: the same ones in all operands."""
    values = [value for value in node.inputs if value is not None]
    tracked = [value for value in values if value in channels.tracks]
    if not tracked:
        return
    first = channels.tracks[tracked[0]]
    found = [sizes(value) for value in values]
    if any(each is None for each in found):
        for value in tracked:
            channels.freeze(node, value, "meets an operand of unknown rank")
        return
    axis = integer(node, "axis", 0) % len(found[0] or ())
    along = [each[axis] for each in found if each is not None]
    if axis == first.axis and None not in along:
        parts = [_part(channels, node, value, axis, size or 0) for value, size in zip(values, along, strict=True)]
        labels, known = (np.concatenate(column) for column in zip(*parts, strict=True))
        channels.follow(node.outputs[0], axis, labels, known)
        return
    same = all(
        value in channels.tracks
        and channels.tracks[value].axis == first.axis != axis
        and channels.tracks[value].size == first.size
        for value in values
    )
    if not same:
        for value in tracked:
            channels.freeze(node, value, "is joined to what is not followed")
        return
    known = first.known.copy()
    for value in values:
        other = channels.tracks[value]
        channels.atoms.unite(first.labels, other.labels)
        known[~(known == other.known)] = np.nan
    channels.follow(node.outputs[0], first.axis, first.labels, known)


def _part(channels: Channels, node: ir.Node, value: ir.Value, axis: int, size: int) -> tuple[Labels, Array]:
    track = channels.tracks.get(value)
    if track is not None and track.axis == axis:
        return track.labels, track.known
    channels.freeze(node, value, "is joined along another axis")
    return np.zeros(size, np.int64), np.full(size, np.nan)


def split(channels: Channels, node: ir.Node) -> None:
    """Along the channels: parts of them. Along another axis they pass."""
    track, found = operand_of(channels, node)
    if track is None or found is None:
        return
    if integer(node, "axis", 0) % len(found) != track.axis:
        for value in node.outputs:
            channels.follow(value, track.axis, track.labels, track.known)
        return
    lengths, as_input = split_lengths(channels, node, track.size)
    if lengths is None:
        channels.freeze(node, node.inputs[0], "is cut at places that vary")
        return
    ends = np.cumsum(lengths)
    parts = []
    for value, end, length in zip(node.outputs, ends, lengths, strict=True):
        parts.append(track.labels[end - length : end])
        channels.follow(value, track.axis, parts[-1], track.known[end - length : end])
    channels.edit(lambda keep: _edit_split(channels, node, parts, as_input, keep))


def split_lengths(channels: Channels, node: ir.Node, size: int) -> tuple[list[int] | None, bool]:
    """Sizes of the parts of a Split, None where they vary; and whether they are an operand."""
    as_input = opset(channels.model) >= 13
    given = len(node.inputs) > 1 and node.inputs[1] is not None
    lengths = (whole(node.inputs[1]) if given else None) if as_input else integers(node, "split")
    if lengths is None and not given:
        each = -(-size // len(node.outputs))
        lengths = [min(each, size - i * each) for i in range(len(node.outputs))]
    fits = lengths is not None and sum(lengths) == size and min(lengths) >= 1
    return (lengths if fits else None), as_input


def write_split(channels: Channels, node: ir.Node, left: list[int], as_input: bool) -> None:
    """Let a Split make parts of these sizes."""
    if not as_input:
        node.attributes.add(ir.AttrInt64s("split", left))
        return
    node.attributes.pop("num_outputs", None)
    if len(node.inputs) < 2:
        node.resize_inputs(2)
    channels.replace(node, 1, np.asarray(left, np.int64))


def _edit_split(channels: Channels, node: ir.Node, parts: Sequence[Labels], as_input: bool, keep: Keep) -> None:
    left = [int(keep(labels).size) for labels in parts]
    if left == [labels.size for labels in parts]:
        return
    write_split(channels, node, left, as_input)


def slice_(channels: Channels, node: ir.Node) -> None:
    """One after the other along the channels: a part of them. Along other axes they pass."""
    track, found = operand_of(channels, node)
    for value in node.inputs[1:]:
        channels.freeze(node, value, "are places")
    if track is None or found is None:
        return
    cuts = cuts_of(node, len(found)) if opset(channels.model) >= 10 else None
    if cuts is None:
        channels.freeze(node, node.inputs[0], "is cut at places that vary")
        return
    mine = [(i, start, end, step) for i, (axis, start, end, step) in enumerate(cuts) if axis == track.axis]
    if not mine:
        channels.follow(node.outputs[0], track.axis, track.labels, track.known)
        return
    place, start, end, step = mine[0]
    begin, stop, _ = slice(start, end, 1).indices(track.size)
    if step != 1 or len(mine) > 1 or stop <= begin:
        channels.freeze(node, node.inputs[0], "takes every so many channels")
        return
    channels.follow(node.outputs[0], track.axis, track.labels[begin:stop], track.known[begin:stop])

    def edit(keep: Keep) -> None:
        kept = keep(track.labels)
        if kept.size < track.size:
            for index, bound in ((1, begin), (2, stop)):
                array = np.array(fixed(node.inputs[index]))
                array[place] = int((kept < bound).sum())
                channels.replace(node, index, array)

    channels.edit(edit)


def cuts_of(node: ir.Node, rank: int) -> list[tuple[int, int, int, int]] | None:
    """Axis, start, end and step of each cut; None where one varies."""
    inputs = [*node.inputs, None, None][:5]
    starts, ends = whole(inputs[1]), whole(inputs[2])
    if starts is None or ends is None:
        return None
    axes = list(range(len(starts))) if inputs[3] is None else whole(inputs[3])
    steps = [1] * len(starts) if inputs[4] is None else whole(inputs[4])
    if axes is None or steps is None:
        return None
    return [(axis % rank, *cut) for axis, *cut in zip(axes, starts, ends, steps, strict=True)]  # type: ignore[misc]


def pad(channels: Channels, node: ir.Node) -> None:
    """Around other axes: a constant channel stays one where the border repeats it or holds the same number."""
    track, found = operand_of(channels, node)
    if track is None or found is None:
        return
    late = opset(channels.model) >= 11
    pads = whole(node.inputs[1]) if late else integers(node, "pads")
    axes = whole(node.inputs[3]) if late and len(node.inputs) > 3 and node.inputs[3] is not None else range(len(found))
    own = late and len(node.inputs) > 3 and node.inputs[3] is not None and whole(node.inputs[3]) is None
    value = fixed(node.inputs[2]) if late and len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
    if pads is None or own or axes is None:
        channels.freeze(node, node.inputs[0], "pads by sizes that vary")
        return
    places = [axis % len(found) for axis in axes]
    touched = [i for i, axis in enumerate(places) if axis == track.axis]
    if any(pads[i] or pads[i + len(places)] for i in touched):
        channels.freeze(node, node.inputs[0], "pads the channels' axis")
        return
    border = node.attributes.get_float("value", 0.0) if not late else None if value is None else float(value.ravel()[0])
    keeps = text(node, "mode", "constant") != "constant"
    known = track.known if keeps else np.where(track.known == border, track.known, np.nan)
    channels.follow(node.outputs[0], track.axis, track.labels, known)


def pool(channels: Channels, node: ir.Node) -> None:
    """Over the axes behind the channels: constants stay; zeros only, where padding counts in a mean."""
    track, _ = operand_of(channels, node)
    if track is None:
        return
    if track.axis > 1 or any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        channels.freeze(node, node.inputs[0], "pools the channels' axis, or tells places")
        return
    counts = node.op_type == "AveragePool" and integer(node, "count_include_pad", 0)
    known = np.where(track.known == 0, track.known, np.nan) if counts else track.known
    channels.follow(node.outputs[0], track.axis, track.labels, known)


def reduce(channels: Channels, node: ir.Node) -> None:
    """Over other axes; a sum keeps zeros only."""
    track, found = operand_of(channels, node)
    if track is None or found is None:
        return
    axes = axes_of(node, 1)
    none = axes is None and "axes" not in node.attributes and not (len(node.inputs) > 1 and node.inputs[1] is not None)
    if none and integer(node, "noop_with_empty_axes", 0):
        none, axes = False, []
    everything = axes == [] and not integer(node, "noop_with_empty_axes", 0)
    if axes is None or none or everything or track.axis in {axis % len(found) for axis in axes}:
        channels.freeze(node, node.inputs[0], "reads all channels together")
        return
    gone = {axis % len(found) for axis in axes}
    moved = track.axis if integer(node, "keepdims", 1) else track.axis - sum(a < track.axis for a in gone)
    stays = node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin")
    known = track.known if stays else np.where(track.known == 0, 0.0, np.nan) if node.op_type in SUMS else None
    channels.follow(node.outputs[0], moved, track.labels, known)


SUMS = ("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2")


def resize(channels: Channels, node: ir.Node) -> None:
    """Along other axes, by fixed scales or sizes; constants stay where the result is a mean of neighbours."""
    track, found = operand_of(channels, node)
    if track is None or found is None:
        return
    index = 1 if node.op_type == "Upsample" else 2
    scales = fixed(node.inputs[index]) if len(node.inputs) > index and node.inputs[index] is not None else None
    lengths = whole(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    plain = "axes" not in node.attributes and opset(channels.model) >= 11 or node.op_type == "Upsample"
    scaled = scales is not None and scales.size == len(found) and float(scales[track.axis]) == 1.0
    sized = lengths is not None and len(lengths) == len(found) and lengths[track.axis] == track.size
    policy = text(node, "keep_aspect_ratio_policy", "stretch") == "stretch"
    if not plain or not policy or not (scaled or sized):
        channels.freeze(node, node.inputs[0], "resizes in a way that is not followed")
        return
    mean = text(node, "mode", "nearest") in ("nearest", "linear")
    crops = text(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    channels.follow(node.outputs[0], track.axis, track.labels, track.known if mean and not crops else None)

    def edit(keep: Keep) -> None:
        kept = keep(track.labels)
        if kept.size < track.size and lengths is not None:
            channels.replace(node, 3, np.asarray([*lengths[: track.axis], kept.size, *lengths[track.axis + 1 :]]))

    channels.edit(edit)


def shape(channels: Channels, node: ir.Node) -> None:
    """Sizes of other axes may be read."""
    track, found = operand_of(channels, node)
    if track is None or found is None:
        return
    if track.axis in read_by_shape(channels, node, len(found)):
        channels.freeze(node, node.inputs[0], "reads the number of channels")


def read_by_shape(channels: Channels, node: ir.Node, rank: int) -> set[int]:
    """Axes whose sizes a Shape hands on to anyone but a Gather or Slice that does not pick them."""
    start, end, _ = slice(integer(node, "start", 0), node.attributes.get_int("end"), 1).indices(rank)
    axes = list(range(start, end))
    if node.outputs[0].is_graph_output():
        return set(axes)
    read: set[int] = set()
    for user, index in node.outputs[0].uses():
        picked = whole(user.inputs[1]) if user.op_type == "Gather" and index == 0 and user.domain == "" else None
        if user.op_type == "Slice" and index == 0 and opset(channels.model) >= 10:
            cuts = cuts_of(user, 1)
            if cuts is not None and len(cuts) == 1:
                picked = list(range(len(axes)))[slice(cuts[0][1], cuts[0][2], cuts[0][3])]
        read |= set(axes) if picked is None else {axes[place % len(axes)] for place in picked}
    return read


RULES: dict[str, Callable[[Channels, ir.Node], None]] = {
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Pad": pad,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), pool),
    **dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin", *SUMS), reduce),
    "Resize": resize,
    "Upsample": resize,
    "Shape": shape,
}
