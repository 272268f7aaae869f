"""N:M patterns: at most n alive among every m consecutive positions of an axis."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import Target, check_count, check_sparsity
from fxsparse.sparsity.layout import LINEAR, Layout
from fxsparse.sparsity.pattern import Pattern, checked_axis, checked_shape
from fxsparse.sparsity.top_k import order_scores, segment_top_k, top_k
from fxsparse.sparsity.units import ElementUnits, Pooling, Units

_SAME_SPARSITY = 1e-6


class Remainder(enum.Enum):
    """What becomes of an axis that is not a multiple of m."""

    ERROR = "error"
    DENSE = "dense"  # the weight stays dense, and `NByM.remark` says so
    TAIL = "tail"  # the last group of r < m keeps ceil(n r / m)


@dataclass(frozen=True)
class DenseUnits(ElementUnits):
    """All elements, always alive."""

    def counts(self, target: float | Target) -> Tensor:
        """All elements, whatever the target."""
        return torch.tensor([self.width])

    def is_dense(self, target: Target) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class GroupUnits(Units):
    """Every group of m consecutive positions along `axis` is a segment; segments run along the axis first."""

    axis: int
    n: int
    exact: bool

    @property
    def tail(self) -> int:
        """Positions of the last, smaller group of each line; 0 when there is none."""
        return self.shape[self.axis] % self.width

    @property
    def valid(self) -> Tensor | None:
        """False beyond the end of the axis."""
        if not self.tail:
            return None
        exists = torch.arange(self._groups * self.width) < self.shape[self.axis]
        return exists.reshape(self._groups, self.width).repeat(self._lines, 1)

    def pool(self, scores: Tensor, pooling: Pooling = Pooling.RMS) -> Tensor:
        """Shape -> [segments, m]; positions beyond the end hold 0."""
        return self._split(order_scores(scores))

    def spread(self, chosen: Tensor) -> Tensor:
        """[segments, m] -> shape."""
        length = self.shape[self.axis]
        moved = [size for axis, size in enumerate(self.shape) if axis != self.axis] + [length]
        return chosen.reshape(self._lines, -1)[:, :length].reshape(moved).movedim(-1, self.axis).contiguous()

    def collect(self, mask: Tensor) -> Tensor:
        """Shape -> [segments, m]; positions beyond the end hold False."""
        return self._split(mask)

    def counts(self, target: float | Target) -> Tensor:
        """Exactly n in every group (ceil(n r / m) in a smaller last one), or everything when the target is dense."""
        target = self.target(target)
        if self.is_dense(target):
            return self._per_segment(self.width)
        if not self.exact:
            raise ConfigError("NByM(exact=False) has no fixed count per group; use NByM(exact=True) with this method")
        check_density(target.sparsity, self.n, self.width)
        return self._per_segment(self.n)

    def alive_elements(self, target: float | Target) -> int:
        """Exact; for `exact=False` min(K, n per group)."""
        target = self.target(target)
        if self.exact or self.is_dense(target):
            return int(self.counts(target).sum())
        return min(target.alive, int(self._per_segment(self.n).sum()))

    def is_dense(self, target: Target) -> bool:
        """Without `exact` only sparsity 0: n per group binds even where rounding leaves nothing to prune."""
        return target.alive == self.numel if self.exact else target.sparsity == 0.0

    def limits(self) -> Tensor:
        """The most that each segment may hold in a sparse mask, int64 [segments] (CPU)."""
        return self._per_segment(self.n)

    def _per_segment(self, count: int) -> Tensor:
        counts = torch.full((self._lines, self._groups), count, dtype=torch.int64)
        if self.tail:
            counts[:, -1] = math.ceil(count * self.tail / self.width)
        return counts.reshape(-1)

    def _split(self, tensor: Tensor) -> Tensor:
        length = self.shape[self.axis]
        lines = tensor.movedim(self.axis, -1).reshape(self._lines, length)
        return pad(lines, (0, self._groups * self.width - length)).reshape(self.segments, self.width)

    @property
    def _groups(self) -> int:
        return math.ceil(self.shape[self.axis] / self.width)

    @property
    def _lines(self) -> int:
        return self.numel // self.shape[self.axis]


@dataclass(frozen=True)
class NByM(Pattern):
    """The best n of every m consecutive positions along `axis`, other coordinates fixed.

    Sparsity must be 0 (dense) or 1 - n/m. With `exact=False` it may be anything: elements are accepted in order of
    score while fewer than K are alive in all and fewer than n in their group.

    Attributes:
        n: Alive positions per group.
        m: Size of a group.
        axis: Axis of the weight that groups run along; 1 = inputs of a linear layer, input channels of a convolution.
            Axes of experts are not counted.
        exact: Whether every group of a sparse weight holds exactly n.
        remainder: What becomes of an axis that is not a multiple of m.
    """

    n: int
    m: int
    axis: int = 1
    exact: bool = True
    remainder: Remainder = Remainder.ERROR

    def __post_init__(self) -> None:
        check_count(self.n, "n", 1)
        check_count(self.m, "m", 1)
        if self.n > self.m:
            raise ConfigError(f"`n` (={self.n}) must be at most `m` (={self.m})")

    def units(self, shape: Sequence[int], layout: Layout = LINEAR, row_order: Tensor | None = None) -> Units:
        """One segment per group of m."""
        sizes = checked_shape(self, shape, row_order)
        axis = self._axis(sizes, layout)
        length = sizes[axis]
        blocks = layout.blocks if axis == layout.out_axis else 1
        if blocks > 1 and length // blocks % self.m:
            raise ConfigError(
                f"each of the {blocks} blocks along axis {axis} (={length}) of `shape` (={sizes}) must be divisible by "
                f"`m` (={self.m}); exclude this weight"
            )
        if length % self.m:
            if self.remainder is Remainder.ERROR:
                raise ConfigError(
                    f"axis {axis} (={length}) of `shape` (={sizes}) must be divisible by `m` (={self.m}); set "
                    "`remainder` to Remainder.TAIL or Remainder.DENSE, or exclude this weight"
                )
            if self.remainder is Remainder.DENSE:
                return DenseUnits.of(sizes)
        groups = math.ceil(length / self.m)
        return GroupUnits(sizes, math.prod(sizes) // length * groups, self.m, axis, self.n, self.exact)

    def target(self, shape: Sequence[int], layout: Layout, target: Target) -> Target:
        """Dense or N:M, nothing between (any target with `exact=False`)."""
        units = self.units(shape, layout)
        if isinstance(units, DenseUnits) or units.is_dense(target):
            return Target.dense(units.numel)
        if not self.exact:
            return target
        sparsity = 1 - self.n / self.m
        return Target(sparsity, units.alive_elements(sparsity)) if sparsity else Target.dense(units.numel)

    def check_sparsity(self, sparsity: float) -> None:
        """With `exact`, only 0 and 1 - n/m."""
        if self.exact and check_sparsity(sparsity) != 0.0:
            check_density(sparsity, self.n, self.m)

    def remark(self, shape: Sequence[int], layout: Layout = LINEAR) -> str | None:
        """Names a weight left dense and a smaller last group."""
        units = self.units(shape, layout)
        length = shape[self._axis(tuple(shape), layout)]
        if isinstance(units, DenseUnits):
            return (
                f"left dense: axis {self._axis(tuple(shape), layout)} (={length}) is not divisible by `m` (={self.m})"
            )
        if length % self.m:
            return f"the last group along axis {self.axis} has {length % self.m} of {self.m} positions"
        return None

    def _axis(self, shape: tuple[int, ...], layout: Layout) -> int:
        """The axis of the weight, batch axes counted."""
        kept = [axis for axis in range(len(shape)) if axis not in layout.batch]
        return kept[checked_axis(self.axis, tuple(shape[axis] for axis in kept))]

    def _choose(self, units: Units, scores: Tensor, target: Target, pooling: Pooling) -> Tensor:
        if self.exact or not isinstance(units, GroupUnits):
            return super()._choose(units, scores, target, pooling)
        ordered = order_scores(scores)
        valid = units.valid
        candidates = None if valid is None else valid.to(scores.device)
        best = units.spread(segment_top_k(units.pool(ordered), units.limits(), candidates))
        return top_k(ordered, min(target.alive, int(best.sum())), best)

    def _check_counts(self, chosen: Tensor, units: Units) -> None:
        alive = chosen.sum(1).cpu()
        if int(alive.sum()) == units.numel:
            return
        if not isinstance(units, GroupUnits):
            raise ConfigError(f"`mask` breaks {self}: axis {self.axis} is no multiple of m, so all must be alive")
        limits = units.limits()
        broken = ((alive != limits) if self.exact else (alive > limits)).nonzero()
        if broken.numel():
            segment = int(broken[0])
            raise ConfigError(
                f"`mask` breaks {self}: group {segment} along axis {self.axis} has {int(alive[segment])} alive, "
                f"not {'' if self.exact else 'at most '}{int(limits[segment])}; make masks by this pattern"
            )


def check_density(sparsity: float, n: int, m: int) -> None:
    """Raise ConfigError unless the sparsity is 1 - n/m."""
    if abs(sparsity - (1 - n / m)) > _SAME_SPARSITY:
        raise ConfigError(
            f"`sparsity` (={sparsity}) must be 0 or 1 - n/m (={1 - n / m:.6g}) with NByM(n={n}, m={m}); "
            "change it, or set `exact` to False"
        )
