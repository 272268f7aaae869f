"""In which order the axes of a tensor lie in memory while the model speaks of another: layouts and their algebra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

AxisOrder: TypeAlias = tuple[int, ...]
"""For each axis of the tensor at hand, the axis of the model's own tensor that it is; -1 for one of size 1 more."""

UNIT = -1
_LONG = 16  # columns from which on a product is efficient


@dataclass(frozen=True)
class Size:
    """A size that may be symbolic: equal when the expressions are.

    Attributes:
        hint: Its value on the example inputs.
        expression: An int, or what stands for it.
    """

    hint: int
    expression: Any

    @staticmethod
    def of(size: int | torch.SymInt) -> Size:
        """The size of a dimension."""
        if isinstance(size, torch.SymInt):
            expression = size.node.expr
            if not expression.is_number:
                return Size(int(size.node.hint), expression)
            return Size(int(expression), int(expression))
        return Size(int(size), int(size))

    @property
    def static(self) -> bool:
        """Whether it is a number."""
        return isinstance(self.expression, int)

    def __mul__(self, other: Size) -> Size:
        return Size(self.hint * other.hint, self.expression * other.expression)


def natural(rank: int) -> AxisOrder:
    """The order of the model itself."""
    return tuple(range(rank))


def permuted(order: AxisOrder, dims: Sequence[int]) -> AxisOrder:
    """The order after the model permutes: its new axis i is the old axis `dims[i]`; nothing moves in memory."""
    return tuple(label if label == UNIT else list(dims).index(label) for label in order)


def through_view(order: AxisOrder, before: Sequence[Size], after: Sequence[Size]) -> AxisOrder | None:
    """The order after the model reshapes `before` to `after`; None where memory would have to be rearranged.

    Axes that are split or merged together must lie side by side, in the model's order. Axes of size 1 come and go.
    """
    pairs = _segments(before, after)
    if pairs is None:
        return None
    result: list[int] = []
    segment_of = {axis: pair for pair in pairs for axis in pair[0]}
    at = 0
    while at < len(order):
        label = order[at]
        if label == UNIT:
            result.append(UNIT)
        elif label in segment_of:
            old, new = segment_of[label]
            run = [axis for axis in order[at : at + len(old)]]
            if run != old:
                return None
            result.extend(new)
            at += len(old) - 1
        at += 1  # axes of size 1 are left out
    return _with_units(result, after)


def _with_units(order: list[int], after: Sequence[Size]) -> AxisOrder:
    """Put each axis of size 1 of the model before the axis that follows it there."""
    for axis in reversed([i for i, size in enumerate(after) if size.expression == 1]):
        where = next((order.index(i) for i in range(axis + 1, len(after)) if i in order), len(order))
        order.insert(where, axis)
    return tuple(order)


def _segments(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[list[int], list[int]]] | None:
    """The finest pairs of runs of axes of equal product; axes of size 1 are left out."""
    old = [i for i, size in enumerate(before) if size.expression != 1]
    new = [i for i, size in enumerate(after) if size.expression != 1]
    pairs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        left, right = [old[i]], [new[j]]
        one, other = before[old[i]], after[new[j]]
        while one.expression != other.expression:
            if one.hint < other.hint and i + 1 < len(old):
                i += 1
                left.append(old[i])
                one = one * before[old[i]]
            elif other.hint < one.hint and j + 1 < len(new):
                j += 1
                right.append(new[j])
                other = other * after[new[j]]
            else:
                return None
        pairs.append((left, right))
        i, j = i + 1, j + 1
    return pairs if i == len(old) and j == len(new) else None


def linear_order(sizes: Sequence[Size]) -> AxisOrder | None:
    """Where a convolution wants the last axis of a linear layer's input: second, the longest other axis at the end.

    None where the tensor has too many axes.
    """
    rank = len(sizes)
    if rank > 5 or rank == 0:
        return None
    others = list(range(rank - 1))
    channel = rank - 1
    if rank == 1:
        return (UNIT, 0, UNIT)
    if rank == 2:
        return (UNIT, 1, 0)
    if rank == 3:
        return (0, 2, 1) if _along(sizes[1], sizes[0]) else (1, 2, 0)
    return (others[0], channel, *others[1:])


def _along(one: Size, other: Size) -> bool:
    """Whether a product should run along `one`, which the batch does not change, rather than along `other`."""
    if one.static != other.static:
        return one.hint >= _LONG if one.static else other.hint < _LONG
    return one.hint >= other.hint


def product_order(rank: int) -> AxisOrder | None:
    """Where a batched product wants the last axis of a linear layer's input: before the last; None for one axis."""
    return None if rank < 2 else (*range(rank - 2), rank - 1, rank - 2)


def fits_convolution(order: AxisOrder, rank: int) -> bool:
    """Whether a convolution takes the last axis of the model's tensor for channels."""
    return 3 <= len(order) <= 5 and order[1] == rank - 1
