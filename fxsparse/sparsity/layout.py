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
    """

    out_axis: int = 0
    in_axis: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        if self.out_axis < 0 or self.in_axis < 0 or self.out_axis == self.in_axis:
            raise ConfigError(
                f"`out_axis` (={self.out_axis}) and `in_axis` (={self.in_axis}) must be two axes, counted from 0"
            )
        if self.groups < 1:
            raise ConfigError(f"`groups` (={self.groups}) must be at least 1")

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
            ConfigError: the weight has too few axes, is empty, or its input axis does not divide into `groups`.
        """
        if len(shape) <= max(self.out_axis, self.in_axis):
            raise ConfigError(
                f"`shape` (={tuple(shape)}) has no axis {max(self.out_axis, self.in_axis)}: rows and positions need a "
                "weight of at least 2 axes; use Unstructured() here"
            )
        if 0 in shape:
            raise ConfigError(f"`shape` (={tuple(shape)}) is empty; leave this weight out")
        rows, inputs, split = shape[self.out_axis], shape[self.in_axis], self._split
        if inputs % split:
            raise ConfigError(f"axis {self.in_axis} (={inputs}) must be divisible by `groups` (={split})")
        return rows * split, inputs // split, math.prod(shape) // (rows * inputs)

    def to_rows(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "rows inputs kernel"]:
        """View (or copy) a weight-shaped tensor as a matrix of rows; row order: group, then output."""
        rows, inputs, kernel = self.matrix_shape(tensor.shape)
        split = self._split
        moved = tensor.movedim((self.out_axis, self.in_axis), (0, 1))
        if split > 1:
            moved = moved.reshape(rows // split, split, inputs, *moved.shape[2:]).movedim(1, 0)
        return moved.reshape(rows, inputs, kernel)

    def from_rows(self, rows: Shaped[Tensor, "rows inputs kernel"], shape: Sequence[int]) -> Shaped[Tensor, "*shape"]:
        """Inverse of `to_rows`; contiguous."""
        split = self._split
        out, inputs = shape[self.out_axis], shape[self.in_axis]
        rest = [size for axis, size in enumerate(shape) if axis not in (self.out_axis, self.in_axis)]
        moved = rows.reshape(split, out, inputs // split, *rest).movedim(0, 1).reshape(out, inputs, *rest)
        return moved.movedim((0, 1), (self.out_axis, self.in_axis)).contiguous()

    @property
    def _split(self) -> int:
        return self.groups if self.in_axis < self.out_axis else 1


LINEAR = Layout.linear()
