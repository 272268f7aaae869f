"""Which axes of a weight are outputs and inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor

from fxsparse.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """The axes of a weight, so that patterns can speak of rows (output units) and positions (their inputs).

    Attributes:
        out_axis: Axis of the outputs.
        in_axis: Axis of the inputs.
        groups: Groups of a grouped convolution. In a convolution the input axis is already per group; in a transposed
            one (`in_axis` 0) it runs over all groups, and every group has `shape[out_axis]` output units of its own.
        blocks: Equal blocks along `out_axis` that are weights of their own, as q, k and v in one projection.
        batch: Axes along which every index is a weight of its own, as the experts of a mixture; ascending.
    """

    out_axis: int = 0
    in_axis: int = 1
    groups: int = 1
    blocks: int = 1
    batch: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.out_axis < 0 or self.in_axis < 0 or self.out_axis == self.in_axis:
            raise ConfigError(
                f"`out_axis` (={self.out_axis}) and `in_axis` (={self.in_axis}) must be two axes, counted from 0"
            )
        for name in ("groups", "blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` (={getattr(self, name)}) must be at least 1")
        taken = {self.out_axis, self.in_axis}
        if taken & set(self.batch) or list(self.batch) != sorted({axis for axis in self.batch if axis >= 0}):
            raise ConfigError(f"`batch` (={self.batch}) must be ascending axes other than `out_axis` and `in_axis`")
        if self.groups > 1 and (self.blocks > 1 or self.batch):
            raise ConfigError(f"`groups` (={self.groups}) must be 1 in a weight with `blocks` or `batch`")

    @staticmethod
    def linear() -> Layout:
        """Weight (out, in) of a linear layer."""
        return Layout()

    @staticmethod
    def conv(groups: int = 1) -> Layout:
        """Weight (out, in / groups, *kernel) of a convolution."""
        return Layout(0, 1, groups)

    @staticmethod
    def conv_transpose(groups: int = 1) -> Layout:
        """Weight (in, out / groups, *kernel) of a transposed convolution."""
        return Layout(1, 0, groups)

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return (rows, inputs, kernel): output units, input channels that each one reads, kernel offsets.

        Raises:
            ConfigError: the weight has too few axes, is empty, or an axis does not divide into `groups` or `blocks`.
        """
        last = max(self.out_axis, self.in_axis, *self.batch)
        if len(shape) <= last:
            raise ConfigError(
                f"`shape` (={tuple(shape)}) has no axis {last}: rows and positions need a weight of at least "
                f"{last + 1} axes; use Unstructured() here"
            )
        if 0 in shape:
            raise ConfigError(f"`shape` (={tuple(shape)}) is empty; leave this weight out")
        rows, inputs, split = shape[self.out_axis], shape[self.in_axis], self._split
        if inputs % split:
            raise ConfigError(f"axis {self.in_axis} (={inputs}) must be divisible by `groups` (={split})")
        if rows % self.blocks:
            raise ConfigError(f"axis {self.out_axis} (={rows}) must be divisible by `blocks` (={self.blocks})")
        apart = math.prod(shape[axis] for axis in self.batch)
        return apart * rows * split, inputs // split, math.prod(shape) // (apart * rows * inputs)

    def parts(self, shape: Sequence[int]) -> int:
        """Number of weights of their own in a weight of `shape`: its blocks times the indices of its batch axes."""
        return self.blocks * math.prod(shape[axis] for axis in self.batch)

    def part(self, shape: Sequence[int]) -> tuple[tuple[int, ...], Layout]:
        """Shape and layout of one of the parts: batch axes gone, one block."""
        kept = [axis for axis in range(len(shape)) if axis not in self.batch]
        sizes = tuple(shape[axis] // (self.blocks if axis == self.out_axis else 1) for axis in kept)
        return sizes, Layout(kept.index(self.out_axis), kept.index(self.in_axis), self.groups)

    def to_parts(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, " parts *part"]:
        """View (or copy) a weight-shaped tensor as its parts: batch indices first, then blocks."""
        moved = tensor.movedim(self.batch, tuple(range(len(self.batch))))
        axis = len(self.batch) + self.part(tensor.shape)[1].out_axis
        sizes = moved.shape
        split = moved.reshape(*sizes[:axis], self.blocks, -1, *sizes[axis + 1 :]).movedim(axis, len(self.batch))
        return split.flatten(0, len(self.batch))

    def from_parts(self, parts: Shaped[Tensor, " parts *part"], shape: Sequence[int]) -> Shaped[Tensor, "*shape"]:
        """Inverse of `to_parts`; contiguous."""
        apart = [shape[axis] for axis in self.batch]
        axis = len(apart) + self.part(shape)[1].out_axis
        split = parts.reshape(*apart, self.blocks, *parts.shape[1:]).movedim(len(apart), axis)
        return split.flatten(axis, axis + 1).movedim(tuple(range(len(apart))), self.batch).contiguous()

    def to_rows(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "rows inputs kernel"]:
        """View (or copy) a weight-shaped tensor as a matrix of rows; row order: batch, then group, then output."""
        rows, inputs, kernel = self.matrix_shape(tensor.shape)
        split, lead = self._split, len(self.batch)
        axes = (*self.batch, self.out_axis, self.in_axis)
        moved = tensor.movedim(axes, tuple(range(len(axes))))
        if split > 1:
            moved = moved.reshape(rows // split, split, inputs, *moved.shape[lead + 2 :]).movedim(1, 0)
        return moved.reshape(rows, inputs, kernel)

    def from_rows(self, rows: Shaped[Tensor, "rows inputs kernel"], shape: Sequence[int]) -> Shaped[Tensor, "*shape"]:
        """Inverse of `to_rows`; contiguous."""
        split = self._split
        axes = (*self.batch, self.out_axis, self.in_axis)
        lead = [shape[axis] for axis in axes[:-1]]
        inputs = shape[self.in_axis]
        rest = [size for axis, size in enumerate(shape) if axis not in axes]
        moved = rows.reshape(split, *lead, inputs // split, *rest).movedim(0, len(lead)).reshape(*lead, inputs, *rest)
        return moved.movedim(tuple(range(len(axes))), axes).contiguous()

    @property
    def _split(self) -> int:
        return self.groups if self.in_axis < self.out_axis else 1


LINEAR = Layout.linear()
