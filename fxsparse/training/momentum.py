"""The smoothed dense gradient of every weight, kept as the optimizer keeps its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_fraction
from fxsparse.training.drop_grow import DropGrow
from fxsparse.training.saved_state import check_tensor
from fxsparse.training.state import WeightState

_EPSILON = 1e-8


@dataclass(frozen=True)
class Smoothed(DropGrow):
    """Drop and grow with m, the smoothed dense gradient, at hand.

    m is the optimizer's momentum buffer where it has one, Adam's m / (sqrt(v) + 1e-8) where it has `betas`, else an
    average with decay `beta`. G is collected at every step, and one or two tensors of each weight's size are kept.

    Attributes:
        beta: Decay of m for optimizers without momentum, in [0, 1].
    """

    beta: float = 0.9

    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.beta, "beta")

    def watches(self, step: int) -> bool:
        """Every step until the last update."""
        return self.end is None or step < self.end

    def remember(self, state: WeightState) -> Mapping[str, Tensor]:
        """m, and v for Adam, as their optimizers average them."""
        assert state.gradient is not None
        g = state.factor * state.gradient.to(torch.promote_types(state.gradient.dtype, torch.float32))
        old = state.memory
        if "betas" in state.options:
            first, second = (float(beta) for beta in state.options["betas"][:2])
            m, v = old.get("m", torch.zeros_like(g)), old.get("v", torch.zeros_like(g))
            return {"m": first * m + (1 - first) * g, "v": second * v + (1 - second) * g * g}
        momentum = float(state.options.get("momentum", 0))
        if not momentum:
            return {"m": self.beta * old.get("m", torch.zeros_like(g)) + (1 - self.beta) * g}
        damped = 1 - float(state.options.get("dampening", 0))
        return {"m": momentum * old["m"] + damped * g if "m" in old else g}

    def check_memory(
        self, step: int, memory: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, torch.Size]
    ) -> None:
        """After the first step there is an m, and every m and v has the shape of its weight."""
        kind = type(self).__name__
        if step > 0 and self.watches(1) and not any("m" in each for each in memory.values()):
            raise ConfigError(f"`memory` of the state lacks the averaged gradients that {kind} keeps; save it whole")
        for name, each in memory.items():
            for key, kept in each.items():
                check_tensor(f"memory[{name}][{key}]", kept, shapes[name])


def smooth_of(state: WeightState) -> Float[Tensor, "*shape"]:
    """|m|, divided by sqrt(v) + 1e-8 where there is a v; zeros where no gradient has ever reached the weight."""
    m = state.memory.get("m")
    if m is None:
        return torch.zeros_like(state.weight, dtype=torch.float32)
    return m.abs() / (state.memory["v"].sqrt() + _EPSILON) if "v" in state.memory else m.abs()


def mean_smooth(state: WeightState) -> float:
    """The mean of `smooth_of` over the alive weights; 0 where there are none."""
    return float(smooth_of(state)[state.mask].double().sum()) / max(1, int(state.mask.sum()))
