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


@dataclass(frozen=True)
class Saliency(abc.ABC):
    """A score per element; `pooling` says how the scores of a shared position combine."""

    pooling: ClassVar[Pooling]
    needs_gradient: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False

    @abc.abstractmethod
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


@dataclass(frozen=True)
class Magnitude(Saliency):
    """|w| (Han et al. 2015)."""

    pooling: ClassVar[Pooling] = Pooling.RMS

    def score(
        self,
        weight: Tensor,
        gradient: Tensor | None = None,
        generator: Generator | None = None,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """|w|."""
        return _wide(weight).abs()


@dataclass(frozen=True)
class Gradient(Saliency):
    """|g|, the absolute value of the mean gradient, never the mean of absolute values (arXiv 1911.11134)."""

    pooling: ClassVar[Pooling] = Pooling.RMS
    needs_gradient: ClassVar[bool] = True

    def score(
        self,
        weight: Tensor,
        gradient: Tensor | None = None,
        generator: Generator | None = None,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """|g|."""
        return _wide(_given(self, weight, gradient)).abs()


@dataclass(frozen=True)
class Taylor(Saliency):
    """|w g|, or mean_b (w g_b)^2 when squared (Molchanov et al., arXiv 1611.06440, 1906.10771).

    Attributes:
        squared: Average the squares over batches; the gradient may then have a leading batch axis [B, *shape].
    """

    squared: bool = False
    pooling: ClassVar[Pooling] = Pooling.MEAN
    needs_gradient: ClassVar[bool] = True

    def score(
        self,
        weight: Tensor,
        gradient: Tensor | None = None,
        generator: Generator | None = None,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """|w g| or mean_b (w g_b)^2."""
        product = _wide(weight) * _wide(_given(self, weight, gradient, batches=self.squared))
        if not self.squared:
            return product.abs()
        square = product * product
        return square.mean(0) if square.ndim > weight.ndim else square


@dataclass(frozen=True)
class Wanda(Saliency):
    """|w| times the norm of the input that the weight multiplies (Sun et al., arXiv 2306.11695)."""

    pooling: ClassVar[Pooling] = Pooling.RMS
    needs_inputs: ClassVar[bool] = True

    def score(
        self,
        weight: Tensor,
        gradient: Tensor | None = None,
        generator: Generator | None = None,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """|w| ||x||."""
        if inputs is None:
            raise ConfigError(f"{self} needs the norms of the `inputs` (=None); run forward passes on calibration data")
        if inputs.shape != weight.shape:
            raise ConfigError(
                f"`inputs` of shape (={tuple(inputs.shape)}) must have the shape of the weight (={tuple(weight.shape)})"
            )
        return _wide(weight).abs() * _wide(inputs)


@dataclass(frozen=True)
class Random(Saliency):
    """U(0, 1) in float64.

    Attributes:
        seed: Seed of the draw when `score` gets no generator; every weight then gets the same stream.
    """

    seed: int = 0
    pooling: ClassVar[Pooling] = Pooling.MEAN

    def score(
        self,
        weight: Tensor,
        gradient: Tensor | None = None,
        generator: Generator | None = None,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Draws of the weight's shape, made on the CPU."""
        source = keyed_generator(self.seed, 0, 0, "saliency") if generator is None else generator
        return random_scores(weight.shape, source).to(weight.device)


SALIENCIES = (Magnitude, Gradient, Taylor, Wanda, Random)


def _wide(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to(torch.promote_types(detached.dtype, torch.float32))


def _given(saliency: Saliency, weight: Tensor, gradient: Tensor | None, batches: bool = False) -> Tensor:
    if gradient is None:
        raise ConfigError(f"{saliency} needs a `gradient` (={gradient}); run a backward pass on calibration data")
    fits = gradient.shape == weight.shape or (batches and gradient.shape[1:] == weight.shape)
    if not fits:
        raise ConfigError(
            f"`gradient` of shape (={tuple(gradient.shape)}) must have the shape of the weight (={tuple(weight.shape)})"
        )
    return gradient
