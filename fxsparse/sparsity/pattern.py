"""Patterns: which shapes of masks are legal."""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import Target, check_count, check_sparsity
from fxsparse.sparsity.layout import LINEAR, Layout
from fxsparse.sparsity.top_k import segment_top_k
from fxsparse.sparsity.units import BlockUnits, ElementUnits, PartUnits, SliceUnits, Units
from fxsparse.sparsity.units import Pooling as Pooling


@dataclass(frozen=True)
class Pattern(abc.ABC):
    """A set of legal masks, all of them "the best k units in each segment"."""

    def __str__(self) -> str:
        """As one would write it in Python: required arguments, then those that are not the default."""
        written = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                shown = str(value) if isinstance(value, enum.Enum) else repr(value)
                written.append(shown if field.default is dataclasses.MISSING else f"{field.name}={shown}")
        return f"{type(self).__name__}({', '.join(written)})"

    @abc.abstractmethod
    def units(
        self,
        shape: Sequence[int],
        layout: Layout = LINEAR,
        row_order: Int64[Tensor, " rows"] | None = None,
    ) -> Units:
        """How a weight of `shape` splits into segments and units.

        Raises:
            ConfigError: the pattern does not fit; the message names the axis and the mend.
        """

    def mask(
        self,
        scores: Shaped[Tensor, "*shape"],
        target: float | Target,
        layout: Layout = LINEAR,
        pooling: Pooling = Pooling.RMS,
        row_order: Int64[Tensor, " rows"] | None = None,
    ) -> Bool[Tensor, "*shape"]:
        """The mask of the best units (higher scores first, among ties the lower index).

        Sparsity 0 needs no scores: the result is all True whatever they are.

        Raises:
            ConfigError: the pattern does not fit the shape or the target.
            DataError: a score is NaN.
        """
        units = self.units(scores.shape, layout, row_order)
        if not isinstance(target, Target):
            self.check_sparsity(target)
        target = units.target(target)
        if units.is_dense(target):
            return torch.ones(units.shape, dtype=torch.bool, device=scores.device)
        return self._choose(units, scores, target, pooling)

    def _choose(self, units: Units, scores: Tensor, target: Target, pooling: Pooling) -> Tensor:
        valid = units.valid
        candidates = None if valid is None else valid.to(scores.device)
        return units.spread(segment_top_k(units.pool(scores, pooling), units.counts(target), candidates))

    def check(
        self,
        mask: Bool[Tensor, "*shape"],
        layout: Layout = LINEAR,
        row_order: Int64[Tensor, " rows"] | None = None,
    ) -> None:
        """Accept a mask that holds the pattern.

        Raises:
            ConfigError: it does not; the message names the first violation.
        """
        check_bool(mask)
        units = self.units(mask.shape, layout, row_order)
        chosen = units.collect(mask)
        self._check_whole(mask, units.spread(chosen))
        self._check_counts(chosen, units)

    def target(self, shape: Sequence[int], layout: Layout, target: Target) -> Target:
        """The nearest target that this pattern can have; `target` itself unless the pattern restricts it."""
        return target

    def check_sparsity(self, sparsity: float) -> None:
        """Raise ConfigError when this pattern excludes the sparsity for every weight."""
        check_sparsity(sparsity)

    def remark(self, shape: Sequence[int], layout: Layout = LINEAR) -> str | None:
        """What a report should say about this weight: partial blocks, a weight left dense; None when nothing."""
        return None

    def _check_whole(self, mask: Tensor, whole: Tensor) -> None:
        broken = (mask != whole).nonzero()
        if broken.numel():
            raise ConfigError(
                f"`mask` breaks {self}: at index {tuple(broken[0].tolist())} it is {not bool(whole[tuple(broken[0])])} "
                "although the rest of its unit is not; make masks by this pattern"
            )

    def _check_counts(self, chosen: Tensor, units: Units) -> None:
        """Raise ConfigError when a segment has a count that the pattern forbids."""
        return


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any mask; the best K elements of the tensor."""

    def units(self, shape: Sequence[int], layout: Layout = LINEAR, row_order: Tensor | None = None) -> ElementUnits:
        """One segment of all elements."""
        return ElementUnits.of(checked_shape(self, shape, row_order))


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole slices along one axis of the weight; a slice's score is the sum of its elements.

    Each part of a weight (an expert; q, k or v) has its own slices and keeps as many as the others.

    Attributes:
        axis: 0 or 1 of the tensor (rows and columns of a linear layer), or any further axis; experts' axes not counted.
    """

    axis: int = 0

    def units(self, shape: Sequence[int], layout: Layout = LINEAR, row_order: Tensor | None = None) -> Units:
        """One segment of `shape[axis]` slices; one in each part."""
        sizes = checked_shape(self, shape, row_order)
        one, _ = checked_part(sizes, layout)
        inner = SliceUnits.of(one, checked_axis(self.axis, one))
        return inner if one == sizes else PartUnits.of(sizes, layout, inner)


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks over axes 0 and 1, spanning all further axes; a block's score is the mean of the elements that it has.

    Border blocks that do not fit are blocks of their own, so the element count may differ from K. Each part of a weight
    (an expert; q, k or v) has its own blocks; the axes are those of a part.

    Attributes:
        height: Rows of a block.
        width: Columns of a block.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        check_count(self.height, "height", 1)
        check_count(self.width, "width", 1)

    def units(self, shape: Sequence[int], layout: Layout = LINEAR, row_order: Tensor | None = None) -> Units:
        """One segment of all blocks, row-major; one in each part."""
        sizes = checked_shape(self, shape, row_order)
        one, _ = checked_part(sizes, layout)
        if len(one) < 2:
            raise ConfigError(f"{self} needs a weight of at least 2 axes, not `shape` (={sizes}); use Unstructured()")
        inner = BlockUnits.of(one, self.height, self.width)
        return inner if one == sizes else PartUnits.of(sizes, layout, inner)

    def remark(self, shape: Sequence[int], layout: Layout = LINEAR) -> str | None:
        """Names partial border blocks."""
        rows, columns = checked_part(tuple(shape), layout)[0][:2]
        if rows % self.height == 0 and columns % self.width == 0:
            return None
        return f"{self} leaves partial border blocks on {rows}x{columns}: the element count may differ from K"


