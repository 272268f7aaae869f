"""What a handle saves, and the check of what it is given back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.nn import MaskedWeight
from fxsparse.sparsity.counts import Target
from fxsparse.training.distributed import masks_digest
from fxsparse.training.records import UpdateRecord
from fxsparse.training.updater import Method

VERSION = 3
_BEFORE = 2  # parts stood open in it
_DROPPED: Mapping[str, Any] = {"memory": {}, "explored": {}}  # what may be missing because it was empty
PARTS = frozenset({"version", "method", "step", "updates", "masks", "records", "explored", "memory", "targets"})
"""The keys of every handle's state."""
_KINDS: Mapping[str, Any] = {"int": int, "str": str, "float": (int, float)}
_Row = TypeVar("_Row")


def sealed(part: Any) -> tuple[Any]:
    """A part of a state whose keys depend on how far the training is, as one value, on the CPU.

    `torch.distributed.checkpoint` reads the keys that the state to be filled has, and drops empty dicts; what stands in
    a tuple it saves and loads as a whole.
    """
    return (_copied(part),)


def opened(part: Any) -> Any:
    """What `sealed` was given; parts of older states stand open."""
    return part[0] if isinstance(part, tuple) and len(part) == 1 else part


def _copied(part: Any) -> Any:
    if isinstance(part, Mapping):
        return {key: _copied(each) for key, each in part.items()}
    if isinstance(part, list):
        return [_copied(each) for each in part]
    if not isinstance(part, Tensor):
        return part
    return part.detach().to(part.device if part.ndim == 0 else "cpu", copy=True)


@dataclass(frozen=True)
class SavedState:
    """The parts of `Handle.state_dict` that every method has, checked against the model.

    Attributes:
        step: Completed optimizer steps.
        updates: Mask updates.
        masks: Digest of the masks.
        records: What the updates did.
        explored: Which elements were ever alive, of weights that are or were sparse.
        memory: What the method remembers, by weight.
        targets: What each weight is meant to keep.
    """

    step: int
    updates: int
    masks: int
    records: tuple[UpdateRecord, ...]
    explored: Mapping[str, Tensor]
    memory: Mapping[str, Mapping[str, Tensor]]
    targets: Mapping[str, Target | None]

    @staticmethod
    def read(state: object, parts: Set[str], method: Method, weights: Mapping[str, MaskedWeight]) -> SavedState:
        """Check a state.

        Args:
            state: What is given back.
            parts: The keys that it must have.
            method: The handle's method.
            weights: The masked weights of the model.

        Raises:
            ConfigError: a key is missing, the state is of another method or length, or a part does not fit the weights.
        """
        if not isinstance(state, Mapping):
            raise ConfigError(f"`state` (={state!r}) must be what Handle.state_dict() returned")
        given = {**_DROPPED, **state}
        if missing := sorted(parts - given.keys()):
            raise ConfigError(f"`state_dict` lacks {', '.join(missing)}; give it what Handle.state_dict() returned")
        if given["version"] not in (_BEFORE, VERSION) or given["method"] != repr(method):
            raise ConfigError(
                f"`state_dict` (={given['method']}, version {given['version']}) is not of this handle "
                f"(={method!r}, version {VERSION}); attach with the same method and total_steps"
            )
        records = rows(UpdateRecord, given["records"], "records")
        check_names("records", {record.name: record for record in records}, weights)
        found = SavedState(
            count(given["step"], "step"),
            count(given["updates"], "updates"),
            whole_number(given["masks"], "masks"),
            records,
            tensors("explored", opened(given["explored"]), weights, torch.bool),
            _memory(opened(given["memory"]), weights),
            _targets(given["targets"], weights),
        )
        found._check_explored(weights)
        method.check_memory(found.step, found.memory, {name: weight.shape for name, weight in weights.items()})
        return found

    def _check_explored(self, weights: Mapping[str, MaskedWeight]) -> None:
        """A weight that is or was sparse has a row."""
        lacking = {record.name for record in self.records if record.alive < record.numel} - self.explored.keys()
        if not (lacking or self.explored):
            full = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
            lacking = set() if self.masks == masks_digest(full) else {"every weight"}
        if lacking:
            raise damaged("explored", f"lacks {min(lacking)}, which is sparse")


