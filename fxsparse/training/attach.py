"""Attaching a method to a model and its optimizer."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import ConfigError
from fxsparse.nn import MaskedWeight, masked_weights
from fxsparse.nn.slot import MaskSlot, slots_of
from fxsparse.sparsity.counts import check_steps
from fxsparse.sparsity.pattern import Pattern
from fxsparse.training.distributed import agreed, check_sharding, reshard, unwrap
from fxsparse.training.handle import Handle, handle_of, handles
from fxsparse.training.initial import initial_masks, pattern_of, start_from
from fxsparse.training.optimizer_state import check_optimizer, inner_optimizer, zero_state_
from fxsparse.training.updater import Method


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    method: Method,
    total_steps: int | None = None,
    *,
    state: Mapping[str, Any] | None = None,
) -> Handle:
    """Train a model sparse by a method; the training loop stays as it is.

    Hooks on `optimizer.step` count the steps, keep dead weights and their optimizer state at zero, and update the masks
    when the method says so. Accumulated micro-batches, closures, GradScaler, clipping, DDP and `torch.compile` need no
    further call. With `Method.replaces_step` the optimizer changes nothing at an update step.

    Args:
        model: A model with masks, as `fxsparse.transform` returns it; DDP and compiled wrappers are seen through. Where
            processes run together, all of them train this model.
        optimizer: Any torch.optim optimizer of all masked weights, or a wrapper with one in its attribute `optimizer`
            (Accelerate, Lightning).
        method: A frozen method, such as `RigL(sparsity=0.9)`.
        total_steps: Length of the training in optimizer steps, for methods whose schedule is a share of it.
        state: What `Handle.state_dict()` returned, to go on from there; the model and the optimizer hold their saved
            states already, and keep them.

    Returns:
        The handle. The model has the method's initial masks and patterns now; with `state` it has its own masks.

    Raises:
        ConfigError: no masks, a masked weight that the optimizer does not hold or that another handle drives, an
            optimizer that cannot follow masks, a pattern or sparsity that the method or a weight excludes, a state of
            another method or length or a damaged one. Of several ranks all raise, where one must. Nothing has changed
            then.
    """
    optimizer, weights = agreed(lambda: _checked(model, optimizer, method, total_steps, state), model)
    check_sharding(model, weights, method, total_steps, state)
    if state is not None:
        return _resumed(model, optimizer, method, total_steps, state)
    timed, masks, patterns = agreed(lambda: _begun(weights, method, total_steps), model)
    start_from(weights, masks, patterns)
    for masked in weights.values():
        zero_state_(optimizer, masked.weight, ~masked.mask)
    return timed.handle(model, optimizer, total_steps)


def make_loadable(model: nn.Module, method: Method) -> None:
    """Install the buffers that a method keeps in the model, so that a checkpoint of it loads strictly before `attach`.

    Args:
        model: A model with masks.
        method: The method that will be attached.
    """
    for masked in masked_weights(unwrap(model)).values():
        method.install(masked)


def _checked(
    model: nn.Module, optimizer: Any, method: object, total_steps: object, state: object
) -> tuple[Optimizer, dict[str, MaskedWeight]]:
    """The optimizer inside its wrappers and the masked weights, after everything that this rank can see by itself."""
    if not isinstance(method, Method):
        raise ConfigError(f"`method` (={method!r}) must be a fxsparse method such as RigL(sparsity=0.9)")
    if total_steps is not None:
        check_steps(total_steps, "total_steps")
    if state is not None and not isinstance(state, Mapping):
        raise ConfigError(f"`state` (={state!r}) must be what Handle.state_dict() returned")
    optimizer = inner_optimizer(optimizer)
    check_optimizer(optimizer)
    if isinstance(model, nn.Module):
        reshard(model)  # the optimizer holds the parts
    weights = masked_weights(unwrap(model))
    if not weights:
        raise ConfigError(f"`model` (={type(model).__name__}) has no masks; call fxsparse.transform on it first")
    _check_free(optimizer, weights)
    _check_held(weights, optimizer)
    return optimizer, weights


def _begun(
    weights: Mapping[str, MaskedWeight], method: Method, total_steps: int | None
) -> tuple[Method, dict[str, Tensor], dict[str, Pattern]]:
    timed = method.timed(total_steps)
    return timed, initial_masks(timed, weights), {name: pattern_of(timed, each) for name, each in weights.items()}


def _resumed(
    model: nn.Module, optimizer: Optimizer, method: Method, total_steps: int | None, state: Mapping[str, Any]
) -> Handle:
    """A handle that goes on, or none at all: where anything fails on any rank, all of it is undone."""
    weights = masked_weights(unwrap(model))
    specs = [(slot, slot.spec) for weight in weights.values() for slot in _slots(weight)]
    begun: list[Handle] = []

    def resume() -> None:
        timed = method.timed(total_steps)
        for masked in weights.values():
            pattern = pattern_of(timed, masked)
            for slot in _slots(masked):
                slot.spec = dataclasses.replace(slot.spec, pattern=pattern)
        begun.append(timed.handle(model, optimizer, total_steps))
        begun[0].load_state_dict(state)

    try:
        agreed(resume, model)
    except BaseException:
        for handle in begun:
            handle.withdraw()
        for slot, spec in specs:
            slot.spec = spec
        raise
    return begun[0]


def _slots(weight: MaskedWeight) -> list[MaskSlot]:
    return [slots_of(module)[attribute] for module, attribute in weight.owners]


def _check_free(optimizer: Optimizer, weights: Mapping[str, MaskedWeight]) -> None:
    handle = handle_of(optimizer)
    if handle is not None:
        raise ConfigError(f"`optimizer` (={type(optimizer).__name__}) drives {handle} already; detach() it first")
    if _driver(weights) is not None:
        gc.collect()  # handle and optimizer hold each other, so those that were dropped may linger
    if (found := _driver(weights)) is not None:
        raise ConfigError(f"`{found[0]}` is driven by {found[1]} already, through another optimizer; detach() it first")


def _driver(weights: Mapping[str, MaskedWeight]) -> tuple[str, Handle] | None:
    every = handles()
    return next(
        ((n, handle) for n, masked in weights.items() for handle in every if handle.drives(masked.weight)), None
    )


def _check_held(weights: Mapping[str, MaskedWeight], optimizer: Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, masked in weights.items():
        if id(masked.weight) not in held:
            raise ConfigError(
                f"`optimizer` (={type(optimizer).__name__}) does not hold `{name}`; build it from the parameters of "
                "this very model (transform copies a model unless inplace=True), or exclude the weight from the masks"
            )
