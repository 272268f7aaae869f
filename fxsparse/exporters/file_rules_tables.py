"""Rules of moves for values with channels along several axes: heads and their entries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_channels import Channels, Keep
from fxsparse.exporters.file_graph import Array, fixed, integer, integers, opset, sizes
from fxsparse.exporters.file_rules_move import SUMS, cuts_of, read_by_shape, split_lengths, write_split
from fxsparse.exporters.file_rules_reshape import axes_of
from fxsparse.exporters.file_tables import Table
from fxsparse.graph.channels_atoms import Labels

Sizes = list[int | None]


def with_table(channels: Channels, node: ir.Node) -> tuple[Table, Sizes] | None:
    """The channels of the first operand and its sizes; all of them are needed where its rank is unknown."""
    value = node.inputs[0]
    table, found = channels.table(value), sizes(value)
    if table is None:
        return None
    if found is None:
        channels.freeze(node, value, "meets an operand of unknown rank")
        return None
    return table, found


def kept_of(keep: Keep, labels: Labels) -> Array:
    """Which entries of a table stay, a bool of its shape."""
    kept = np.zeros(labels.size, bool)
    kept[keep(labels.reshape(-1))] = True
    return kept.reshape(labels.shape)


def transpose(channels: Channels, node: ir.Node) -> None:
    """The axes move."""
    if (got := with_table(channels, node)) is not None:
        order = integers(node, "perm") or list(reversed(range(len(got[1]))))
        channels.tabulate(node.outputs[0], got[0].moved(order.index))


def squeeze(channels: Channels, node: ir.Node) -> None:
    """Axes of size 1 go."""
    if (got := with_table(channels, node)) is None:
        return
    table, found = got
    axes = axes_of(node, 1)
    gone = {axis % len(found) for axis in axes or ()}
    if axes is None or gone & set(table.axes):
        channels.freeze(node, node.inputs[0], "squeezes axes that are not known")
        return
    channels.tabulate(node.outputs[0], table.moved(lambda axis: axis - sum(a < axis for a in gone)))


def unsqueeze(channels: Channels, node: ir.Node) -> None:
    """Axes of size 1 come."""
    if (got := with_table(channels, node)) is None:
        return
    table, found = got
    axes = axes_of(node, 1)
    if axes is None:
        channels.freeze(node, node.inputs[0], "adds axes that are not known")
        return
    rank = len(found) + len(axes)
    left = [axis for axis in range(rank) if axis not in {a % rank for a in axes}]
    channels.tabulate(node.outputs[0], table.moved(lambda axis: left[axis]))


def picked(channels: Channels, node: ir.Node, table: Table, axis: int, indices: Array) -> Table | None:
    """Some entries along an axis, by their places, which therefore stay; None where it is an axis that repeats."""
    if axis in table.tiled:
        channels.freeze(node, node.inputs[0], "picks from an axis that merges channels with others")
        return None
    at = table.place(axis)
    if at:
        channels.bind(table, axis)
    else:
        channels.rigid.append(table.labels)
    return Table(table.axes, table.labels.take(indices, axis=at), table.known.take(indices, axis=at), table.tiled)


def slice_(channels: Channels, node: ir.Node) -> None:
    """One after the other along an axis of the table: a part of it, at places that stay. Others pass."""
    for value in node.inputs[1:]:
        channels.freeze(node, value, "are places")
    if (got := with_table(channels, node)) is None:
        return
    table, found = got
    cuts = cuts_of(node, len(found)) if opset(channels.model) >= 10 else None
    if cuts is None:
        channels.freeze(node, node.inputs[0], "is cut at places that vary")
        return
    for axis, start, end, step in cuts:
        if axis not in table.axes:
            continue
        places = np.arange(table.size(axis))[slice(start, end, step)]
        if places.size == table.size(axis) and step == 1:
            continue
        part = picked(channels, node, table, axis, places) if places.size else None
        if part is None:
            channels.freeze(node, node.inputs[0], "is cut to nothing")
            return
        table = part
    channels.tabulate(node.outputs[0], table)


def gather(channels: Channels, node: ir.Node) -> None:
    """Constant indices along an axis of the table pick entries at places that stay. Along others channels pass."""
    channels.freeze(node, node.inputs[1], "are indices")
    if (got := with_table(channels, node)) is None:
        return
    table, found = got
    order, places = fixed(node.inputs[1]), sizes(node.inputs[1])
    axis = integer(node, "axis", 0) % len(found)
    if places is None or (axis in table.axes and (order is None or order.ndim > 1)):
        channels.freeze(node, node.inputs[0], "picks channels by indices that vary")
        return
    if axis in table.axes and order is not None:
        part = picked(channels, node, table, axis, order.reshape(-1).astype(np.int64) % table.size(axis))
        if part is None:
            return
        table = part if order.ndim else part.first(axis)
    grows = len(places) - 1
    channels.tabulate(node.outputs[0], table.moved(lambda a: a + grows if a > axis else a))


def split(channels: Channels, node: ir.Node) -> None:
    """Along the outermost axis of the table: parts of it. Along an inner one, whose places stay. Others pass."""
    if (got := with_table(channels, node)) is None:
        return
    table, found = got
    axis = integer(node, "axis", 0) % len(found)
    if axis not in table.axes:
        for value in node.outputs:
            channels.tabulate(value, table)
        return
    lengths, as_input = split_lengths(channels, node, table.size(axis))
    at = table.place(axis)
    if lengths is None or axis in table.tiled:
        channels.freeze(node, node.inputs[0], "is cut at places that vary")
        return
    if at:
        channels.bind(table, axis)
    ends = np.cumsum(lengths)
    parts = []
    for value, end, length in zip(node.outputs, ends, lengths, strict=True):
        parts.append(table.labels.take(np.arange(end - length, end), axis=at))
        known = table.known.take(np.arange(end - length, end), axis=at)
        channels.tabulate(value, Table(table.axes, parts[-1], known, table.tiled))

    def edit(keep: Keep) -> None:
        left = [int(kept_of(keep, part).reshape(part.shape[0], -1).any(axis=1).sum()) for part in parts]
        if not at and left != lengths:
            write_split(channels, node, left, as_input)

    channels.edit(edit)


def concat(channels: Channels, node: ir.Node) -> None:
    """Tables of the same axes: one after the other along one of them, or side by side along another axis."""
    values = [value for value in node.inputs if value is not None]
    tables = [channels.table(value) for value in values]
    found = [sizes(value) for value in values]
    first = next(table for table in tables if table is not None)
    rank = len(found[0] or ())
    axis = integer(node, "axis", 0) % rank if rank else 0
    others = [a for a in first.axes if a != axis]
    same = all(
        table is not None
        and (table.axes, table.tiled) == (first.axes, first.tiled)
        and all(table.size(a) == first.size(a) for a in others)
        for table in tables
    )
    if not same or None in found or axis in first.tiled:
        for value in values:
            channels.freeze(node, value, "is joined to what is not followed")
        return
    given = [table for table in tables if table is not None]
    if axis not in first.axes:
        known = first.known.copy()
        for table in given[1:]:
            channels.atoms.unite(first.labels.reshape(-1), table.labels.reshape(-1))
            known[~(known == table.known)] = np.nan
        channels.tabulate(node.outputs[0], first.holding(known))
        return
    at = first.place(axis)
    for table in given if at else ():
        _tie_rows(channels, given[0], table, at)
    labels = np.concatenate([table.labels for table in given], axis=at)
    known = np.concatenate([table.known for table in given], axis=at)
    channels.tabulate(node.outputs[0], Table(first.axes, labels, known, first.tiled))


def _tie_rows(channels: Channels, one: Table, other: Table, at: int) -> None:
    """Two tables keep the same places along all axes but one, along which nothing goes by itself."""
    for table in (one, other):
        channels.bind(table, table.axes[at])
    channels.atoms.unite(one.labels.take(0, axis=at).reshape(-1), other.labels.take(0, axis=at).reshape(-1))


def reduce(channels: Channels, node: ir.Node) -> None:
    """Axes that are read together keep their places; others pass."""
    if (got := with_table(channels, node)) is None:
        return
    table, found = got
    axes = axes_of(node, 1)
    gone = {axis % len(found) for axis in axes or ()}
    if not axes or table.tiled or set(table.axes) <= gone:
        channels.freeze(node, node.inputs[0], "reads all channels together")
        return
    constant = table.known if node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin") else None
    for axis in [axis for axis in table.axes if axis in gone]:
        table, constant = channels.bind(table, axis).without(axis), None
    kept = integer(node, "keepdims", 1)
    table = table.holding(constant)
    channels.tabulate(node.outputs[0], table.moved(lambda axis: axis if kept else axis - sum(a < axis for a in gone)))


def along(channels: Channels, node: ir.Node) -> None:
    """Softmax reads one axis together, a normalisation those from one on: their places stay."""
    if (got := with_table(channels, node)) is None:
        return
    table, found = got
    several = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
    whole_rest = node.op_type not in ("Softmax", "LogSoftmax") or opset(channels.model) < 13
    first = integer(node, "axis", 1 if whole_rest and "oftmax" in node.op_type else -1) % len(found)
    read = [axis for axis in table.axes if axis == first or (whole_rest and axis > first)]
    if several or table.tiled & set(read):
        channels.freeze(node, node.inputs[0], "reads all channels together")
        return
    for axis in read:
        channels.bind(table, axis)
    channels.tabulate(node.outputs[0], table.holding())


def shape(channels: Channels, node: ir.Node) -> None:
    """Sizes of other axes may be read; those of the table that are read stay."""
    if (got := with_table(channels, node)) is None:
        return
    table, found = got
    read = read_by_shape(channels, node, len(found))
    if read & table.tiled:
        channels.freeze(node, node.inputs[0], "reads the number of channels")
        return
    for axis in read & set(table.axes):
        channels.bind(table, axis)


RULES: dict[str, Callable[[Channels, ir.Node], None]] = {
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Slice": slice_,
    "Gather": gather,
    "Split": split,
    "Concat": concat,
    **dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin", *SUMS), reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization"), along),
    "Shape": shape,
}
