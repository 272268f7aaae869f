"""The steps of theta: beside the optimizer, which must neither see nor move it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from fxsparse.nn import Mode, Resurrection
from fxsparse.nn.sharded import part, part_like
from fxsparse.training.resu import RESU
from fxsparse.training.resu_theta import State


class ThetaSteps:
    """Takes theta's gradient before an optimizer step and moves theta after it.

    Of weights that are spread over ranks every rank takes the whole step, so that its rule may mix positions, and its
    states are whole on each.

    Args:
        method: The method.
        optimizer: The optimizer, whose settings theta may follow.
        units: The weights, by name.

    Attributes:
        states: What theta's rule keeps of each weight in this phase, by name.
    """

    def __init__(self, method: RESU, optimizer: Optimizer, units: Mapping[str, Resurrection]) -> None:
        self.states: dict[str, State] = {}
        self._method, self._optimizer, self._units = method, optimizer, units
        self.clear()

    def clear(self) -> None:
        """Forget the step at hand."""
        self._taken: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}

    def take(self) -> dict[str, Tensor]:
        """T * G of every weight as the optimizer was given it, unscaled and clipped; uphill where it maximizes."""
        for name, unit in self._units.items():
            gradient = unit.weight.weight.grad
            if gradient is None or unit.mode is not Mode.RESU:
                continue
            dense = unit.weight.dense(gradient.to_dense() if gradient.is_sparse else gradient)
            scale = getattr(self._optimizer, "grad_scale", None)  # fused optimizers unscale by themselves
            taken = torch.where(unit.trainable, dense if scale is None else dense / scale, 0.0)
            self._taken[name] = -taken if self._options(unit).get("maximize", False) else taken
        return dict(self._taken)

    def hold(self) -> None:
        """Remember the weights where the optimizer could move what it must not: theta, or all of a frozen weight."""
        if not self._method.freeze_active or isinstance(self._optimizer, LBFGS):
            self._held = {name: part(unit.weight.weight).detach().clone() for name, unit in self._units.items()}

    def still(self) -> list[nn.Parameter]:
        """The parameters that the optimizer must not see in a phase."""
        own = {id(unit.weight.weight) for unit in self._units.values()}
        return [
            parameter
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if (self._method.freeze_active if id(parameter) in own else not self._method.train_rest)
        ]

    def step(self) -> None:
        """After the optimizer: put back what it moved of what was held, then take the step of theta's own rule."""
        for name, unit in self._units.items():
            weight, held = unit.weight, self._held.get(name)
            if held is not None:
                own, alive = part(weight.weight), part_like(weight.mask, weight.weight)
                own.copy_(held if self._method.freeze_active else torch.where(alive, own, held))
            taken = self._taken.get(name)
            if taken is not None and bool(unit.trainable.any()):
                state, rate = self.states.setdefault(name, {}), self._method.theta.rate(self._options(unit))
                values = weight.dense(weight.weight.detach())
                unit.write_theta_(self._method.theta.step(values, taken, unit.trainable, state, rate))

    def state_dict(self) -> dict[str, State]:
        """A copy of the states."""
        return {name: _copied(state) for name, state in self.states.items()}

    def load_state_dict(self, state_dict: Mapping[str, State]) -> None:
        """Set the states."""
        device = {name: unit.weight.weight.device for name, unit in self._units.items()}
        self.states = {name: _copied(state, device[name]) for name, state in state_dict.items()}

    def _options(self, unit: Resurrection) -> dict[str, Any]:
        weight = unit.weight.weight
        return next(g for g in self._optimizer.param_groups if any(each is weight for each in g["params"]))


def _copied(state: Mapping[str, Any], device: torch.device | None = None) -> State:
    """A copy of named tensors and numbers; tensors move to the device where one is given, scalars do not."""
    return {
        key: value.to(value.device if device is None or value.ndim == 0 else device, copy=True)
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }
