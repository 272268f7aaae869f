"""Storing only what is alive: weights, gradients and optimizer state of layers with shared support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from fxsparse.errors import ConfigError
from fxsparse.nn import MaskedWeight
from fxsparse.nn.sharded import is_sharded
from fxsparse.nn.shared import FastMode, close_path, open_path, path_of
from fxsparse.nn.shared_accelerate import FAST_TYPES
from fxsparse.nn.shared_packed import pack_, unpack_
from fxsparse.training.handle import Handle

ELEMENTWISE = (SGD, Adam, AdamW, NAdam, RAdam, Adamax, Adadelta, Adagrad, RMSprop, Rprop, ASGD)
"""Optimizers that treat every entry of a parameter by itself."""


@dataclass(frozen=True)
class StoredWeight:
    """How one masked weight is stored.

    Attributes:
        name: The weight.
        elements: Elements of the dense weight.
        stored: Elements of the parameter.
        reason: Why it is stored densely, or None.
    """

    name: str
    elements: int
    stored: int
    reason: str | None


@dataclass(frozen=True)
class StorageReport:
    """How the masked weights of a model are stored; `print` shows a table."""

    rows: tuple[StoredWeight, ...]

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=6)
        lines = [f"{'weight':<{width}} {'elements':>10} {'stored':>10} {'share':>6}"]
        for row in self.rows:
            line = f"{row.name:<{width}} {row.elements:>10} {row.stored:>10} {row.stored / row.elements:>6.3f}"
            lines.append(line if row.reason is None else f"{line}  {row.reason}")
        return "\n".join(lines)


def store_alive(handle: Handle) -> StorageReport:
    """Keep only the alive entries of weights with shared support, of their gradients and of their optimizer state.

    The parameter objects stay and hold [groups, G, k] (convolutions: [groups, G, k, kernel]); no mask stands beside
    them. The training loop, mask updates, `masks`, `set_masks` and `state_dict`, whose keys and shapes are those of
    dense storage, go on as before. `restore_dense` undoes it, and must be called before compaction, export, `finalize`
    or saving a ticket; both are called between two steps. The optimizer's state is saved in the shapes that it has:
    load it into a training in the same storage.

    Where k changes (gradual pruning) parameters change their shape at a mask update; compiled code is made anew then.

    Args:
        handle: What `attach` returned; methods whose dead weights are trained, as RESU's, need them all.

    Returns:
        Which weights are stored how; those without a sparse product stay dense.

    Raises:
        ConfigError: an optimizer that mixes the entries of a weight or keeps state of other shapes, a method with
            phases of its own, averaged copies that follow the handle, a DDP wrapper (wrap the model afterwards),
            sharded weights, or no weight that could be stored so. Nothing has changed then.
    """
    _check(handle)
    weights = handle.masked
    had = {name: path_of(weight.owners[0][0]) for name, weight in weights.items()}
    reasons = {name: _reason(weight) for name, weight in weights.items()}
    try:
        _check_weights(handle.optimizer, weights, reasons)
    except ConfigError:
        for name, weight in weights.items():
            if had[name] is None:
                close_path(weight.owners[0][0])
        raise
    for name, weight in weights.items():
        if reasons[name] is None and not weight.packed:
            _store(handle.optimizer, weight)
    handle.storage_changed()
    return StorageReport(
        tuple(StoredWeight(n, w.shape.numel(), w.weight.numel(), reasons[n]) for n, w in weights.items())
    )


def restore_dense(handle: Handle) -> None:
    """Undo `store_alive`: dense weights, gradients and optimizer state, zero at dead entries, and masks beside them.

    Raises:
        ConfigError: not a handle.
    """
    _check_handle(handle)
    for weight in handle.masked.values():
        path, parameter = path_of(weight.owners[0][0]), weight.weight
        if path is None or not path.packed:
            continue
        module, held = weight.owners[0][0], parameter.shape
        state = _shaped(handle.optimizer, parameter, held)
        for key, value in state.items():
            handle.optimizer.state[parameter][key] = path.spread(module, value)
        unpack_(module)
    handle.storage_changed()


def _store(optimizer: Optimizer, weight: MaskedWeight) -> None:
    module, parameter = weight.owners[0][0], weight.weight
    path = path_of(module) or open_path(module, FastMode.SPARSE, None)
    for key, value in _shaped(optimizer, parameter, parameter.shape).items():
        optimizer.state[parameter][key] = path.pack(module, value).contiguous()
    pack_(module)


def _shaped(optimizer: Optimizer, parameter: Tensor, shape: torch.Size) -> dict[str, Tensor]:
    state = optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == shape}


def _check_handle(handle: object) -> None:
    if not isinstance(handle, Handle):
        raise ConfigError(f"`handle` (={type(handle).__name__}) must be what fxsparse.attach returned")


def _check(handle: Handle) -> None:
    _check_handle(handle)
    if type(handle) is not Handle:
        raise ConfigError(f"{type(handle.method).__name__} trains dead weights too; store all of them")
    if not handle.attached:
        raise ConfigError("`handle` is detached: nothing would move the optimizer's state when masks change")
    optimizer = handle.optimizer
    if type(optimizer) not in ELEMENTWISE:
        names = ", ".join(kind.__name__ for kind in ELEMENTWISE)
        raise ConfigError(
            f"`optimizer` (={type(optimizer).__name__}) may mix the entries of a weight or keep state of other shapes; "
            f"alive-only storage is exact for {names}"
        )
    if handle.followed:
        raise ConfigError(
            "averaged copies follow this handle, in dense storage; average the dense model after training"
        )
    if any(isinstance(module, DistributedDataParallel) for module in handle.model.modules()):
        raise ConfigError("DistributedDataParallel has laid out the dense gradients already; wrap after store_alive")
    sharded = [name for name, weight in handle.masked.items() if is_sharded(weight.weight)]
    if sharded:
        raise ConfigError(f"`{sharded[0]}` (=DTensor) is sharded: its alive entries cannot move; use DDP")


def _check_weights(
    optimizer: Optimizer, weights: Mapping[str, MaskedWeight], reasons: Mapping[str, str | None]
) -> None:
    if all(reason is not None for reason in reasons.values()):
        told = "; ".join(f"`{name}`: {reason}" for name, reason in reasons.items())
        full = any(str(reason).endswith("mask is full") for reason in reasons.values())
        mend = "; call store_alive again after the update that first prunes" if full else ""
        raise ConfigError(f"no weight can be stored alive only: {told}{mend}")
    uneven = [name for name, weight in weights.items() if reasons[name] is None and not _even(weight)]
    if uneven and any(group.get("eps", 1.0) == 0 for group in optimizer.param_groups):
        raise ConfigError(
            f"`eps` (=0) of {type(optimizer).__name__} divides 0 by 0 in the padding of `{uneven[0]}`, whose last "
            "group of rows is smaller; give a positive eps"
        )


def _reason(weight: MaskedWeight) -> str | None:
    module = weight.owners[0][0]
    if len(weight.owners) > 1 or len(weight.names) > 1:
        return "several modules share it"
    if type(module) not in FAST_TYPES:
        return f"a {type(module).__name__} has no sparse product"
    path = path_of(module)
    if path is not None:
        path.refresh(module)
        return path.reason
    opened = open_path(module, FastMode.SPARSE, None)
    if opened.reason is not None:
        close_path(module)
    return opened.reason


def _even(weight: MaskedWeight) -> bool:
    path = path_of(weight.owners[0][0])
    return path is not None and path.rows.even
