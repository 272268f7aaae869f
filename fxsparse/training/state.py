"""One weight as a method sees it at a mask update."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from fxsparse.sparsity.layout import Layout
from fxsparse.sparsity.pattern import Pattern
from fxsparse.sparsity.random import generator, random_scores
from fxsparse.sparsity.saliency import Saliency
from fxsparse.sparsity.units import Units


@dataclass(frozen=True, eq=False)
class WeightState:
    """What a method may read of one weight; nothing here is written.

    Attributes:
        name: Name of the parameter.
        index: Its position in the model's order, part of the key of every draw.
        step: Completed optimizer steps.
        update: Number of the mask update, from 1 on, part of the key of every draw.
        seed: The method's seed.
        weight: The weight after the optimizer step, detached.
        mask: Its mask, bool, True = alive.
        pattern: Its legal masks.
        layout: Its output and input axes.
        row_order: The row order of a `SharedSupport` mask, or None.
        gradient: G = dL/dW for every position, dead ones included, averaged over ranks and unclipped; None where the
            method does not ask for it.
        step_gradient: What the optimizer was given: masked, unscaled, clipped.
    """

    name: str
    index: int
    step: int
    update: int
    seed: int
    weight: Float[Tensor, "*shape"]
    mask: Bool[Tensor, "*shape"]
    pattern: Pattern
    layout: Layout = Layout()
    row_order: Tensor | None = None
    gradient: Float[Tensor, "*shape"] | None = None
    step_gradient: Float[Tensor, "*shape"] | None = None

    @cached_property
    def units(self) -> Units:
        """The weight as segments of units that live or die as wholes."""
        return self.pattern.units(tuple(self.weight.shape), self.layout, self.row_order)

    @cached_property
    def alive(self) -> Bool[Tensor, "segments width"]:
        """Which units are alive."""
        return self.units.collect(self.mask)

    def scores(self, saliency: Saliency) -> Shaped[Tensor, "segments width"]:
        """The saliency of every unit.

        Raises:
            ConfigError: the saliency needs a gradient and the method did not ask for one.
            DataError: a score is NaN.
        """
        return self.units.pool(self.element_scores(saliency), saliency.pooling)

    def element_scores(self, saliency: Saliency) -> Shaped[Tensor, "*shape"]:
        """The saliency of every element."""
        return saliency.score(self.weight, self.gradient, self.generator("saliency"))

    def draws(self, purpose: str) -> Float[Tensor, "segments width"]:
        """Float64 draws of U(0, 1) for every unit; their top-k is a random k-subset."""
        return random_scores((self.units.segments, self.units.width), self.generator(purpose)).to(self.weight.device)

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator that depends on nothing but seed, weight, update and purpose."""
        return generator(self.seed, self.index, self.update, purpose)
