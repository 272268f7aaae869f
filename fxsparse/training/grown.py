"""The values that newly grown weights start from."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class GrownValue(abc.ABC):
    """A rule for the first value of a weight that was dead before an update and is alive after it."""

    needs_gradient: ClassVar[bool] = False

    @abc.abstractmethod
    def values(self, state: WeightState, new: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Values of the weight's shape, read where `new` is True only.

        Args:
            state: The weight before the update.
            new: The newly grown positions.
        """


@dataclass(frozen=True)
class Zero(GrownValue):
    """0: the loss is the same before and after the update."""

    def values(self, state: WeightState, new: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(state.weight)


@dataclass(frozen=True)
class Normal(GrownValue):
    """N(0, std^2), drawn on the CPU.

    Attributes:
        std: Standard deviation, positive.
    """

    std: float

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ConfigError(f"`std` (={self.std}) must be positive; use Zero() for zeros")

    def values(self, state: WeightState, new: Tensor) -> Tensor:
        """Normal draws."""
        drawn = torch.randn(state.weight.shape, dtype=torch.float64, generator=state.generator("grown"), device="cpu")
        return (self.std * drawn).to(state.weight)


@dataclass(frozen=True)
class MeanUniform(GrownValue):
    """U(-a, a) for a = the mean of |w| over the weights alive before the update, drawn on the CPU."""

    def values(self, state: WeightState, new: Tensor) -> Tensor:
        """Uniform draws; zeros in a weight that was dead as a whole."""
        bound = state.weight[state.mask].double().abs().mean().nan_to_num()
        drawn = torch.rand(state.weight.shape, dtype=torch.float64, generator=state.generator("grown"), device="cpu")
        return ((2 * drawn - 1).to(bound.device) * bound).to(state.weight)


@dataclass(frozen=True)
class NegativeGradient(GrownValue):
    """-gamma c G, where c is the factor by which loss scaling and clipping changed the alive gradients of this step.

    Attributes:
        gamma: Positive; the learning rate makes it one step of plain SGD.
    """

    gamma: float
    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ConfigError(f"`gamma` (={self.gamma}) must be positive; use Zero() for zeros")

    def values(self, state: WeightState, new: Tensor) -> Tensor:
        """Scaled gradients."""
        if state.gradient is None:
            raise ConfigError(f"{self} needs the gradient of `{state.name}`; use it with a method that collects it")
        return (-self.gamma * state.factor * state.gradient).to(state.weight)
