"""What RESU reads and closes on the way of a step: gradients outside T, and the inputs of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxsparse.nn import MaskedWeight, Resurrection
from fxsparse.training.distributed import average, process_group
from fxsparse.training.gradients import weakly
from fxsparse.training.input_norms import InputNorms


class GradientGate:
    """While it is open, `.grad` holds T * G (and M * G where alive weights train) as soon as it is accumulated.

    So a clip norm between the backward pass and the step counts what is trained and nothing else.

    Args:
        units: The weights, by name.
    """

    def __init__(self, units: Mapping[str, Resurrection]) -> None:
        self._bars = [_Bar(unit) for unit in units.values()]

    def open(self, freeze_active: bool) -> None:
        """Begin to mask."""
        for bar in self._bars:
            bar.open(freeze_active)

    def close(self) -> None:
        """Stop masking."""
        for bar in self._bars:
            bar.close()


class _Bar:
    def __init__(self, unit: Resurrection) -> None:
        self.unit = unit
        self._freeze = True
        self._hook: RemovableHandle | None = None

    def open(self, freeze_active: bool) -> None:
        parameter = self.unit.weight.weight
        if parameter.requires_grad:
            self._freeze = freeze_active
            self._hook = parameter.register_post_accumulate_grad_hook(weakly(self.mask))  # type: ignore[no-untyped-call]  # torch

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @torch.no_grad()
    def mask(self, parameter: Tensor) -> None:
        """Zero what nobody may see."""
        gradient = parameter.grad
        if gradient is None:
            return
        kept = self.unit.trainable if self._freeze else self.unit.trainable | self.unit.weight.mask
        if gradient.is_sparse or gradient.requires_grad:
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            parameter.grad = torch.where(kept, dense, 0.0)
        else:
            gradient.masked_fill_(~kept, 0.0)  # in place: the gradient may be a view of a communication bucket


class InputTap:
    """While it is open, the inputs of the weights are collected in every forward pass that trains the model.

    Copying or pickling a model copies the hooks of its tap, too: there they do nothing. The copied handle has its own.

    Args:
        model: The model without its wrappers.
        weights: Its masked weights, by name.
        moments: Whether means and variances are asked for, too.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, MaskedWeight], *, moments: bool) -> None:
        self._model, self._moments = model, moments
        self._norms = InputNorms(weights, moments=moments)
        self._hooks: list[RemovableHandle] = []
        self._depth = 0
        self._copied = False
        self.seen = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_depth": 0, "_hooks": [], "seen": False, "_copied": True}

    def open(self) -> None:
        """Begin to collect; the sums so far stay."""
        self._hooks = [
            self._model.register_forward_pre_hook(self._enter),
            self._model.register_forward_hook(self._leave, always_call=True),
        ]

    def close(self) -> None:
        """Stop collecting; the sums stay."""
        self._leave(self._model, None, None)  # a forward pass that was cut short left its scope open
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def reset(self) -> None:
        """Forget the sums."""
        self._norms.reset()
        self.seen = False

    def statistics(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """For each weight "norm", and "mean" and "variance" where they were asked for; averaged over ranks.

        Args:
            model: The model with its wrappers.

        Raises:
            ConfigError: a weight's inputs are not known.
        """
        norms = self._norms.norms()
        group = process_group(model)
        squares = average({name: norm.square() for name, norm in norms.items()}, norms, group)
        found = {name: {"norm": each.sqrt()} for name, each in squares.items() if each is not None}
        if self._moments:
            means, variances = self._norms.means(), self._norms.variances()
            second = {name: variances[name] + means[name].square() for name in means}
            for name, mean in average(means, norms, group).items():
                square = average({name: second[name]}, {name: second[name]}, group)[name]
                assert mean is not None and square is not None
                found[name] |= {"mean": mean, "variance": (square - mean.square()).clamp(min=0)}
        return found

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"seen": self.seen, "sums": self._norms.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the sums."""
        self.seen = state_dict["seen"]
        self._norms.load_state_dict(state_dict["sums"])

    def _enter(self, module: nn.Module, args: object) -> None:
        if module.training and torch.is_grad_enabled() and self._depth == 0 and not self._copied:
            self._norms.__enter__()
            self._depth, self.seen = 1, True

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if self._depth:
            self._depth = 0
            self._norms.__exit__(None, None, None)
