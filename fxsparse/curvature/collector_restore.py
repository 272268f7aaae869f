"""From a saved state to the tasks of a collector: all of it is checked before any of it is taken over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxsparse.curvature.collector_file import DECAYING, SCHEMA, undamaged
from fxsparse.curvature.collector_moments import Decaying, Moments
from fxsparse.curvature.collector_ranks import rank, ranks
from fxsparse.curvature.collector_reduce import share
from fxsparse.curvature.collector_tasks import TaskState
from fxsparse.curvature.fisher_squares import Entry
from fxsparse.curvature.groups import ELEMENT, Grouping
from fxsparse.curvature.keys import Key, check_task
from fxsparse.curvature.storage import Stored
from fxsparse.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]
Groupings = Mapping[str, tuple[Grouping, ...]]

_POSITIVE = ("count", "squares", "mass")
_MOMENTS = (*_POSITIVE, "mass_spread")
_SQUARES = ("total", "spread", "num", "values", "scale")  # sums of squares, and roots of them
_FIRST = (("tensors", "total"), ("tensors", "num"), ("shared", "total"), ("stored", "values"))


def tasks_of(
    state: Mapping[str, Any], settings: Mapping[str, str], shapes: Shapes, groupings: Groupings
) -> dict[str, TaskState]:
    """The tasks of a state, which must come from a collector with these settings.

    What one process alone collected is loaded by several as their common sum: it counts once, however many load it.

    Raises:
        ConfigError: another schema, other settings, shapes or groups, a parameter that is not collected here, what
            another one of several ranks has collected and not reduced, or values that no collector has.
    """
    if not isinstance(state, Mapping) or state.get("schema") != SCHEMA:
        found = state.get("schema") if isinstance(state, Mapping) else type(state).__name__
        raise ConfigError(f"`schema` (={found!r}) must be {SCHEMA}: the state is of another version, or none")
    with undamaged("the state"):
        for name, value in settings.items():
            if state["settings"].get(name) != value:
                own = state["settings"].get(name)
                raise ConfigError(f"`{name}` of the state (={own!r}) differs from {value!r} here")
        _check_origin(state)
        tasks = {}
        for task, held in state["tasks"].items():
            tasks[check_task(task)] = own = _task(task, held, state["shapes"], shapes, groupings)
            if (own.decaying and settings["accumulate"] != "ema") or (own.moments and settings["accumulate"] == "ema"):
                raise _damaged(f"task {task!r}", "sums", "of the other form of `accumulate`")
            if ranks() > 1 and state["ranks"] == 1:
                share(own)
            elif ranks() > 1 and state["rank"] != rank() and (own.moments or own.skipped):
                raise ConfigError(
                    f"`rank` of the state (={state['rank']}) has collected for itself in task {task!r}: load it on "
                    "that rank alone, or save after all_reduce"
                )
    return tasks


def _check_origin(state: Mapping[str, Any]) -> None:
    for name, least in (("rank", 0), ("ranks", 1)):
        _count(f"`{name}` of the state", state[name], least)
    generator = state["generator"]
    if not isinstance(generator, Tensor) or generator.dtype is not torch.uint8 or generator.ndim != 1:
        raise _damaged("the state", "generator", "no bytes of a generator")


def _task(
    task: str, held: Mapping[str, Any], told: Mapping[str, Any], shapes: Shapes, groupings: Groupings
) -> TaskState:
    skipped = [_count(f"`{name}` of task {task!r}", held[name], 0) for name in ("skipped", "shared_skipped")]
    if not isinstance(held["origin"], str):
        raise _damaged(f"task {task!r}", "origin", "no string")
    own = TaskState(skipped=skipped[0], shared_skipped=skipped[1], origin=held["origin"])
    for text, entry in held["entries"].items():
        key = Key.of(text)
        if key.task != task:
            raise _damaged(f"task {task!r}", text, "of another task")
        if key.param not in shapes:
            raise ConfigError(f"`{key.param}` of the state is not collected here: build the collector alike")
        found, here = tuple(told[key.param]), shapes[key.param]
        if found != here:
            raise ConfigError(f"`{key.param}` of the state has shape {found}, here {here}: load the same model's")
        _restore(own, key, entry, _size(key, entry, here, groupings.get(key.param, ())))
    _check_alike(task, held["entries"])
    lacking = sorted(set(told) - {Key.of(text).param for text in held["entries"]})
    if held["entries"] and lacking:
        raise _damaged(f"task {task!r}", lacking[0], "missing")
    return own


def _size(key: Key, held: Mapping[str, Any], shape: tuple[int, ...], groupings: tuple[Grouping, ...]) -> int:
    """How many values an entry has, where that is known here; else as many as its first tensor."""
    first = next((held[part][name] for part, name in _FIRST if name in held.get(part, {})), None)
    if not isinstance(first, Tensor):
        raise _damaged(f"`{key}`", "total", "missing")
    known = [each.size for each in groupings if each.group_type == key.group_type]
    size = known[0] if known else math.prod(shape) if key.group_type == ELEMENT else first.numel()
    if first.numel() != size:
        raise ConfigError(
            f"`{key}` of the state has {first.numel()} groups, here {size}: build the collector alike, or collect anew"
        )
    return size


def _restore(task: TaskState, key: Key, held: Mapping[str, Any], size: int) -> None:
    entry: Entry = key.param, key.group_type
    numbers, tensors = held["numbers"], held["tensors"]
    if "den" in numbers:
        _check_numbers(key, numbers, (*DECAYING, "mass"), ())
        told = {name: numbers[name] for name in DECAYING}
        steps = _count(f"`steps` of `{key}`", told["steps"], 0)
        (num,) = _tensors(key, tensors, ("num",), size)
        task.decaying[entry] = Decaying(num, **{**told, "steps": steps})
        task.mass[entry] = numbers["mass"]
    elif numbers or tensors:
        task.moments = {**task.moments, entry: _moments(key, numbers, tensors, size)}
    if "shared_numbers" in held or "shared" in held:
        task.shared = {**task.shared, entry: _moments(key, held["shared_numbers"], held["shared"], size)}
    if "stored" in held:
        task.stored[entry] = _stored(key, held["stored"], size)


def _moments(key: Key, numbers: Mapping[str, Any], tensors: Mapping[str, Any], size: int) -> Moments:
    _check_numbers(key, numbers, _MOMENTS, _POSITIVE)
    names = ("total",) if set(tensors) == {"total"} else ("total", "spread", "cross")
    return Moments.restored(numbers, dict(zip(names, _tensors(key, tensors, names, size), strict=True)))


def _stored(key: Key, held: Mapping[str, Any], size: int) -> Stored:
    (values,) = _tensors(key, {name: each for name, each in held.items() if name != "scale"}, ("values",), size)
    scale = held.get("scale")
    if (scale is None) != (values.dtype is not torch.float16):
        raise _damaged(f"`{key}`", "scale", "missing" if scale is None else "without roots")
    if scale is not None:
        _check_values(key, "scale", scale)
        if scale.numel() != 1:
            raise _damaged(f"`{key}`", "scale", f"of {scale.numel()} numbers")
        scale = scale.reshape(()).clone()
    return Stored(values, scale)


def _tensors(key: Key, tensors: Mapping[str, Any], names: tuple[str, ...], size: int) -> list[Tensor]:
    """Copies of exactly these tensors [size]."""
    _check_names(key, tensors, names)
    for name in names:
        _check_values(key, name, tensors[name])
        if tensors[name].shape != (size,):
            raise _damaged(f"`{key}`", name, f"of shape {tuple(tensors[name].shape)}, not ({size},)")
    return [tensors[name].clone() for name in names]


def _check_values(key: Key, name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise _damaged(f"`{key}`", name, "no tensor of real numbers")
    if not bool(tensor.isfinite().all()):
        raise _damaged(f"`{key}`", name, "not finite")
    if name in _SQUARES and bool((tensor < 0).any()):
        raise _damaged(f"`{key}`", name, "negative")


def _check_numbers(key: Key, numbers: Mapping[str, Any], names: tuple[str, ...], positive: tuple[str, ...]) -> None:
    _check_names(key, numbers, names)
    for name, value in numbers.items():
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not 0 <= value < math.inf or (name in positive and not value > 0):
            raise _damaged(f"`{key}`", name, f"{value!r}")


def _check_names(key: Key, held: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in sorted(set(held) ^ set(names)):
        raise _damaged(f"`{key}`", name, "missing" if name in names else "unknown")


def _check_alike(task: str, entries: Mapping[str, Any]) -> None:
    """Raise ConfigError where some entries of a task lack what others have."""
    for part in ("tensors", "shared", "stored"):
        forms = {text: frozenset(entry.get(part, ())) for text, entry in entries.items()}
        fullest = max(forms.values(), key=len, default=frozenset())
        for text, form in forms.items():
            if form != fullest:
                raise _damaged(f"`{text}`", sorted(fullest - form)[0], f"missing; others of task {task!r} have it")


def _count(what: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < least:
        raise ConfigError(f"{what} (={value!r}) must be an integer of at least {least}: the state is damaged")
    return int(value)


def _damaged(where: str, name: str, why: str) -> ConfigError:
    return ConfigError(f"`{name}` of {where} is {why}: the state is damaged; collect it anew")
