"""The life of a method on one model and optimizer, driven by the optimizer's step hooks."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import MaskedWeight, masked_weights
from fxsparse.sparsity.mask import Mask
from fxsparse.training.distributed import average, check_equal_masks, masks_digest, process_group, unwrap
from fxsparse.training.gradients import GradientWindow
from fxsparse.training.optimizer_state import reset_state_, zero_state_
from fxsparse.training.records import UpdateRecord, UpdateReport
from fxsparse.training.state import WeightState
from fxsparse.training.updater import Method

Gradients = dict[str, Tensor | None]

_HANDLES: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Handle]] = weakref.WeakKeyDictionary()


def handle_of(optimizer: Optimizer) -> Handle | None:
    """The handle that this optimizer drives, or None."""
    reference = _HANDLES.get(optimizer)
    handle = None if reference is None else reference()
    return handle if handle is not None and handle.attached else None


class Handle:
    """What `attach` returns: it counts optimizer steps, keeps dead weights zero and updates the masks.

    deepcopy and pickle take model, optimizer and handle along; copied together with them, `deepcopy((model, optimizer,
    handle))`, the copies belong to each other and go on exactly as the originals would.

    Attributes:
        model: The model as it was given.
        optimizer: The optimizer.
        method: The method with every step number known.
        total_steps: Length of the training, or None.
        step: Completed optimizer steps; steps that a GradScaler skips do not count.
        updates: Mask updates so far.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, method: Method, total_steps: int | None) -> None:
        self.model, self.optimizer, self.method, self.total_steps = model, optimizer, method, total_steps
        self.step = self.updates = 0
        self._records: list[UpdateRecord] = []
        self._followers: list[nn.Module] = []
        self._warned = False
        self._expected: int | None = None  # digest of the masks that belong to a loaded state
        self._hooks: list[RemovableHandle] = []
        self._clear()
        self._start()

    @property
    def attached(self) -> bool:
        """Whether optimizer steps still drive the masks."""
        return bool(self._hooks)

    def detach(self) -> None:
        """Stop: the masks stay as they are, dead weights stay zero as long as nothing writes them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._restore()
        self._window.close()

    def follow(self, average_model: nn.Module) -> None:
        """Keep a weight-averaged copy of the model (EMA, SWA) under the same masks after each update.

        Dead entries of its weights become zero and grown ones start at zero.

        Args:
            average_model: An `AveragedModel`, or any copy of the model with the same masked weights.

        Raises:
            ConfigError: its masked weights have other names or shapes.
        """
        copies = masked_weights(unwrap(average_model))
        shapes = {name: copy.weight.shape for name, copy in copies.items()}
        expected = {name: own.weight.shape for name, own in self._weights.items()}
        if shapes != expected:
            name = next(name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name))
            raise ConfigError(f"`average_model` does not match the model at `{name}`; make it a copy of this model")
        self._followers.append(average_model)
        self._lead()

    def report(self) -> UpdateReport:
        """What every update did to every weight; `print` shows a table of the updates."""
        return UpdateReport(tuple(self._records))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the model's and the optimizer's `state_dict` do not hold; loads with `weights_only=True`."""
        return {
            "version": 1,
            "method": repr(self.method),
            "step": self.step,
            "updates": self.updates,
            "masks": masks_digest(self._masks()),
            "records": [dataclasses.astuple(record) for record in self._records],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved handle was; load the model's and the optimizer's state too, in any order.

        Raises:
            ConfigError: the state is of another method or another length of training. Nothing has changed then.
        """
        missing = sorted(self.state_dict().keys() - state_dict.keys())
        if missing:
            raise ConfigError(f"`state_dict` lacks {', '.join(missing)}; give it what Handle.state_dict() returned")
        if state_dict["version"] != 1 or state_dict["method"] != repr(self.method):
            raise ConfigError(
                f"`state_dict` (={state_dict['method']}, version {state_dict['version']}) is not of this handle "
                f"(={self.method!r}, version 1); attach with the same method and total_steps"
            )
        self.step, self.updates = state_dict["step"], state_dict["updates"]
        self._records = [UpdateRecord(*record) for record in state_dict["records"]]
        self._expected = state_dict["masks"]
        self._clear()
        self._watch()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_hooks", "_weights", "_window", "_gradients", "_aside", "_masks_due", "_skipped"}
        return {**{key: value for key, value in self.__dict__.items() if key not in own}, "attached": self.attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("attached")
        self.__dict__.update(state)
        self._hooks = []
        self._clear()
        self._start(attached)

    def __repr__(self) -> str:
        return f"Handle({self.method!r}, step={self.step}, updates={self.updates}, attached={self.attached})"

    def _clear(self) -> None:
        self._gradients: Gradients = {}
        self._aside: list[tuple[nn.Parameter, Tensor]] = []
        self._masks_due = self._skipped = False

    def _start(self, attached: bool = True) -> None:
        self._weights: dict[str, MaskedWeight] = masked_weights(unwrap(self.model))
        self._window = GradientWindow(self._weights)
        if attached:
            self._hooks = [
                self.optimizer.register_step_pre_hook(self._before_step),
                self.optimizer.register_step_post_hook(self._after_step),
            ]
            _HANDLES[self.optimizer] = weakref.ref(self)
            self._watch()

    def _masks(self) -> dict[str, Tensor]:
        return {name: weight.mask for name, weight in self._weights.items()}

    def _watch(self) -> None:
        """Collect gradients on the way to the next step where that is a step that needs them."""
        self._window.close()
        if self.attached and self.method.needs_gradient and self.method.update_due(self.step + 1):
            self._window.open()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._restore()
        self._clear()
        overflow = getattr(optimizer, "found_inf", None)  # a GradScaler lets fused optimizers skip the step themselves
        self._skipped = overflow is not None and bool(overflow)
        if self._skipped:
            return None
        self._check_loaded()
        self._masks_due = self.method.update_due(self.step + 1)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._prepare()
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
            if gradient is not None and not gradient.is_sparse:
                gradient.masked_fill_(~weight.mask, 0)
        if not self._masks_due:
            return
        if self.method.needs_gradient:
            self._gradients = average(self._window.read(), self._values(), process_group(self.model))
            self._check_collected()
        if not all(bool(each.isfinite().all()) for each in self._gradients.values() if each is not None):
            warnings.warn(
                f"non-finite gradient at step {self.step + 1}: neither weights nor masks change; the mask update waits "
                "for a finite one",
                RuntimeWarning,
                stacklevel=4,
            )
            self._skipped = True
        if self._skipped or self.method.replaces_step:
            self._set_aside()

    def _check_collected(self) -> None:
        if all(gradient is None for gradient in self._gradients.values()):
            raise ConfigError(
                f"no gradient was seen before step {self.step + 1}, which updates the masks; run forward and "
                "`loss.backward()` between two optimizer steps"
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
        if not self._skipped:
            self.step += 1
            for weight in self._weights.values():
                weight.apply_()
                zero_state_(optimizer, weight.weight, ~weight.mask)
            if self._masks_due:
                self._update()
        self._clear()
        self._watch()

    def _update(self) -> None:
        """One exchange of every weight, after the optimizer step."""
        self.updates += 1
        states = [self._state(index, name) for index, name in enumerate(self._weights)]
        known = [state for state in states if state.gradient is not None or not self.method.needs_gradient]
        masks = self.method.update(known)
        whole: set[str] = set()
        for state in states:
            whole.update(self._change(state, masks.get(state.name, state.mask)))
        self._lead()
        check_equal_masks(self._masks(), self.step, process_group(self.model))
        if whole and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self.optimizer).__name__} keeps state of another shape than the weights "
                f"({', '.join(sorted(whole))}); mask updates reset it as a whole",
                UserWarning,
                stacklevel=5,
            )

    def _state(self, index: int, name: str) -> WeightState:
        weight = self._weights[name]
        return WeightState(
            name=name,
            index=index,
            step=self.step,
            update=self.updates,
            seed=self.method.seed,
            weight=weight.weight.detach(),
            mask=weight.mask,
            pattern=weight.spec.pattern,
            layout=weight.spec.layout,
            row_order=weight.row_order,
            gradient=self._gradients.get(name),
            step_gradient=weight.weight.grad,
        )

    def _change(self, state: WeightState, mask: Tensor) -> list[str]:
        """Write one mask, the values of grown weights and the optimizer state; the state that was reset as a whole."""
        weight, before = self._weights[state.name], state.mask.clone()
        self._records.append(UpdateRecord.of(self.step, state.name, Mask(before), Mask(mask)))
        changed, new = before ^ mask, mask & ~before
        if not bool(changed.any()):
            return []
        values = self.method.grown.values(dataclasses.replace(state, mask=before), new)
        weight.set_mask_(mask)
        weight.weight.copy_(torch.where(new, values, weight.weight))
        return reset_state_(self.optimizer, weight.weight, changed)

    def _lead(self) -> None:
        for follower in self._followers:
            for name, copy in masked_weights(unwrap(follower)).items():
                copy.set_mask_(self._weights[name].mask)

    def _check_loaded(self) -> None:
        if self._expected is not None and self._expected != masks_digest(self._masks()):
            raise DataError("the model's masks are not those of the loaded state; load the model's state_dict as well")
        self._expected = None

    def _values(self) -> dict[str, Tensor]:
        return {name: weight.weight.detach() for name, weight in self._weights.items()}