def damaged(part: str, what: str) -> ConfigError:
    """The error of a part that cannot be read."""
    return ConfigError(f"`{part}` of the state {what}; give back what Handle.state_dict() of this model returned")


def whole_number(value: object, part: str) -> int:
    """The integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise damaged(part, f"(={value!r}) must be an integer")
    return value


def count(value: object, part: str) -> int:
    """The integer of at least 0."""
    if (number := whole_number(value, part)) < 0:
        raise damaged(part, f"(={value!r}) must be at least 0")
    return number


def rows(kind: Callable[..., _Row], given: object, part: str) -> tuple[_Row, ...]:
    """A dataclass of numbers and strings made of each row of its values."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # a dataclass
    made = []
    for number, row in enumerate(sequence(given, part)):
        values = sequence(row, f"{part}[{number}]")
        if len(values) != len(fields):
            raise damaged(f"{part}[{number}]", f"(={row!r}) must have {len(fields)} values")
        for field, value in zip(fields, values, strict=True):
            if isinstance(value, bool) or not isinstance(value, _KINDS[str(field.type)]):
                raise damaged(f"{part}[{number}]", f"has another `{field.name}` (={value!r}) than {field.type}")
        made.append(kind(*values))
    return tuple(made)


def sequence(given: object, part: str) -> list[Any]:
    """The items of a list or tuple."""
    if not isinstance(given, list | tuple):
        raise damaged(part, f"(={given!r}) must be a list")
    return list(given)


def named(given: object, part: str, weights: Mapping[str, MaskedWeight]) -> dict[str, Any]:
    """What a part has for some of the weights."""
    if not isinstance(given, Mapping):
        raise damaged(part, f"(={given!r}) must be a dict of names of weights")
    check_names(part, given, weights)
    return dict(given)


def check_names(part: str, given: Mapping[str, Any], weights: Mapping[str, MaskedWeight]) -> None:
    """Raise ConfigError for names that no masked weight has."""
    for name in given:
        if name not in weights:
            raise damaged(part, f"names `{name}`, which is no masked weight of this model")


def tensors(
    part: str, given: object, weights: Mapping[str, MaskedWeight], kind: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A tensor for some of the weights, of each one's shape."""
    found = named(given, part, weights)
    for name, each in found.items():
        check_tensor(f"{part}[{name}]", each, weights[name].shape, kind)
    return found


def check_tensor(part: str, given: object, shape: torch.Size, kind: torch.dtype | None = None) -> None:
    """Raise ConfigError for anything but a tensor of this shape and type."""
    if not isinstance(given, Tensor):
        raise damaged(part, f"(={given!r}) must be a tensor")
    if given.shape != shape or kind not in (None, given.dtype):
        raise damaged(part, f"(={given.dtype}, {tuple(given.shape)}) must be {kind or 'of shape'} {tuple(shape)}")


def _memory(given: object, weights: Mapping[str, MaskedWeight]) -> dict[str, dict[str, Tensor]]:
    found = named(given, "memory", weights)
    for name, each in found.items():
        if not isinstance(each, Mapping):
            raise damaged(f"memory[{name}]", f"(={each!r}) must be a dict of tensors")
        for key, kept in each.items():
            if not isinstance(kept, Tensor):
                raise damaged(f"memory[{name}][{key}]", f"(={kept!r}) must be a tensor")
    return found


def _targets(given: object, weights: Mapping[str, MaskedWeight]) -> dict[str, Target | None]:
    found = named(given, "targets", weights)
    for name, weight in weights.items():
        if name not in found:
            raise damaged("targets", f"lacks `{name}`")
        if found[name] is None:
            continue
        values = sequence(found[name], f"targets[{name}]")
        if len(values) != 2 or isinstance(values[0], bool) or not isinstance(values[0], int | float):
            raise damaged(f"targets[{name}]", f"(={found[name]!r}) must be a sparsity and a count")
        if count(values[1], f"targets[{name}]") > weight.shape.numel() or not 0 <= values[0] <= 1:
            raise damaged(f"targets[{name}]", f"(={found[name]!r}) must be a sparsity and a count of the weight's")
        found[name] = Target(*values)
    return {name: found[name] for name in weights}
