"""How the axes of a reshaped value come from those it had, and the shape operands that say so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_channels import Channels
from fxsparse.exporters.file_graph import add_constant, fresh_name, integer, sizes, whole

Sizes = list[int | None]


@dataclass
class Factor:
    """A factor of an axis (-1: of none that counts): its size, None where it is free, and the name of a free one."""

    axis: int
    size: int | None
    name: str | None = None


@dataclass(frozen=True)
class Block:
    """Axes of a value, and those of the result that hold the same entries in the same order."""

    before: tuple[Factor, ...]
    behind: tuple[Factor, ...]


@dataclass(frozen=True)
class Matching:
    """Blocks that make up a reshape.

    Attributes:
        blocks: those found.
        tiled: axes of the result that repeat a factor an unknown number of times.
        sizes: sizes of free axes of the result that follow.
    """

    blocks: tuple[Block, ...]
    tiled: frozenset[int]
    sizes: Mapping[int, int]


def factors(value: ir.Value, found: Sizes) -> list[Factor]:
    """One factor for each axis."""
    named = [None] * len(found) if value.shape is None else list(value.shape)
    names = [size.value if isinstance(size, ir.SymbolicDim) else None for size in named]
    return [Factor(axis, size, name) for axis, (size, name) in enumerate(zip(found, names, strict=True))]


def match(before: list[Factor], behind: list[Factor], wanted: set[int]) -> Matching | None:
    """Match the factors of a value with those of its reshaped form; the products are known to be equal.

    1. Equal axes at the left and at the right belong together.
    2. Else a block grows at the right until its products are equal.
    3. A free axis of the result takes up what a block has too much: it repeats it an unknown number of times.

    Args:
        before: the value's.
        behind: the result's.
        wanted: axes of the value that have to be found.

    Returns:
        None where a wanted one is not found.
    """
    first, i, j = 0, len(before), len(behind)
    blocks: list[Block] = []
    while first < min(i, j) and _same(before[first], behind[first]):
        blocks.append(Block((before[first],), (behind[first],)))
        first += 1
    free = {factor.axis for factor in behind if factor.size is None}
    behind = behind[:first] + _settled(before[first:], behind[first:])
    known = {f.axis: f.size for f in behind if f.size is not None and f.axis in free}
    tiled: dict[int, int] = {}
    while any(factor.axis in wanted for factor in before[first:i]):
        left: list[Factor] = [before[i - 1]]
        i -= 1
        right: list[Factor] = []
        if left[0].size is None:
            if j > first and behind[j - 1].size is None and (_same(left[0], behind[j - 1]) or i == j - 1 == first):
                blocks.append(Block(tuple(left), (behind[j - 1],)))
                j -= 1
                continue
            return None
        while (a := _product(left)) != (b := _product(right)) or not right:
            grows = right if (b < a or not right) and j > first else left
            if grows is right and behind[j - 1].size is not None:
                right.insert(0, behind[j - 1])
                j -= 1
            elif grows is right and behind[j - 1].axis >= 0 and a % b == 0:
                axis = behind[j - 1].axis
                right.insert(0, Factor(axis, a // b))
                tiled[axis] = a // b
                behind = [*behind[: j - 1], Factor(-1, None)]
            elif grows is left and i > first and before[i - 1].size is not None and b > a:
                left.insert(0, before[i - 1])
                i -= 1
            else:
                return None
        blocks.append(Block(tuple(left), tuple(right)))
    if tiled and not _divides(behind[first:j], before[first:i]):
        return None
    return Matching(tuple(blocks), frozenset(tiled), known)


def _settled(before: Sequence[Factor], behind: Sequence[Factor]) -> list[Factor]:
    """The factors of a result, the only unknown one of which is what is left of the product."""
    left = [factor for factor in before if factor.size is None]
    open_ = []
    for factor in behind:
        if factor.size is None:
            same = next((i for i, other in enumerate(left) if _same(other, factor)), None)
            if same is None:
                open_.append(factor)
            else:
                del left[same]
    whole_size = _product([factor for factor in before if factor.size is not None])
    rest = _product([factor for factor in behind if factor.size is not None])
    if len(open_) != 1 or len(left) > 1 or not rest or whole_size % rest or (left and whole_size != rest):
        return list(behind)
    size, name = (None, left[0].name) if left else (whole_size // rest, None)
    return [Factor(f.axis, size, name) if f is open_[0] else f for f in behind]


def _divides(behind: Sequence[Factor], before: Sequence[Factor]) -> bool:
    """Whether the axes that are left of a result are among those that are left of its operand."""
    left = list(before)
    for factor in behind:
        same = next((i for i, other in enumerate(left) if _same(other, factor)), None)
        if factor.axis < 0 or factor.size == 1:
            continue
        if same is None:
            return False
        del left[same]
    return True


def _same(a: Factor, b: Factor) -> bool:
    return a.size == b.size if a.size is not None else b.size is None and a.name is not None and a.name == b.name


def _product(found: Sequence[Factor]) -> int:
    return math.prod(factor.size or 0 for factor in found)


def target_sizes(node: ir.Node, found: Sizes) -> Sizes | None:
    """The sizes of what a Reshape makes, as far as they are known."""
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


@dataclass(frozen=True)
class Target:
    """What is to stand in a shape operand.

    Attributes:
        followed: axes of the result whose number of entries may change.
        tiled: those that repeat them an unknown number of times.
        sizes: sizes of the result.
        copied: axes of the result that a 0 copies from the operand.
        changed: axes of the operand whose size may change.
    """

    followed: frozenset[int]
    tiled: frozenset[int]
    sizes: tuple[int | None, ...]
    copied: frozenset[int]
    changed: frozenset[int]


Writer = Callable[[dict[int, int]], None]


def writer_of(channels: Channels, node: ir.Node, target: Target) -> Writer | None:
    """What rewrites the shape operand of a Reshape once the sizes of its followed axes are known; None where none can.

    1. A constant one: its entries.
    2. A computed one with at most one free axis: a constant with -1.
    3. One that is put together of single entries: those entries.
    4. One whose free axes but one stand where they stood: a constant with zeros.
    """
    given = whole(node.inputs[1])
    if given is not None:
        return _of_constant(channels, node, target, given)
    free = [axis for axis, size in enumerate(target.sizes) if size is None and axis not in target.followed]
    plain = target.followed - target.tiled
    if len(free) + len(target.tiled) > 1:
        parts = single_entries(node.inputs[1], len(target.sizes))
        open_ = [
            axis for axis, part in enumerate(parts or ()) if fixed_entry(part) == -1 and axis not in target.followed
        ]
        if parts is not None and len(target.tiled) + len(open_) <= 1:
            tiles = dict.fromkeys(target.tiled, -1)
            return lambda left: write_parts(channels, node, parts, {**left, **tiles})
        if target.tiled or len([axis for axis in free if axis not in target.copied]) > 1:
            return None

    def write(left: dict[int, int]) -> None:
        made = [-1 if size is None else size for size in target.sizes]
        if len(free) + len(target.tiled) > 1:
            made = [0 if axis in free and axis in target.copied else size for axis, size in enumerate(made)]
        for axis in target.followed:
            made[axis] = left[axis] if axis in plain else -1
        node.attributes.pop("allowzero", None)
        channels.replace(node, 1, np.asarray(made, np.int64))

    return write


def _of_constant(channels: Channels, node: ir.Node, target: Target, given: list[int]) -> Writer | None:
    if any(given[axis] != -1 for axis in target.tiled):
        return None
    made = list(given)
    for axis, size in enumerate(given):
        if size == 0 and axis not in target.followed and axis in target.changed:
            if target.sizes[axis] is None:
                return None
            made[axis] = target.sizes[axis] or 0

    def write(left: dict[int, int]) -> None:
        for axis in target.followed - target.tiled:
            made[axis] = left[axis] if given[axis] != -1 else -1
        channels.replace(node, 1, np.asarray(made, np.int64))

    return write


def fixed_entry(value: ir.Value) -> int | None:
    """The number in a constant of one entry."""
    found = whole(value)
    return found[0] if found is not None and len(found) == 1 else None


def single_entries(value: ir.Value | None, number: int) -> list[ir.Value] | None:
    """The operands of a Concat that puts a shape together of single entries."""
    maker = value.producer() if value is not None else None
    if maker is None or maker.op_type != "Concat" or len(maker.inputs) != number:
        return None
    parts = [part for part in maker.inputs if part is not None]
    return parts if len(parts) == number and all(sizes(part) == [1] for part in parts) else None


def write_parts(channels: Channels, node: ir.Node, parts: Sequence[ir.Value], left: Mapping[int, int]) -> None:
    """Put a shape operand together of the same entries, but some."""
    made = list(parts)
    for axis, size in left.items():
        made[axis] = add_constant(channels.graph, f"{node.outputs[0].name}_size", np.array([size], np.int64))
    joined = ir.node("Concat", made, {"axis": 0})
    out = joined.outputs[0]
    out.name = joined.name = fresh_name(channels.graph, f"{node.outputs[0].name}_shape")
    out.type, out.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(made)])
    node.prepend(joined)
    node.replace_input_with(1, out)
