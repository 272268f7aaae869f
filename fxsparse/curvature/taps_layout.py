"""Where the samples lie in a tensor: along one axis, alone or together with positions."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


class Order(enum.Enum):
    """How samples and positions share an axis of length N k.

    Attributes:
        SAMPLES_FIRST: index = sample * k + position; k = 1 for samples alone.
        POSITIONS_FIRST: index = position * N + sample.
    """

    SAMPLES_FIRST = 0
    POSITIONS_FIRST = 1


@dataclass(frozen=True)
class Layout:
    """The samples lie along `axis`, in that order."""

    axis: int
    order: Order = Order.SAMPLES_FIRST

    def fits(self, size: int, samples: int) -> bool:
        """Whether an axis of this size can hold the samples."""
        return size > 0 and size % samples == 0

    def unfold(self, x: Tensor, samples: int) -> Tensor:
        """[N, k, other axes of x in their order...]."""
        x = x.movedim(self.axis, 0)
        if self.order is Order.SAMPLES_FIRST:
            return x.reshape(samples, -1, *x.shape[1:])
        return x.reshape(-1, samples, *x.shape[1:]).transpose(0, 1)

    def rows(self, x: Tensor, samples: int) -> Tensor:
        """[N, T, features]: the last axis holds features, all the others but the samples' become positions."""
        if x.ndim in (2, 3) and x.shape[0] == samples and self.axis == 0:
            return x.unsqueeze(1) if x.ndim == 2 else x
        return self.unfold(x, samples).reshape(samples, -1, x.shape[-1])


def candidates(shape: tuple[int, ...], axes: Iterable[int], samples: int) -> list[Layout]:
    """Every way in which the samples can lie along one of the axes of a tensor of that shape."""
    found = []
    for axis in axes:
        if shape[axis] % samples or not shape[axis]:
            continue
        found.append(Layout(axis))
        if shape[axis] > samples:
            found.append(Layout(axis, Order.POSITIONS_FIRST))
    return sorted(found, key=lambda layout: (shape[layout.axis] != samples, layout.axis, layout.order.value))


def consistent(layout: Layout, support: Tensor, samples: int, n: int) -> bool:
    """Whether what depends on sample n alone lies at sample n.

    Args:
        layout: the guess.
        support: where the gradient of sample n is not zero (bool).
        samples: their number.
        n: the sample.
    """
    by_sample = layout.unfold(support, samples).flatten(1).any(1)
    by_sample[n] = False
    return not bool(by_sample.any())
