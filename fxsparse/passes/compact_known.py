"""What is known of a value whatever the input is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxsparse.graph.channels_flow import shape_of


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a value.

    Attributes:
        stored: the numbers, broadcastable to the value's shape; anything where they are not known.
        known: bool, of the same shape.
        static: whether it is made of parameters only; its shape is the whole one then, and `stored` may be a parameter
            itself, in its own precision.
    """

    stored: Tensor
    known: Tensor
    static: bool = False

    @property
    def value(self) -> Tensor:
        """The numbers, in float64 where they are floating."""
        return self.stored.double() if self.static and self.stored.is_floating_point() else self.stored

    @property
    def zero(self) -> Tensor:
        """Where it is known to be 0."""
        return self.known & (self.value == 0)


def get(node: Any, found: Mapping[fx.Node, Known]) -> Known | None:
    """What is known of an argument, or None."""
    return found.get(node) if isinstance(node, fx.Node) else None


def or_unknown(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known:
    """What is known of a value; a description that says nothing where that is nothing."""
    if node in found:
        return found[node]
    shape = (1,) * len(shape_of(node))
    dtype = torch.float64 if node.meta["dtype"].is_floating_point else node.meta["dtype"]
    return Known(torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=torch.bool))


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The common shape of shapes of one rank or less."""
    return tuple(torch.broadcast_shapes(*(tuple(shape) for shape in shapes)))  # type: ignore[no-untyped-call]  # torch
