"""Groups of parameter entries whose Fisher is summed: rows, columns, heads, buckets, or none."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxsparse.errors import ConfigError

ELEMENT = "element"


@dataclass(frozen=True, eq=False)
class Grouping:
    """Which entries of a parameter belong together.

    Attributes:
        group_type: the last part of the key.
        shape: of the parameter.
        axis: 0 or 1 where a group consists of whole slices along that axis, "leading" where the index has several
            leading axes, None where every entry is a group of its own.
        index: int64, the group of each slice, -1 for slices that belong to none: [shape[axis]], or the leading shape.
            None where each slice is a group, in order.
        count: number of groups.
    """

    group_type: str
    shape: tuple[int, ...]
    axis: int | str | None = None
    index: Tensor | None = None
    count: int = 0
    members: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.axis is None:
            object.__setattr__(self, "count", 0)
            object.__setattr__(self, "members", torch.ones((), dtype=torch.float64))
            return
        if self.index is None:
            assert isinstance(self.axis, int)
            object.__setattr__(self, "count", self.shape[self.axis])
        each = torch.ones(self._lead(), dtype=torch.float64) * (_numel(self.shape) // max(_numel(self._lead()), 1))
        object.__setattr__(self, "members", self._gather(each.flatten()[None])[0])

    @property
    def is_element(self) -> bool:
        """Whether nothing is summed."""
        return self.axis is None

    @property
    def size(self) -> int:
        """How many values are stored."""
        return _numel(self.shape) if self.axis is None else self.count

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape in which the values are returned."""
        return self.shape if self.axis is None else (self.count,)

    def reduce(self, squares: Tensor) -> Tensor:
        """Squares [n, *shape] of entries -> sums of groups [n, size]."""
        n = squares.shape[0]
        if self.axis is None:
            return squares.reshape(n, -1)
        if self.axis == 1:
            return self._gather((squares.flatten(3).sum(3) if squares.ndim > 3 else squares).sum(1))
        lead = len(self._lead())
        summed = squares.flatten(lead + 1).sum(lead + 1) if squares.ndim > lead + 1 else squares
        return self._gather(summed.reshape(n, -1))

    def from_slices(self, slices: Tensor) -> Tensor:
        """Sums of squares of the slices along `axis`, [n, shape[axis]] -> sums of groups [n, count]."""
        return self._gather(slices)

    def expand(self, values: Tensor) -> Tensor:
        """Spread each group's sum evenly over its entries: a tensor of the parameter's shape with the same total."""
        if self.axis is None:
            return values.reshape(self.shape)
        means = values / self.members.to(values)
        if self.index is not None:
            index = self.index.to(values.device)
            means = torch.where(index >= 0, means[index.clamp_min(0)], torch.zeros((), dtype=values.dtype))
        if self.axis == 1:
            return means.reshape(1, -1, *(1,) * (len(self.shape) - 2)).expand(self.shape).clone()
        lead = self._lead()
        return means.reshape(*lead, *(1,) * (len(self.shape) - len(lead))).expand(self.shape).clone()

    def _lead(self) -> tuple[int, ...]:
        if self.axis == "leading":
            assert self.index is not None
            return tuple(self.index.shape)
        assert isinstance(self.axis, int)
        return (self.shape[self.axis],)

    def _gather(self, slices: Tensor) -> Tensor:
        if self.index is None:
            return slices
        index = self.index.flatten().to(slices.device)
        kept = index >= 0
        result = slices.new_zeros((slices.shape[0], self.count))
        if bool(kept.all()):
            return result.index_add_(1, index, slices)
        return result.index_add_(1, index[kept], slices[:, kept])


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def element(shape: tuple[int, ...]) -> Grouping:
    """Every entry on its own."""
    return Grouping(ELEMENT, shape)


def slices(group_type: str, shape: tuple[int, ...], axis: int = 0) -> Grouping:
    """Each slice along an axis is a group."""
    return Grouping(group_type, shape, axis)


def blocks(
    group_type: str, shape: tuple[int, ...], axis: int, size: int, first: int = 0, last: int | None = None
) -> Grouping:
    """Consecutive slices `first`..`last` in blocks of `size` (the last may be short); the others belong to none."""
    end = shape[axis] if last is None else last
    index = torch.full((shape[axis],), -1)
    index[first:end] = torch.arange(end - first) // size
    return Grouping(group_type, shape, axis, index, -(-(end - first) // size))


def assigned(group_type: str, shape: tuple[int, ...], index: Tensor) -> Grouping:
    """Groups by an index over leading axes: int64 of shape `shape[:k]`, numbers 0..G-1, -1 for none.

    Raises:
        ConfigError: the index does not fit the parameter.
    """
    if index.dtype is not torch.int64 or not index.ndim or tuple(index.shape) != shape[: index.ndim]:
        raise ConfigError(
            f"`index` (={index.dtype} {tuple(index.shape)}) must be int64 of the leading shape of {shape}"
        )
    if int(index.min()) < -1:
        raise ConfigError(f"`index` (={int(index.min())}) must be -1 or a group's number")
    return Grouping(group_type, shape, "leading", index, int(index.max()) + 1)
