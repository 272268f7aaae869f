"""The state of a collector as nested dicts, and as a safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Generator, Tensor

from fxsparse.curvature.collector_moments import Decaying, Moments
from fxsparse.curvature.collector_ranks import rank, ranks
from fxsparse.curvature.collector_reduce import share
from fxsparse.curvature.collector_tasks import TaskState
from fxsparse.curvature.fisher_squares import Entry
from fxsparse.curvature.groups import Grouping
from fxsparse.curvature.keys import Key
from fxsparse.curvature.storage import Stored
from fxsparse.errors import ConfigError

SCHEMA = 2
_FORMAT = "fxsparse.fisher"
_NUMBERS = ("numbers", "shared_numbers")
_VECTORS = (("tensors", "total"), ("tensors", "num"), ("shared", "total"), ("stored", "values"))
_DECAYING = ("den", "steps", "count", "squares")


def state_of(
    tasks: Mapping[str, TaskState],
    settings: Mapping[str, str],
    generator: Generator,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """The state: schema, settings, shapes, the rank and its generator's state, and by task the entries by key."""
    return {
        "schema": SCHEMA,
        "settings": dict(settings),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "rank": rank(),
        "ranks": ranks(),
        "generator": generator.get_state(),
        "tasks": {name: _task(name, state) for name, state in tasks.items()},
    }


def _task(name: str, state: TaskState) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for entry in state.entries():
        held = entries[str(Key(name, *entry))] = {"numbers": {}, "tensors": {}}
        if entry in state.moments:
            moments = state.moments[entry]
            held["numbers"], held["tensors"] = moments.numbers(), _copies(moments.tensors())
        if entry in state.shared:
            moments = state.shared[entry]
            held["shared_numbers"], held["shared"] = moments.numbers(), _copies(moments.tensors())
        if entry in state.decaying:
            running = state.decaying[entry]
            numbers = {each: float(getattr(running, each)) for each in _DECAYING}
            held["numbers"] = {**numbers, "mass": state.mass[entry]}
            held["tensors"] = {} if running.num is None else {"num": running.num.clone()}
    for entry, stored in state.stored.items():
        kept = {"values": stored.values.clone()} | ({} if stored.scale is None else {"scale": stored.scale.clone()})
        entries.setdefault(str(Key(name, *entry)), {"numbers": {}, "tensors": {}})["stored"] = kept
    told = {"skipped": state.skipped, "shared_skipped": state.shared_skipped, "origin": state.origin}
    return {**told, "entries": entries}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def tasks_of(
    state: Mapping[str, Any],
    settings: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    groupings: Mapping[str, tuple[Grouping, ...]],
) -> dict[str, TaskState]:
    """The tasks of a state, which must come from a collector with these settings.

    What one process alone collected is loaded by several as their common sum: it counts once, however many load it.

    Raises:
        ConfigError: another schema, other settings, shapes or groups, a parameter that is not collected here, or what
            another one of several ranks has collected and not reduced.
    """
    if state.get("schema") != SCHEMA:
        raise ConfigError(f"`schema` (={state.get('schema')!r}) must be {SCHEMA}: the state is of another version")
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise ConfigError(f"`{name}` of the state (={state['settings'].get(name)!r}) differs from {value!r} here")
    tasks: dict[str, TaskState] = {}
    for task, held in state["tasks"].items():
        tasks[task] = own = TaskState(skipped=int(held["skipped"]), origin=held["origin"])
        own.shared_skipped = int(held["shared_skipped"])
        for text, entry in held["entries"].items():
            key = Key.of(text)
            if key.param not in shapes:
                raise ConfigError(f"`{key.param}` of the state is not collected here: build the collector alike")
            found, here = tuple(state["shapes"][key.param]), shapes[key.param]
            if found != here:
                raise ConfigError(f"`{key.param}` of the state has shape {found}, here {here}: load the same model's")
            _check_size(key, entry, groupings.get(key.param, ()))
            _restore(own, (key.param, key.group_type), entry)
        if ranks() > 1 and state["ranks"] == 1:
            share(own)
        elif ranks() > 1 and state["rank"] != rank() and (own.moments or own.skipped):
            raise ConfigError(
                f"`rank` of the state (={state['rank']}) has collected for itself in task {task!r}: load it on that "
                "rank alone, or save after all_reduce"
            )
    return tasks


def _check_size(key: Key, held: Mapping[str, Any], groupings: tuple[Grouping, ...]) -> None:
    """Raise ConfigError where the group type is known here, with another number of groups."""
    vectors = [held[part][name] for part, name in _VECTORS if name in held.get(part, {})]
    for grouping in groupings:
        if grouping.group_type == key.group_type and any(each.numel() != grouping.size for each in vectors):
            raise ConfigError(
                f"`{key}` of the state has {vectors[0].numel()} groups, here {grouping.size}: build the collector alike"
            )


def _restore(task: TaskState, entry: Entry, held: Mapping[str, Any]) -> None:
    numbers, tensors = held["numbers"], held["tensors"]
    if "den" in numbers:
        num = tensors.get("num")
        told = {name: numbers[name] for name in _DECAYING}
        task.decaying[entry] = Decaying(None if num is None else num.clone(), **{**told, "steps": int(told["steps"])})
        task.mass[entry] = numbers["mass"]
    elif numbers:
        task.moments[entry] = Moments.restored(numbers, tensors)
    if "shared_numbers" in held:
        task.shared[entry] = Moments.restored(held["shared_numbers"], held["shared"])
    if "stored" in held:
        task.stored[entry] = Stored(held["stored"]["values"].clone(), held["stored"].get("scale"))


def write(state: Mapping[str, Any], path: Path) -> None:
    """Write a state to one file; an earlier one is replaced only when the new one is whole."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {"generator": state["generator"].cpu()}
    structure: dict[str, Any] = {name: state[name] for name in ("schema", "settings", "shapes", "rank", "ranks")}
    structure["tasks"] = {}
    for task, held in state["tasks"].items():
        entries: dict[str, Any] = {}
        for key, entry in held["entries"].items():
            entries[key] = {
                part: {name: float(value).hex() for name, value in entry[part].items()}
                for part in _NUMBERS
                if part in entry
            }
            for part in ("tensors", "shared", "stored"):
                for name, tensor in entry.get(part, {}).items():
                    tensors[f"{key}|{part}|{name}"] = tensor.detach().cpu().contiguous()
        structure["tasks"][task] = {**held, "entries": entries}
    data = save(tensors, metadata={"format": _FORMAT, "structure": json.dumps(structure)})
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(data)
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any]:
    """The state in a file.

    Raises:
        ConfigError: no such file, or one of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"`path` (={path}) is no readable safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ConfigError(f"`path` (={path}) holds {metadata.get('format')!r}, not {_FORMAT!r}")
    state: dict[str, Any] = json.loads(metadata["structure"])
    state["generator"] = tensors.pop("generator")
    for held in state["tasks"].values():
        for entry in held["entries"].values():
            for part in _NUMBERS:
                if part in entry:
                    entry[part] = {name: float.fromhex(value) for name, value in entry[part].items()}
            entry["tensors"] = {}
    for name, tensor in tensors.items():
        key, part, field = name.rsplit("|", 2)
        state["tasks"][Key.of(key).task]["entries"][key].setdefault(part, {})[field] = tensor
    return state
