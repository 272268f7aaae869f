"""What happens around one optimizer step: gradients are masked, read and put aside; dead weights are zeroed."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import MaskedWeight
from fxsparse.nn.select import keep_
from fxsparse.nn.sharded import part
from fxsparse.training.distributed import average, process_group, unwrap
from fxsparse.training.gradients import Gradient, GradientWindow, is_finite
from fxsparse.training.held import Held
from fxsparse.training.live_state import Made
from fxsparse.training.updater import Method, NonFinite
from fxsparse.training.upkeep import Upkeep

Gradients = dict[str, Gradient | None]


class StepHooks(abc.ABC):
    """The pre- and post-hook of `optimizer.step`, for a model, a method and the weights that it masks.

    Attributes:
        model: The model as it was given.
        optimizer: The optimizer.
        method: The method with every step number known.
        step: Completed optimizer steps; steps that a GradScaler skips do not count.
    """

    model: nn.Module
    optimizer: Optimizer
    method: Method
    step: int
    _weights: dict[str, MaskedWeight]
    _held: Held
    _window: GradientWindow
    _hooks: list[RemovableHandle]
    _upkeep: Upkeep

    @property
    def attached(self) -> bool:
        """Whether optimizer steps still drive the masks."""
        return bool(self._hooks)

    @abc.abstractmethod
    def _look(self) -> None:
        """After a completed step, with this step's gradients at hand."""

    @abc.abstractmethod
    def _check_loaded(self) -> None:
        """Raise where a loaded state and the model do not belong together."""

    def _clear(self) -> None:
        self._gradients: Gradients = {}
        self._aside: list[tuple[nn.Parameter, Tensor]] = []
        self._masks_due = self._watched = self._skipped = False

    def _masks(self) -> Mapping[str, Tensor]:
        return Made(tuple(self._weights), lambda name: self._weights[name].mask)

    def _watch(self) -> None:
        """Collect gradients on the way to the next step where that is a step that needs them."""
        self._window.close()
        if self.attached and self.method.watches(self.step + 1):
            self._window.open()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._restore()
        self._clear()
        self._held.check(self.model, optimizer)
        overflow = getattr(optimizer, "found_inf", None)  # a GradScaler lets fused optimizers skip the step themselves
        self._skipped = overflow is not None and bool(overflow)
        if self._skipped:
            return None
        self._check_loaded()
        self._masks_due = self.method.update_due(self.step + 1)
        self._watched = self.method.watches(self.step + 1)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._prepare()
            self._upkeep.before(self._weights.values())
            return None
        if "closure" in kwargs:
            return args, {**kwargs, "closure": self._prepared(closure)}
        return (args[0], self._prepared(closure), *args[2:]), kwargs

    def _prepared(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        first = True

        def run() -> Any:
            nonlocal first
            loss = closure()
            if first:
                self._prepare()
            elif self._aside:
                self._set_aside()
            first = False
            return loss

        return run

    @torch.no_grad()
    def _prepare(self) -> None:
        """With the gradients of the step at hand: mask them, read G, put them aside where the step is left out."""
        for weight in self._weights.values():
            gradient = weight.weight.grad
            if gradient is not None and not gradient.is_sparse and not weight.has_masked_gradient:
                keep_(gradient, weight.mask)
        if self._watched:
            self._gradients = average(self._window.read(), self._weights, process_group(self.model))
            self._check_collected()
            self._skipped = self._skipped or self._overflown()
        if self._skipped or (self._masks_due and self.method.replaces_step):
            self._set_aside()

    def _overflown(self) -> bool:
        """Whether the step is left out because of a gradient that is not finite."""
        names = [n for n, each in self._gradients.items() if each is not None and not is_finite(each)]
        if not names:
            return False
        what = f"non-finite gradient at step {self.step + 1} in {', '.join(f'`{name}`' for name in names)}"
        self._check_finite(what)
        if self.method.non_finite is NonFinite.RAISE:
            raise DataError(f"{what}, which {type(self.method).__name__} reads; lower the learning rate or loss scale")
        warnings.warn(
            f"{what}: neither weights nor masks change; the mask update waits for a finite one",
            RuntimeWarning,
            stacklevel=5,
        )
        return True

    def _check_finite(self, what: str) -> None:
        """Waiting helps where a gradient overflowed; it never ends where a parameter is itself NaN or infinite."""
        for name, parameter in unwrap(self.model).named_parameters():
            if parameter.grad is not None and (bad := int((~part(parameter).isfinite()).sum())):
                raise DataError(
                    f"{what}, and `{name}` holds NaN or Inf (={bad} values): the training has diverged, and no later "
                    "step can be finite; go back to a checkpoint and lower the learning rate"
                )

    def _check_collected(self) -> None:
        if all(gradient is None for gradient in self._gradients.values()):
            raise ConfigError(
                f"no gradient was seen before step {self.step + 1}, which {type(self.method).__name__} reads; run "
                "forward and `loss.backward()` between two optimizer steps"
            )

    def _set_aside(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._aside.append((parameter, parameter.grad))
                    parameter.grad = None

    def _restore(self) -> None:
        for parameter, gradient in self._aside:
            parameter.grad = gradient
        self._aside = []

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._restore()
        try:
            if not self._skipped:
                self.step += 1
                self._upkeep.after(self._weights.values())
                self._look()
        finally:
            self._clear()
            self._watch()
