"""Which axes of the inputs are free: the batch, the sequence, or those that are named one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from torch import nn

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters.inputs import BATCH, Inputs, failure_of
from fxsparse.exporters.targets import Dynamic

SEQUENCE = "sequence"
"""The name of the sequence axis, where it was detected."""

Axes: TypeAlias = Dynamic | Mapping[str, Mapping[int, str]]
"""A rule, or input name -> axis -> name of the free size; axes of one name have one size."""


def check_form(dynamic: object) -> None:
    """Raise ConfigError unless `dynamic` is of one of the forms of `Axes`."""
    if isinstance(dynamic, Dynamic):
        return
    if isinstance(dynamic, Mapping) and all(
        isinstance(name, str)
        and isinstance(axes, Mapping)
        and all(isinstance(axis, int) and isinstance(free, str) and free.isidentifier() for axis, free in axes.items())
        for name, axes in dynamic.items()
    ):
        return
    raise ConfigError(
        f"`dynamic` (={dynamic!r}) must be one of {', '.join(map(str, Dynamic))}, "
        "or name free axes, as in {'x': {0: 'batch', 1: 'sequence'}}"
    )


def with_axes(model: nn.Module, inputs: Inputs, dynamic: Axes) -> Inputs:
    """The inputs with the free axes that were asked for.

    Args:
        model: the model in eval mode on the CPU; it is run on other sizes.
        inputs: the example with its batch axis, as `read_inputs` gives it.
        dynamic: what is asked for.

    Raises:
        ConfigError: named axes that the inputs lack, or that conflict: one name for axes of several sizes.
        ExportError: the model fails at another size of an axis that was named.
    """
    if not isinstance(dynamic, Dynamic):
        return _named(model, inputs, dynamic)
    if dynamic is Dynamic.FIXED:
        return inputs.fixed("it was asked for")
    return inputs if dynamic is Dynamic.BATCH else _with_sequence(model, inputs)


def _with_sequence(model: nn.Module, inputs: Inputs) -> Inputs:
    """Axis 1 of every input of one length there is free where the model runs at another length."""
    deep = [i for i, t in enumerate(inputs.tensors) if t.ndim > 1 and (not inputs.batched or i in inputs.batched)]
    if not deep:
        return inputs
    length = inputs.tensors[deep[0]].shape[1]
    for size in dict.fromkeys((length + 1, max(1, length // 2))):
        at = frozenset((i, axis) for i in deep for axis in _sequence_axes(inputs, i, length))
        tried = replace(inputs, free={SEQUENCE: at})
        other = tried.at({SEQUENCE: size})
        if failure_of(model, other, other.tensors):
            return inputs
    return tried


def _sequence_axes(inputs: Inputs, position: int, length: int) -> tuple[int, ...]:
    """Axis 1; of a square mask [batch, ..., length, length] both last axes."""
    shape = inputs.tensors[position].shape
    if len(shape) > 2 and shape[-1] == shape[-2] == length and shape[1] in (1, length):
        return (len(shape) - 2, len(shape) - 1)
    return (1,) if shape[1] == length else ()


def _named(model: nn.Module, inputs: Inputs, dynamic: Mapping[str, Mapping[int, str]]) -> Inputs:
    places: dict[str, set[tuple[int, int]]] = {}
    for name, axes in dynamic.items():
        if name not in inputs.names:
            raise ConfigError(f"`dynamic` names input `{name}`; the inputs are {', '.join(inputs.names)}")
        position = inputs.names.index(name)
        rank = inputs.tensors[position].ndim
        for axis, free in axes.items():
            if not -rank <= axis < rank:
                raise ConfigError(f"`dynamic` names axis {axis} of input `{name}`, which has {rank} axes")
            places.setdefault(free, set()).add((position, axis % rank))
    _check_conflicts(inputs, places)
    batched = frozenset(i for i, axis in places.get(BATCH, ()) if axis == 0)
    if any(axis != 0 for _, axis in places.get(BATCH, ())):
        batched = frozenset()  # the batch is not the first axis everywhere: an axis as any other
    others = {name: frozenset(at) for name, at in places.items() if not (name == BATCH and batched)}
    reason = "" if batched else "`dynamic` leaves it out"
    found = replace(inputs, batched=batched, free=others, reason=reason)
    for name, size in [*found.lengths().items(), *([(BATCH, found.batch)] if batched else [])]:
        other = found.at({name: size + 1}) if name in others else found
        failure = failure_of(model, other, other.tensors if name in others else found.resized(size + 1))
        if failure:
            raise ExportError(
                f"axis `{name}` (={size}) cannot be free: the model fails at {size + 1} ({failure}); leave it out of "
                "`dynamic`, or name all the axes that change with it"
            )
    return found


def _check_conflicts(inputs: Inputs, places: Mapping[str, set[tuple[int, int]]]) -> None:
    owner: dict[tuple[int, int], str] = {}
    for name, at in places.items():
        sizes = {f"{inputs.names[i]}[{axis}]": inputs.tensors[i].shape[axis] for i, axis in sorted(at)}
        if len(set(sizes.values())) > 1:
            said = ", ".join(f"{place} has {size}" for place, size in sizes.items())
            raise ConfigError(f"dynamic axes conflict: `{name}` is one size, but {said}; give them names of their own")
        for place in at:
            if place in owner:
                raise ConfigError(
                    f"dynamic axes conflict: axis {place[1]} of input `{inputs.names[place[0]]}` has two names, "
                    f"`{owner[place]}` and `{name}`; keep one"
                )
            owner[place] = name
