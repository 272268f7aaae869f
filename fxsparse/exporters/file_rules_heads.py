"""Rules of elementwise operators and products for values with channels along several axes: attention heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_channels import Channels, Keep
from fxsparse.exporters.file_graph import Array, fixed, integer, opset, sizes
from fxsparse.exporters.file_rules_tables import kept_of
from fxsparse.exporters.file_tables import Table
from fxsparse.exporters.file_values import evaluate

Sizes = list[int | None]


def elementwise(channels: Channels, node: ir.Node) -> None:
    """Operands aligned at the right.

    1. Tables at the same axes have the same channels.
    2. Of tables at other axes those go together that lie along axes that only one of them has.
    3. A constant operand is cut along the outermost axis; along others, and where another operand varies, places stay.
    """
    values = [value for value in node.inputs if value is not None]
    found = [sizes(value) for value in values]
    if None in found:
        for value in values:
            channels.freeze(node, value, "meets an operand of unknown rank")
        return
    rank = max(len(each or ()) for each in found)
    tables: dict[ir.Value, Table] = {}
    if not any(channels.table(value) is not None for value in values):
        return
    for value in values:
        if (table := channels.table(value)) is not None:
            shift = rank - len(sizes(value) or ())
            tables[value] = table.moved(lambda axis, shift=shift: axis + shift)  # type: ignore[misc]
    main = max(tables.values(), key=lambda table: len(table.axes))
    if any(not _fits(table, main) for table in tables.values()):
        for value in values:
            channels.freeze(node, value, "is broadcast over other channels")
        return
    plain = all(table.axes == main.axes for table in tables.values())
    for value, size in zip(values, found, strict=True):
        if value not in tables:
            _meet(channels, node, value, size or [], main, rank)
    if not plain:
        _share(channels, list(tables.values()))
    else:
        for table in tables.values():
            channels.atoms.unite(main.labels.reshape(-1), table.labels.reshape(-1))
    known = _constants(channels, node, tables, main, rank) if plain and not main.tiled else None
    channels.tabulate(node.outputs[0], main.holding(known))


def _fits(table: Table, main: Table) -> bool:
    """Whether a table lies along axes of the main one, with as many entries."""
    inside = set(table.axes) <= set(main.axes) and table.tiled == main.tiled & set(table.axes)
    return inside and all(table.size(axis) == main.size(axis) for axis in table.axes)


def _share(channels: Channels, tables: Sequence[Table]) -> None:
    """Tables keep the same places along the axes that all of them have; along others all entries go together."""
    common = [axis for axis in tables[0].axes if all(axis in table.axes for table in tables)]
    reduced = []
    for table in tables:
        for axis in [axis for axis in table.axes if axis not in common]:
            channels.bind(table, axis)
            table = table.without(axis) if len(table.axes) > 1 else table
        reduced.append(table)
    for table in reduced:
        if common and table.axes == reduced[0].axes:
            channels.atoms.unite(reduced[0].labels.reshape(-1), table.labels.reshape(-1))
        else:
            channels.hold(table.labels)


def _meet(channels: Channels, node: ir.Node, value: ir.Value, found: Sizes, main: Table, rank: int) -> None:
    """An operand that is not followed: a constant is cut where it can be, else the places that it meets stay."""
    array, shift = fixed(value), rank - len(found)
    for axis in main.axes:
        if axis < shift or found[axis - shift] == 1:
            continue
        cuttable = array is not None and main.place(axis) == 0 and axis not in main.tiled
        if cuttable and found[axis - shift] == main.size(axis):
            index = next(i for i, operand in enumerate(node.inputs) if operand is value)
            channels.edit(lambda keep, index=index, at=axis - shift: _cut(channels, node, index, at, main, keep))  # type: ignore[misc]
        else:
            channels.bind(main, axis)
            if axis in main.tiled:
                channels.hold(main.labels)


def _cut(channels: Channels, node: ir.Node, index: int, axis: int, main: Table, keep: Keep) -> None:
    kept = kept_of(keep, main.labels)
    rows = np.flatnonzero(kept.reshape(kept.shape[0], -1).any(axis=1))
    array = fixed(node.inputs[index])
    if array is not None and rows.size < kept.shape[0]:
        channels.replace(node, index, array.take(rows, axis=axis))


def _constants(
    channels: Channels, node: ir.Node, tables: dict[ir.Value, Table], main: Table, rank: int
) -> Array | None:
    """The constants of the result, entry by entry of the table."""
    if node.op_type in ("Where", "IsNaN"):
        return None
    operands: list[Array | None] = []
    for value in node.inputs:
        if value is None:
            operands.append(None)
        elif value in tables:
            operands.append(tables[value].known.reshape(-1))
        else:
            array = fixed(value)
            number = float(array.reshape(-1)[0]) if array is not None and array.size == 1 else np.nan
            operands.append(np.full(main.labels.size, number))
    return evaluate(channels.model, node, operands, main.labels.size).reshape(main.labels.shape)


def matmul(channels: Channels, node: ir.Node) -> None:
    """Products of two values of which at least one is followed: queries with keys, weights of attention with values.

    1. The entries that are summed over are those of both; one goes where it is zero in one of the two.
    2. Heads lie along an axis before the last two, in both operands: they go together.
    3. Entries along the other axes are those of the result.
    """
    a, b = (channels.table(value) for value in node.inputs[:2])
    ranks = [len(sizes(value) or ()) for value in node.inputs[:2]]
    rank = max(ranks)
    if min(ranks) < 2 or any(len(table.axes) > 2 for table in (a, b) if table is not None):
        _freeze(channels, node, "multiplies values of which too little is known")
        return
    moved = [_moved(table, rank - own) for table, own in zip((a, b), ranks, strict=True)]
    first, second = _summed(channels, node, moved[0], moved[1], rank)
    for value, mine, other in ((node.inputs[0], first, second), (node.inputs[1], second, first)):
        for axis in [axis for axis in (other.axes if other is not None else ()) if axis < rank - 2]:
            own = sizes(value) or []
            at = axis - (rank - len(own))
            if (mine is None or axis not in mine.axes) and at >= 0 and own[at] != 1 and other is not None:
                channels.bind(other, axis)
                if axis in other.tiled:
                    channels.hold(other.labels)
    made = _joined(channels, first, second, rank, _sums_to_one(channels, node.inputs[0]))
    if made is None:
        _freeze(channels, node, "multiplies heads in a way that is not followed")
    elif made.axes:
        channels.tabulate(node.outputs[0], made)


def _freeze(channels: Channels, node: ir.Node, reason: str) -> None:
    for value in node.inputs:
        channels.freeze(node, value, reason)


def _moved(table: Table | None, shift: int) -> Table | None:
    return None if table is None else table.moved(lambda axis: axis + shift)


def _summed(
    channels: Channels, node: ir.Node, a: Table | None, b: Table | None, rank: int
) -> tuple[Table | None, Table | None]:
    """What is left of two tables when the axis is gone that a product sums over; heads get channels of their own."""
    inner_a, inner_b = rank - 1, rank - 2
    if a is not None and b is not None and inner_a in a.axes and inner_b in b.axes:
        heads = [axis for axis in a.axes if axis != inner_a]
        same = heads == [axis for axis in b.axes if axis != inner_b] and a.labels.shape == b.labels.shape
        last = a.place(inner_a) == b.place(inner_b) == len(a.axes) - 1
        if same and last and a.tiled == b.tiled and inner_a not in a.tiled and inner_b not in b.tiled:
            channels.atoms.unite(a.labels.reshape(-1), b.labels.reshape(-1))
            number, each = (a.labels.shape[0], a.labels.shape[1]) if heads else (1, a.labels.size)
            outputs = channels.atoms.fresh(number) if heads else np.zeros(1, np.int64)
            zero = (a.known == 0) | (b.known == 0)
            known = np.where(zero, 0.0, np.nan).reshape(-1)
            reads = np.repeat(np.eye(number, dtype=bool), each, axis=1)
            channels.multiply(node, reads, a.labels.reshape(-1), known, outputs)
            if heads:
                channels.ties.append((outputs, a.labels))
            left = Table(tuple(heads), outputs, np.full(number, np.nan), a.tiled) if heads else None
            return left, left
    return _without(channels, a, inner_a), _without(channels, b, inner_b)


def _without(channels: Channels, table: Table | None, axis: int) -> Table | None:
    """A table without an axis along which all places stay."""
    if table is None or axis not in table.axes:
        return table
    if axis in table.tiled or len(table.axes) == 1:
        channels.hold(table.labels)
        return None
    return channels.bind(table, axis).without(axis)


def _joined(channels: Channels, a: Table | None, b: Table | None, rank: int, averages: bool) -> Table | None:
    """The channels of the result: heads of both, and entries of one; None where both have entries."""
    if a is None or b is None or a is b:
        return _alone(a or b or Table((), np.zeros(0, np.int64), np.zeros(0)), averages and a is None)
    heads = [axis for axis in a.axes if axis < rank - 2]
    if heads != [axis for axis in b.axes if axis < rank - 2] or len(heads) != 1 or a.tiled != b.tiled:
        return None
    if len(a.axes) == len(b.axes) == 1:
        channels.atoms.unite(a.labels, b.labels)
        return a.holding()
    wide, narrow = (a, b) if len(a.axes) > 1 else (b, a)
    if len(narrow.axes) > 1 or wide.axes[0] != heads[0]:
        return None
    if wide.labels.shape[0] != narrow.labels.size:
        return None
    channels.ties.append((narrow.labels, wide.labels))
    return _alone(wide, averages and wide is b)


def _alone(table: Table, averages: bool) -> Table:
    """The entries of one operand: constants stay where rows of the other sum to one, else zeros alone."""
    return table.holding(table.known if averages else np.where(table.known == 0, 0.0, np.nan))


def _sums_to_one(channels: Channels, value: ir.Value | None) -> bool:
    """Whether the rows of a value sum to one."""
    maker = value.producer() if value is not None else None
    while maker is not None and maker.op_type in ("Identity", "Dropout", "Cast"):
        value = maker.inputs[0]
        maker = value.producer() if value is not None else None
    if maker is None or maker.op_type != "Softmax" or value is None:
        return False
    axis = integer(maker, "axis", -1 if opset(channels.model) >= 13 else 1)
    return axis in (-1, len(sizes(value) or ()) - 1)
