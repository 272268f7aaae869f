"""G of a weight in alive-only storage, made when somebody reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fxsparse.nn import MaskedWeight, Product

Summands = tuple[Tensor | Product, ...]
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class PackedGradient:
    """The sum over backward passes of what reached the alive entries and what the mask hid from the others.

    Read it before the mask changes. `dense` gives the bits that the sum of dense gradients has.

    Attributes:
        weight: The weight, whose index says where the alive entries are.
        alive: The sum of the parameter's own gradients, stored as the parameter is.
        folded: What dead entries of the first passes sum to, dense; alive entries hold anything.
        passes: What dead entries of each later pass are the sum of.
    """

    weight: MaskedWeight
    alive: Float[Tensor, "groups rows k ..."]
    folded: Tensor | None = None
    passes: tuple[Summands, ...] = ()

    @staticmethod
    def of(weight: MaskedWeight, alive: Tensor, hidden: Summands) -> PackedGradient:
        """Of one backward pass, from what reached the parameter and what the mask hid."""
        return PackedGradient(weight, alive.clone(), passes=(hidden,))._small()

    def plus(self, alive: Tensor, hidden: Summands) -> PackedGradient:
        """With one more backward pass."""
        return replace(self, alive=self.alive + alive, passes=(*self.passes, hidden))._small()

    def dense(self) -> Float[Tensor, "*shape"]:
        """G for every position, in a new tensor."""
        dead = self._dead()
        dense = dead.clone() if dead is self.folded else dead.contiguous()
        self.weight.write_alive_(dense, self.alive)
        return dense

    def is_finite(self) -> bool:
        """Whether all of G is finite; made only where the sizes of the factors do not tell."""
        if not all_finite(self.alive):
            return False
        bound = sum((_bound(each) for one in self.passes for each in one), _bound(self.folded))
        return bound < torch.finfo(self.alive.dtype).max / 2 or all_finite(self.dense())

    def _small(self) -> PackedGradient:
        """The same; what has outgrown the dense gradient becomes one."""
        held = sum(each.numel if isinstance(each, Product) else each.numel() for one in self.passes for each in one)
        return replace(self, folded=self._dead(), passes=()) if held > self.weight.shape.numel() else self

    def _dead(self) -> Tensor:
        """The sum at dead entries; alive ones hold anything."""
        total = self.folded
        for hidden in self.passes:
            if not hidden:
                continue
            found = _made(hidden[0])
            for each in hidden[1:]:
                found = found + _made(each)
            found = found + 0.0 if found is hidden[0] else found.add_(0.0)  # the parameter's own gradient there
            total = found if total is None else total + found
        return self.alive.new_zeros(self.weight.shape) if total is None else total


def _made(summand: Tensor | Product) -> Tensor:
    return summand.dense() if isinstance(summand, Product) else summand


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; without a copy where the sum tells."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _bound(summand: Tensor | Product | None) -> float:
    """What no entry, nor any partial sum of it, can exceed; infinite where nobody knows."""
    if summand is None:
        return 0.0
    if isinstance(summand, Tensor):
        return _largest(summand)
    if any(each.dtype not in _WIDE for each in (summand.input, summand.gradient)):
        return math.inf  # roundings add up
    terms = summand.gradient.numel() / summand.shape[0]
    return terms * _largest(summand.input) * _largest(summand.gradient)


def _largest(tensor: Tensor) -> float:
    low, high = (float(each) for each in tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
    largest = max(-low, high)
    return math.inf if math.isnan(low) else largest
