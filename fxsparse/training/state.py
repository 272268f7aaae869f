"""One weight as a method sees it at a mask update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from fxsparse.sparsity.counts import Target
from fxsparse.sparsity.distribution import WeightSpec
from fxsparse.sparsity.layout import Layout
from fxsparse.sparsity.pattern import Pattern
from fxsparse.sparsity.random import generator, random_scores
from fxsparse.sparsity.saliency import Saliency
from fxsparse.sparsity.shared_support import SupportUnits
from fxsparse.sparsity.units import Pooling, Units


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
        factor: By what loss scaling and clipping changed the alive gradients of this step: `factor * gradient` is the
            dense form of `step_gradient`.
        inputs: Norms of the inputs that each element multiplies, where calibration data gave them.
        memory: What the method's `remember` returned after the last step, by name.
        explored: Which elements were ever alive, or None where nobody counts.
        target: What the weight was meant to keep when the method was attached.
        options: The optimizer's settings for this weight (`lr`, `momentum`, `betas`, ...).
        last: Whether it is the last masked weight of the model.
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
    factor: float = 1.0
    inputs: Float[Tensor, "*shape"] | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    explored: Bool[Tensor, "*shape"] | None = None
    target: Target | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    last: bool = False

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.weight.device

    @property
    def has_gradient(self) -> bool:
        """Whether there is a G."""
        return self.gradient is not None

    @property
    def spec(self) -> WeightSpec:
        """The weight as distributions see it."""
        return WeightSpec(self.name, tuple(self.shape), self.layout, self.pattern)

    def replaced(self, **changes: Any) -> Self:
        """A new state with other values of these attributes."""
        return replace(self, **changes)

    @cached_property
    def units(self) -> Units:
        """The weight as segments of units that live or die as wholes."""
        return self.pattern.units(tuple(self.shape), self.layout, self.row_order)

    @cached_property
    def alive(self) -> Bool[Tensor, "segments width"]:
        """Which units are alive."""
        return self.units.collect(self.mask)

    def scores(self, saliency: Saliency) -> Shaped[Tensor, "segments width"]:
        """The saliency of every unit.

        Raises:
            ConfigError: the saliency needs a gradient or input norms that nobody collected.
            DataError: a score is NaN.
        """
        units, gradient = self.units, self.gradient if saliency.needs_gradient else None
        fits = gradient.shape == self.shape if gradient is not None else not saliency.needs_gradient
        if not (saliency.elementwise and isinstance(units, SupportUnits) and fits):
            return units.pool(self.element_scores(saliency), saliency.pooling)
        factor = self.factor if saliency.needs_scale and gradient is not None else 1.0

        def scores(weight: Tensor, *gradients: Tensor) -> Tensor:
            own = gradients[0] if gradients else None
            return saliency.score(weight, own if own is None or factor == 1.0 else factor * own)

        given = self._read(saliency), *(() if gradient is None else (gradient,))
        return units.pool_made(scores, given, saliency.pooling)

    def element_scores(self, saliency: Saliency) -> Shaped[Tensor, "*shape"]:
        """The saliency of every element."""
        inputs = {"inputs": self.inputs} if saliency.needs_inputs else {}
        gradient = self.gradient if saliency.needs_gradient else None
        if saliency.needs_scale and gradient is not None and self.factor != 1.0:
            gradient = self.factor * gradient
        return saliency.score(self._read(saliency), gradient, self.generator("saliency"), **inputs)

    def _read(self, saliency: Saliency) -> Tensor:
        """The weight; where only its shape counts, without values."""
        if saliency.reads_weight:
            return self.weight
        return torch.zeros((), device=self.device).expand(self.shape)

    def pooled(self, scores: Shaped[Tensor, "*shape"], pooling: Pooling = Pooling.RMS) -> Shaped[Tensor, "segments u"]:
        """The score of every unit from scores of elements."""
        return self.units.pool(scores, pooling)

    def draws(self, purpose: str) -> Float[Tensor, "segments width"]:
        """Float64 draws of U(0, 1) for every unit; their top-k is a random k-subset."""
        return random_scores((self.units.segments, self.units.width), self.generator(purpose)).to(self.device)

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator that depends on nothing but seed, weight, update and purpose."""
        return generator(self.seed, self.index, self.update, purpose)