def checked_shape(pattern: Pattern, shape: Sequence[int], row_order: Tensor | None) -> tuple[int, ...]:
    """The shape as a tuple; raise ConfigError when it is empty or a row order is given to a pattern without one."""
    if row_order is not None:
        raise ConfigError(f"{pattern} has no row order; give `row_order` to SharedSupport only")
    if len(shape) == 0 or 0 in shape:
        raise ConfigError(f"{pattern} needs a non-empty weight of at least 1 axis, not `shape` (={tuple(shape)})")
    return tuple(int(size) for size in shape)


def checked_part(shape: tuple[int, ...], layout: Layout) -> tuple[tuple[int, ...], Layout]:
    """Shape and layout of one part of a weight; the weight itself where it has no parts."""
    if layout.blocks == 1 and not layout.batch:
        return shape, layout
    layout.matrix_shape(shape)
    return layout.part(shape)


def checked_axis(axis: int, shape: tuple[int, ...]) -> int:
    """The axis counted from 0; raise ConfigError when the shape lacks it."""
    if isinstance(axis, bool) or not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
        raise ConfigError(f"`axis` (={axis!r}) does not exist in `shape` (={shape}); choose one below {len(shape)}")
    return axis % len(shape)


def check_bool(mask: Tensor) -> None:
    """Raise ConfigError unless the tensor is boolean."""
    if mask.dtype != torch.bool:
        raise ConfigError(f"`mask` of `dtype` (={mask.dtype}) must be torch.bool, True = alive; use mask.bool()")
