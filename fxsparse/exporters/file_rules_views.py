"""Rules of operators with a shape operand for values with channels along several axes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_channels import Channels, Keep
from fxsparse.exporters.file_graph import Array, sizes, whole
from fxsparse.exporters.file_rules_tables import kept_of, with_table
from fxsparse.exporters.file_tables import Table, counts
from fxsparse.exporters.file_targets import (
    Factor,
    Matching,
    Target,
    factors,
    match,
    single_entries,
    target_sizes,
    write_parts,
    writer_of,
)


def reshape(channels: Channels, node: ir.Node) -> None:
    """Axes of channels are cut, merged and pass, as far as sizes are known; else all of them stay."""
    channels.freeze(node, node.inputs[1], "is a shape")
    if (got := with_table(channels, node)) is None:
        return
    table, found = got
    into = target_sizes(node, found)
    behind = factors(node.outputs[0], into) if into is not None else []
    before: list[Factor] = []
    for factor in factors(node.inputs[0], found):  # type: ignore[arg-type]
        if factor.axis in table.tiled:
            before += [Factor(-1, None), Factor(factor.axis, table.size(factor.axis))]
        else:
            known = table.size(factor.axis) if factor.axis in table.axes else factor.size
            before.append(Factor(factor.axis, known, factor.name))
    matching = match(before, behind, set(table.axes)) if into is not None else None
    made = _reshaped(table, matching) if matching is not None else None
    if made is None or matching is None or into is None:
        channels.freeze(node, node.inputs[0], "cuts or merges the channels' axis")
        return
    made, into = made.varying(), [matching.sizes.get(axis) if size is None else size for axis, size in enumerate(into)]
    copied = {
        block.behind[0].axis
        for block in matching.blocks
        if len(block.before) == len(block.behind) == 1 and block.before[0] == block.behind[0]
    }
    target = Target(frozenset(made.axes), made.tiled, tuple(into), frozenset(copied - set(table.axes)),
                    frozenset(table.axes))  # fmt: skip
    write = writer_of(channels, node, target)
    if write is None:
        channels.freeze(node, node.inputs[0], "reshapes to sizes that are computed")
        return
    channels.tabulate(node.outputs[0], made)
    node.outputs[0].shape = ir.Shape([f.name if size is None else size for f, size in zip(behind, into, strict=True)])

    def edit(keep: Keep) -> None:
        kept = kept_of(keep, made.labels)
        if not kept.all():
            write(dict(zip(made.axes, counts(kept), strict=True)))

    channels.edit(edit)


def _reshaped(table: Table, matching: Matching) -> Table | None:
    """The table behind a reshape; None where it merges axes in another order than that of the table."""
    blocks = [b for b in matching.blocks if any(f.axis in table.axes for f in b.before)]
    blocks.sort(key=lambda b: min(f.axis for f in b.before if f.axis in table.axes))
    places = [[table.place(f.axis) for f in b.before if f.axis in table.axes] for b in blocks]
    if any(each != list(range(each[0], each[0] + len(each))) for each in places):
        return None
    wide = tuple(f.size or 0 for b in blocks for f in b.before)
    index = tuple(slice(None) if f.axis in table.axes else None for b in blocks for f in b.before)
    narrow = [f.size or 0 for b in blocks for f in b.behind]
    order = [place for each in places for place in each]
    owners = [i for i, b in enumerate(blocks) for _ in b.behind]
    back = sorted(range(len(narrow)), key=lambda i: (places[owners[i]][0], i))
    axes = [f.axis for b in blocks for f in b.behind]

    def turned(array: Array) -> Array:
        full = np.broadcast_to(array.transpose(order)[index], wide)
        return np.ascontiguousarray(full.reshape(narrow).transpose(back))

    return Table(tuple(axes[i] for i in back), turned(table.labels), turned(table.known),
                 matching.tiled & set(axes))  # fmt: skip


def expand(channels: Channels, node: ir.Node) -> None:
    """Other axes grow; entries of the shape at followed axes become 1, which leaves them as they are."""
    channels.freeze(node, node.inputs[1], "is a shape")
    if (got := with_table(channels, node)) is None:
        return
    table, found = got
    into, given = sizes(node.outputs[0]), whole(node.inputs[1])
    parts = single_entries(node.inputs[1], len(into or ()))
    if into is None or len(into) < len(found) or table.tiled or (given is None and parts is None):
        channels.freeze(node, node.inputs[0], "expands to sizes that are computed")
        return
    table = table.moved(lambda axis: axis + len(into) - len(found))
    if any(into[axis] != table.size(axis) for axis in table.axes):
        channels.freeze(node, node.inputs[0], "may be broadcast")
        return
    channels.tabulate(node.outputs[0], table)

    def edit(keep: Keep) -> None:
        if kept_of(keep, table.labels).all():
            return
        if given is None:
            write_parts(channels, node, parts or [], dict.fromkeys(table.axes, 1))
            return
        shift = len(into) - len(given)
        made = [1 if axis + shift in table.axes else size for axis, size in enumerate(given)]
        channels.replace(node, 1, np.asarray(made, np.int64))

    channels.edit(edit)


RULES: dict[str, Callable[[Channels, ir.Node], None]] = {"Reshape": reshape, "Expand": expand}
