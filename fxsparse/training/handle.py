"""The life of a method on one model and optimizer, driven by the optimizer's step hooks."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fxsparse.errors import ConfigError, DataError, FxSparseError
from fxsparse.nn import MaskedWeight, masked_weights
from fxsparse.nn.sharded import fill_zeros_
from fxsparse.sparsity.mask import Mask
from fxsparse.training.averages import copy_masks
from fxsparse.training.distributed import check_equal_masks, check_shapes_stay, masks_digest, process_group, unwrap
from fxsparse.training.gradients import GradientWindow, step_factors
from fxsparse.training.grown import Zero
from fxsparse.training.held import Held
from fxsparse.training.initial import targets_of
from fxsparse.training.live_state import Later, States, live_state, step_gradient
from fxsparse.training.optimizer_state import StateMover, reset_state_
from fxsparse.training.packed_gradient import all_finite
from fxsparse.training.records import Coverage, UpdateRecord, UpdateReport
from fxsparse.training.saved_state import PARTS, VERSION, SavedState, sealed
from fxsparse.training.state import WeightState
from fxsparse.training.step_hooks import StepHooks
from fxsparse.training.updater import Method
from fxsparse.training.upkeep import Upkeep

_HANDLES: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Handle]] = weakref.WeakKeyDictionary()


def _of(masks: Mapping[str, Tensor], state: WeightState) -> Tensor:
    found = masks.get(state.name)
    return state.mask if found is None else found


def handle_of(optimizer: Optimizer) -> Handle | None:
    """The handle that this optimizer drives, or None."""
    reference = _HANDLES.get(optimizer)
    handle = None if reference is None else reference()
    return handle if handle is not None and handle.attached else None


def handles() -> list[Handle]:
    """The handles that drive some optimizer now."""
    found = (handle_of(optimizer) for optimizer in list(_HANDLES.keys()))
    return [handle for handle in found if handle is not None]


class Handle(StepHooks):
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

    _parts: ClassVar[frozenset[str]] = PARTS

    def __init__(self, model: nn.Module, optimizer: Optimizer, method: Method, total_steps: int | None) -> None:
        self.model, self.optimizer, self.method, self.total_steps = model, optimizer, method, total_steps
        self.step = self.updates = 0
        self._records: list[UpdateRecord] = []
        self._memory: dict[str, Mapping[str, Tensor]] = {}
        self._followers: list[nn.Module] = []
        self._warned = False
        self._expected: int | None = None  # digest of the masks that belong to a loaded state
        self._hooks: list[RemovableHandle] = []
        self._clear()
        self._start()
        self._targets = targets_of(method, self._weights)
        self._coverage = Coverage()
        self._coverage.see(self._masks())

    def drives(self, parameter: nn.Parameter) -> bool:
        """Whether this very parameter is one of the masked weights."""
        return any(weight.weight is parameter for weight in self._weights.values())

    @property
    def masked(self) -> Mapping[str, MaskedWeight]:
        """The masked weights by name."""
        return self._weights

    @property
    def followed(self) -> bool:
        """Whether averaged copies of the model follow."""
        return bool(self._followers)

    def storage_changed(self) -> None:
        """Go on after weights went into alive-only storage or came back, between two steps."""
        self._mover.follow(self._weights.values())
        self._watch()

    def detach(self) -> None:
        """Stop: the masks stay as they are, dead weights stay zero as long as nothing writes them."""
        self._let_go()

    def withdraw(self) -> None:
        """Take back an attach that failed: what a phase holds in the model stays."""
        self._let_go()

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._restore()
        self._window.close()

    def follow(self, average_model: nn.Module) -> None:
        """Keep a weight-averaged copy of the model (EMA, SWA) under the same masks after each update.

        Dead entries of its weights become zero and grown ones start at zero. An `AveragedModel` with `use_buffers`
        copies masks from now on, instead of averaging them.

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
        copy_masks(average_model)
        self._followers.append(average_model)
        self._lead()

    def report(self) -> UpdateReport:
        """What every update did to every weight, and how much of the weights was ever alive; `print` shows a table."""
        return UpdateReport(tuple(self._records), self._coverage.rows())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the model's and the optimizer's `state_dict` do not hold; loads with `weights_only=True`.

        The keys are the same at every step: `torch.distributed.checkpoint` saves and loads it as any other.
        """
        explored = self._coverage.copy()
        explored.see(self._masks())  # those that `set_masks` wrote since the last update, too
        return {
            "version": VERSION,
            "method": repr(self.method),
            "step": self.step,
            "updates": self.updates,
            "masks": masks_digest(self._masks()),
            "records": [dataclasses.astuple(record) for record in self._records],
            "explored": sealed(explored.state_dict()),
            "memory": sealed(self._memory),
            "targets": {n: None if t is None else [t.sparsity, t.alive] for n, t in self._targets.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a saved handle was; load the model's and the optimizer's state too, in any order.

        Raises:
            ConfigError: the state is of another method or another length of training, or a part of it is missing or
                does not fit the model. Nothing has changed then.
        """
        self._assign(SavedState.read(state_dict, self._parts, self.method, self._weights))
        self._clear()
        self._watch()

    def _assign(self, saved: SavedState) -> None:
        self.step, self.updates, self._expected = saved.step, saved.updates, saved.masks
        self._records, self._targets = list(saved.records), dict(saved.targets)
        self._coverage.load_state_dict(saved.explored)
        self._memory = {
            name: {key: kept.to(self._weights[name].weight.device, copy=True) for key, kept in each.items()}
            for name, each in saved.memory.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        own = {
            "_mover",
            "_hooks",
            "_weights",
            "_held",
            "_window",
            "_gradients",
            "_aside",
            "_masks_due",
            "_watched",
            "_skipped",
        }
        return {**{key: value for key, value in self.__dict__.items() if key not in own}, "attached": self.attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("attached")
        self.__dict__.update(state)
        self._hooks = []
        self._clear()
        self._start(attached)

    def __repr__(self) -> str:
        return f"Handle({self.method!r}, step={self.step}, updates={self.updates}, attached={self.attached})"

    def _start(self, attached: bool = True) -> None:
        self._weights: dict[str, MaskedWeight] = masked_weights(unwrap(self.model))
        self._held = Held.of(self.model, self._weights)
        self._window = GradientWindow(self._weights)
        self._mover, self._upkeep = StateMover(self.optimizer), Upkeep(self.optimizer)
        self._mover.follow(self._weights.values())
        if attached:
            eager: Callable[[Any], Any] = (
                torch.compiler.disable
            )  # compilers leave the hooks alone where they take the optimizer's step
            self._hooks = [
                self.optimizer.register_step_pre_hook(eager(self._before_step)),
                self.optimizer.register_step_post_hook(eager(self._after_step)),
                *self._mover.hooks(),
            ]
            _HANDLES[self.optimizer] = weakref.ref(self)
            self._watch()

    def _look(self) -> None:
        """Let the method remember what it watched, and update the masks where that is due."""
        if not (self._watched or self._masks_due):
            return
        self.updates += self._masks_due
        try:
            states = self._states()
            if self._watched:
                for state in states:
                    if state.has_gradient:
                        self._memory[state.name] = self.method.remember(state)
                states = self._states()
            masks = self._exchanged(states) if self._masks_due else {}
        except FxSparseError:
            self.updates -= self._masks_due  # no mask has changed
            raise
        if self._masks_due:
            self._update(states, masks)

    def _exchanged(self, states: States) -> dict[str, tuple[Tensor, Tensor | None]]:
        """The new mask and row order of every weight; nothing is changed."""
        for state in states:
            weight = self._weights[state.name]
            if all_finite(weight.weight.detach() if weight.packed else state.weight):
                continue
            if bad := int((~state.weight[state.mask].isfinite()).sum()):
                raise DataError(
                    f"mask update of `{state.name}` at step {self.step}: the weight holds NaN or Inf (={bad} values); "
                    "the training has diverged: go back to a checkpoint and lower the learning rate"
                )
        states = self._regrouped(states)
        masks = self.method.update(states)
        found = {state.name: (_of(masks, state), state.row_order) for state in states}
        check_shapes_stay(self._weights, {name: mask for name, (mask, _) in found.items()}, process_group(self.model))
        return found

    def _regrouped(self, states: States) -> States:
        """The weights that an update can see, with their rows in new groups."""
        seen, moved = [], {}
        for state in states:
            found = self.method.regrouped(state)
            if found is not state:
                moved[state.name] = found.replaced() if self._weights[state.name].packed else found
            if state.has_gradient or not self.method.needs_gradient:
                seen.append(state.name)

        def made(name: str) -> WeightState:
            if name not in moved:
                return states.of(name)
            return moved[name].replaced() if self._weights[name].packed else moved[name]

        return States(seen, made)

    def _update(self, states: States, masks: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        """Write one exchange of every weight, after the optimizer step."""
        whole: set[str] = set()
        for state in states:
            mask, row_order = masks.pop(state.name, (None, None))
            kept = row_order is state.row_order
            whole.update(self._change(state, state.mask if mask is None else mask, None if kept else row_order))
        self._coverage.see(self._masks())
        self._lead()
        check_equal_masks(self._masks(), self.step, process_group(self.model))
        if whole and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self.optimizer).__name__} keeps state of another shape than the weights "
                f"({', '.join(sorted(whole))}); mask updates reset it as a whole",
                UserWarning,
                stacklevel=6,
            )

    def _states(self) -> States:
        """Every weight as the method sees it now, in the model's order; alive-only storage is spread when read."""
        groups = {id(each): group for group in self.optimizer.param_groups for each in group["params"]}
        factors = functools.cache(self._factors)
        kept = {name: self._state(name, groups, factors) for name, each in self._weights.items() if not each.packed}
        return States(tuple(self._weights), lambda name: kept.get(name) or self._state(name, groups, factors))

    def _state(
        self, name: str, groups: Mapping[int, Mapping[str, Any]], factors: Callable[[], Mapping[str, float]]
    ) -> WeightState:
        weight, index = self._weights[name], list(self._weights).index(name)
        return live_state(
            weight,
            self._gradients.get(name),
            index=index,
            step=self.step,
            update=self.updates,
            seed=self.method.seed,
            factor=Later(lambda: factors().get(name, 1.0), kept=True),
            memory=self._memory.get(name, {}),
            explored=Later(lambda: self._coverage.of(name, weight.mask)),
            target=self._targets[name],
            options={k: v for k, v in groups[id(weight.weight)].items() if k != "params"},
            last=index == len(self._weights) - 1,
        )

    def _factors(self) -> dict[str, float]:
        return step_factors(
            self._gradients,
            lambda name: step_gradient(self._weights[name]),
            lambda name: self._weights[name].mask,
        )

    def _change(self, state: WeightState, mask: Tensor, row_order: Tensor | None = None) -> list[str]:
        """Write one mask, the values of grown weights and the optimizer state; the state that was reset as a whole."""
        weight, grown = self._weights[state.name], self.method.grown
        before = state.mask.clone()
        self._records.append(UpdateRecord.of(self.step, state.name, Mask(before), Mask(mask)))
        changed = before ^ mask
        if row_order is None and not bool(changed.any()):
            return []
        if weight.packed and type(grown) is Zero:
            del changed, before
            weight.set_mask_(mask, row_order)
            return []  # the state moved with the mask, and what grew is zero
        new = changed & mask
        values = None if type(grown) is Zero else grown.values(state.replaced(mask=before), new)
        weight.set_mask_(mask, row_order)
        if values is None:
            fill_zeros_(weight.weight, new)
        else:
            weight.write_(torch.where(new, values, weight.dense(weight.weight)))
        return [] if weight.packed else reset_state_(self.optimizer, weight.weight, changed)

    def _lead(self) -> None:
        for follower in self._followers:
            for name, copy in masked_weights(unwrap(follower)).items():
                copy.set_mask_(self._weights[name].mask, self._weights[name].row_order)

    def _check_loaded(self) -> None:
        if self._expected is not None and self._expected != masks_digest(self._masks()):
            raise DataError("the model's masks are not those of the loaded state; load the model's state_dict as well")
        self._expected = None
