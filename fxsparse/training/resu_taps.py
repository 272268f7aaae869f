"""What RESU reads and closes on the way of a step: gradients outside T, and the inputs of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxsparse.nn import MaskedWeight, Resurrection
from fxsparse.nn.select import keep_
from fxsparse.nn.sharded import is_sharded
from fxsparse.training.distributed import summed
from fxsparse.training.gradients import GradientWindow, weakly
from fxsparse.training.input_norms import InputNorms, _Origin


class GradientGate:
    """While it is open, `.grad` holds T * G (and M * G where alive weights train) as soon as it is accumulated.

    So a clip norm between the backward pass and the step counts what is trained and nothing else.

    Args:
        units: The weights, by name.
    """

    def __init__(self, units: Mapping[str, Resurrection]) -> None:
        self._bars = {name: _Bar(unit) for name, unit in units.items()}

    def open(self, freeze_active: bool) -> None:
        """Begin to mask."""
        for bar in self._bars.values():
            if not is_sharded(bar.unit.weight.weight):
                bar.open(freeze_active)

    def open_sharded(self, freeze_active: bool, window: GradientWindow) -> None:
        """Begin to mask gradients that arrive reduced, after a window that is open already has seen them."""
        sharded = {name: bar for name, bar in self._bars.items() if is_sharded(bar.unit.weight.weight)}
        for bar in sharded.values():
            bar.open(freeze_active)
        window.gate({name: bar.kept for name, bar in sharded.items()})

    def close(self) -> None:
        """Stop masking."""
        for bar in self._bars.values():
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

    def kept(self) -> Tensor:
        """What may be seen."""
        return self.unit.trainable if self._freeze else self.unit.trainable | self.unit.weight.mask

    @torch.no_grad()
    def mask(self, parameter: Tensor) -> None:
        """Zero what nobody may see."""
        gradient = parameter.grad
        if gradient is None:
            return
        kept = self.kept()
        if gradient.is_sparse or gradient.requires_grad:
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            parameter.grad = torch.where(kept, dense, 0.0)
        else:
            keep_(gradient, kept)  # in place: the gradient may be a view of a communication bucket


class InputTap:
    """While it is open, the inputs of the weights are collected in every forward pass that trains the model.

    Copying or pickling a model copies the hooks of its tap, too: there they do nothing. The copied handle has its own.

    Args:
        model: The model without its wrappers.
        weights: Its masked weights, by name.
        moments: Whether means and variances are asked for, too.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, MaskedWeight], *, moments: bool) -> None:
        self._model, self._weights, self._moments = model, weights, moments
        spread = any(is_sharded(weight.weight) for weight in weights.values())
        self._norms = (_SpreadNorms if spread else InputNorms)(weights, moments=moments)
        self._totals: dict[str, list[Tensor]] = {}  # of all ranks, up to the last step
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
        if isinstance(self._norms, _SpreadNorms):
            self._hooks += self._norms.watch()

    def close(self) -> None:
        """Stop collecting; the sums stay."""
        self._leave(self._model, None, None)  # a forward pass that was cut short left its scope open
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def reset(self) -> None:
        """Forget the sums."""
        self._norms.reset()
        self._totals, self.seen = {}, False

    def share(self, group: dist.ProcessGroup | None) -> None:
        """Add up over ranks what they have collected since the last time, so that any of them may save it for all."""
        if group is None:
            return
        own, parts = self._norms.state_dict(), range(3 if self._moments else 1)
        seen = torch.tensor([name in own for name in self._weights], dtype=torch.int64)
        local = {"seen": seen.to(next(iter(self._weights.values())).weight.device)}
        for name, weight in self._weights.items():
            zeros = torch.zeros(weight.shape.numel(), dtype=torch.float64, device=weight.weight.device)
            local |= {f"{i} {name}": own[name][i] if name in own else zeros for i in parts}
        found = summed(local, group)
        for name, count in zip(self._weights, found["seen"].tolist(), strict=True):
            if count:
                new, before = [found[f"{i} {name}"] for i in parts], self._totals.get(name)
                self._totals[name] = new if before is None else [a + b for a, b in zip(before, new, strict=True)]
        self._norms.load_state_dict({})
        self.seen = bool(self._totals)

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """For each weight "norm", and "mean" and "variance" where they were asked for.

        Raises:
            ConfigError: a weight's inputs are not known.
        """
        if not self._totals:
            return self._read()
        try:
            self._norms.load_state_dict(self._totals)
            return self._read()
        finally:
            self._norms.load_state_dict({})

    def _read(self) -> dict[str, dict[str, Tensor]]:
        found = {name: {"norm": norm} for name, norm in self._norms.norms().items()}
        if self._moments:
            means, variances = self._norms.means(), self._norms.variances()
            for name, each in found.items():
                each |= {"mean": means[name], "variance": variances[name]}
        return found

    def state_dict(self) -> dict[str, Any]:
        """The sums, of all ranks."""
        shared = {name: [each.clone() for each in sums] for name, sums in self._totals.items()}
        return {"seen": self.seen, "sums": shared or self._norms.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any], group: dist.ProcessGroup | None) -> None:
        """Set the sums."""
        self.seen = state_dict["seen"]
        self._norms.load_state_dict(state_dict["sums"])
        self._totals = {} if group is None else self._norms.state_dict()
        if group is not None:
            self._norms.load_state_dict({})

    def _enter(self, module: nn.Module, args: object) -> None:
        if module.training and torch.is_grad_enabled() and self._depth == 0 and not self._copied:
            self._norms.__enter__()
            self._depth, self.seen = 1, True

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if self._depth:
            self._depth = 0
            self._norms.__exit__(None, None, None)


class _SpreadNorms(InputNorms):  # type: ignore[no-untyped-call]  # torch
    """The same for weights that `fully_shard` spread: each is whole only while its module runs."""

    _running = False

    def __enter__(self) -> InputNorms:
        self._running = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._running = False
        super().__exit__(*error)

    def watch(self) -> list[RemovableHandle]:
        """Hooks that follow each weight from where its module has gathered it."""

        def hook(name: str, attribute: str) -> Callable[[nn.Module, object], None]:
            def before(module: nn.Module, args: object) -> None:
                gathered = module._parameters[attribute]
                if self._running and gathered is not None and not is_sharded(gathered):
                    super(_SpreadNorms, self)._follow(_Origin(name, gathered.detach()))

            return before

        places = [(owner, name, at) for name, weight in self._weights.items() for owner, at in weight.owners]
        return [owner.register_forward_pre_hook(hook(name, attribute)) for owner, name, attribute in places]

    def _follow(self, origin: _Origin) -> None:
        if not is_sharded(origin.tensor):
            super()._follow(origin)
