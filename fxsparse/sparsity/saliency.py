"""Saliencies: a score per element, higher = keep."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.random import generator as keyed_generator
from fxsparse.sparsity.random import random_scores
from fxsparse.sparsity.units import Pooling


@dataclass(frozen=True, eq=False)
class Given:
    """What a saliency reads, detached and in at least float32.

    Attributes:
        w: The weight.
        g: The mean gradient; empty where the saliency does not need it.
        x: Norms of the inputs; empty where the saliency does not need them.
        generator: Source of random scores, or None.
    """

    w: Float[Tensor, "*shape"]
    g: Float[Tensor, "*batch_and_shape"]
    x: Float[Tensor, "*shape"]
    generator: Generator | None


@dataclass(frozen=True)
class Saliency(abc.ABC):
    """A score per element, its `formula`; `pooling` says how the scores of a shared position combine."""

    pooling: ClassVar[Pooling] = Pooling.RMS
    needs_gradient: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    needs_scale: ClassVar[bool] = False
    """Whether the gradient's size counts, not only its order: in training it is then read unscaled and clipped."""
    reads_weight: ClassVar[bool] = True
    """Whether the weight's values count, not only its shape."""
    elementwise: ClassVar[bool] = False
    """Whether a score depends on its own entry of weight and gradient alone, so that it can be made part by part."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        """A class with a formula of its own says anew what that reads."""
        super().__init_subclass__(**kwargs)
        if "formula" in vars(cls):
            cls.reads_weight = vars(cls).get("reads_weight", True)
            cls.elementwise = vars(cls).get("elementwise", False)

    @abc.abstractmethod
    def formula(self, given: Given) -> Float[Tensor, "*shape"]:
        """The scores, from what `score` has checked."""

    def score(
        self,
        weight: Float[Tensor, "*shape"],
        gradient: Float[Tensor, "*batch_and_shape"] | None = None,
        generator: Generator | None = None,
        inputs: Float[Tensor, "*shape"] | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Scores of the weight's shape, at least float32, on the weight's device; nothing is changed.

        Args:
            weight: The parameter.
            gradient: Mean gradient of the loss over all calibration samples, dead positions included.
            generator: Source of random scores.
            inputs: Euclidean norm, over calibration samples and positions, of the input that each element multiplies.

        Raises:
            ConfigError: a gradient or input norms are needed and missing, or of another shape.
        """
        none = weight.new_empty(0)
        g = self._needed(weight, "gradient", gradient, "a backward pass") if self.needs_gradient else none
        x = self._needed(weight, "inputs", inputs, "forward passes") if self.needs_inputs else none
        return self.formula(Given(_wide(weight), _wide(g), _wide(x), generator))

    def _fits(self, found: torch.Size, weight: torch.Size) -> bool:
        return found == weight

    def _needed(self, weight: Tensor, name: str, found: Tensor | None, run: str) -> Tensor:
        if found is None:
            raise ConfigError(f"{self} needs `{name}` (=None); run {run} on calibration data")
        if not self._fits(found.shape, weight.shape):
            raise ConfigError(
                f"`{name}` of shape (={tuple(found.shape)}) must have the shape of the weight (={tuple(weight.shape)})"
            )
        return found


@dataclass(frozen=True)
class Magnitude(Saliency):
    """|w| (Han et al. 2015)."""

    elementwise: ClassVar[bool] = True

    def formula(self, given: Given) -> Tensor:
        """|w|."""
        return given.w.abs()


@dataclass(frozen=True)
class Gradient(Saliency):
    """|g|, the absolute value of the mean gradient, never the mean of absolute values (arXiv 1911.11134)."""

    needs_gradient: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True

    def formula(self, given: Given) -> Tensor:
        """|g|."""
        return given.g.abs()


@dataclass(frozen=True)
class MagnitudeAndGradient(Saliency):
    """|w| + factor |g| (arXiv 2110.14032).

    Attributes:
        factor: Lambda, at least 0.
    """

    factor: float = 1.0
    needs_gradient: ClassVar[bool] = True
    needs_scale: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.factor >= 0:
            raise ConfigError(f"`factor` (={self.factor}) must be at least 0")

    def formula(self, given: Given) -> Tensor:
        """|w| + factor |g|."""
        return given.w.abs() + self.factor * given.g.abs()


@dataclass(frozen=True)
class Taylor(Saliency):
    """|w g|, or mean_b (w g_b)^2 when squared (Molchanov et al., arXiv 1611.06440, 1906.10771).

    Attributes:
        squared: Average the squares over batches; the gradient may then have a leading batch axis [B, *shape].
    """

    squared: bool = False
    pooling: ClassVar[Pooling] = Pooling.MEAN
    needs_gradient: ClassVar[bool] = True

    def _fits(self, found: torch.Size, weight: torch.Size) -> bool:
        return found == weight or (self.squared and found[1:] == weight)

    def formula(self, given: Given) -> Tensor:
        """|w g| or mean_b (w g_b)^2."""
        product = given.w * given.g
        if not self.squared:
            return product.abs()
        square = product * product
        return square.mean(0) if square.ndim > given.w.ndim else square


@dataclass(frozen=True)
class Wanda(Saliency):
    """|w| times the norm of the input that the weight multiplies (Sun et al., arXiv 2306.11695)."""

    needs_inputs: ClassVar[bool] = True

    def formula(self, given: Given) -> Tensor:
        """|w| ||x||."""
        return given.w.abs() * given.x


@dataclass(frozen=True)
class Random(Saliency):
    """U(0, 1) in float64.

    Attributes:
        seed: Seed of the draw when `score` gets no generator; every weight then gets the same stream.
    """

    seed: int = 0
    pooling: ClassVar[Pooling] = Pooling.MEAN

    def formula(self, given: Given) -> Tensor:
        """Draws of the weight's shape, made on the CPU."""
        source = keyed_generator(self.seed, 0, 0, "saliency") if given.generator is None else given.generator
        return random_scores(given.w.shape, source).to(given.w.device)


SALIENCIES = (Magnitude, Gradient, MagnitudeAndGradient, Taylor, Wanda, Random)


def _wide(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to(torch.promote_types(detached.dtype, torch.float32))
