"""The state of a collector as nested dicts, and as a safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxsparse.curvature.collector_moments import Decaying, Moments
from fxsparse.curvature.collector_tasks import TaskState
from fxsparse.curvature.fisher_squares import Entry
from fxsparse.curvature.keys import Key
from fxsparse.curvature.storage import Stored
from fxsparse.errors import ConfigError

SCHEMA = 1
_FORMAT = "fxsparse.fisher"


def state_of(tasks: Mapping[str, TaskState], settings: Mapping[str, str], generator: torch.Generator) -> dict[str, Any]:
    """The state: schema, settings, the generator's state, and by task the entries by key."""
    return {
        "schema": SCHEMA,
        "settings": dict(settings),
        "generator": generator.get_state(),
        "tasks": {name: _task(name, state) for name, state in tasks.items()},
    }


def _task(name: str, state: TaskState) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for entry in state.entries():
        if state.moments:
            moments = state.moments[entry]
            numbers, tensors = moments.numbers(), moments.tensors()
        else:
            running = state.decaying[entry]
            numbers = {"den": running.den, "steps": float(running.steps), "mass": state.mass[entry]}
            tensors = {} if running.num is None else {"num": running.num}
        entries[str(Key(name, *entry))] = {"numbers": numbers, "tensors": {k: t.clone() for k, t in tensors.items()}}
    for entry, stored in state.stored.items():
        held = {"values": stored.values.clone()} | ({} if stored.scale is None else {"scale": stored.scale.clone()})
        entries.setdefault(str(Key(name, *entry)), {"numbers": {}, "tensors": {}})["stored"] = held
    return {"skipped": state.skipped, "entries": entries}


def tasks_of(
    state: Mapping[str, Any], settings: Mapping[str, str], generator: torch.Generator, parameters: set[str]
) -> dict[str, TaskState]:
    """The tasks of a state, which must come from a collector with these settings.

    Raises:
        ConfigError: another schema, other settings, or a parameter that is not collected here.
    """
    if state.get("schema") != SCHEMA:
        raise ConfigError(f"`schema` (={state.get('schema')!r}) must be {SCHEMA}: the state is of another version")
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise ConfigError(f"`{name}` of the state (={state['settings'].get(name)!r}) differs from {value!r} here")
    tasks: dict[str, TaskState] = {}
    for task, held in state["tasks"].items():
        tasks[task] = TaskState(skipped=int(held["skipped"]))
        for text, entry in held["entries"].items():
            key = Key.of(text)
            if key.param not in parameters:
                raise ConfigError(f"`{key.param}` of the state is not collected here: build the collector alike")
            _restore(tasks[task], (key.param, key.group_type), entry)
    generator.set_state(state["generator"])
    return tasks


def _restore(task: TaskState, entry: Entry, held: Mapping[str, Any]) -> None:
    numbers, tensors = held["numbers"], held["tensors"]
    if "den" in numbers:
        num = tensors.get("num")
        task.decaying[entry] = Decaying(None if num is None else num.clone(), numbers["den"], int(numbers["steps"]))
        task.mass[entry] = numbers["mass"]
    elif numbers:
        task.moments[entry] = Moments.restored(numbers, tensors)
    if "stored" in held:
        task.stored[entry] = Stored(held["stored"]["values"].clone(), held["stored"].get("scale"))


def write(state: Mapping[str, Any], path: Path) -> None:
    """Write a state to one file; an earlier one is replaced only when the new one is whole."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {"generator": state["generator"].cpu()}
    structure: dict[str, Any] = {"schema": state["schema"], "settings": state["settings"], "tasks": {}}
    for task, held in state["tasks"].items():
        entries: dict[str, Any] = {}
        for key, entry in held["entries"].items():
            entries[key] = {"numbers": {name: float(value).hex() for name, value in entry["numbers"].items()}}
            for part in ("tensors", "stored"):
                for name, tensor in entry.get(part, {}).items():
                    tensors[f"{key}|{part}|{name}"] = tensor.detach().cpu().contiguous()
        structure["tasks"][task] = {"skipped": held["skipped"], "entries": entries}
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
            entry["numbers"] = {name: float.fromhex(value) for name, value in entry["numbers"].items()}
            entry["tensors"] = {}
    for name, tensor in tensors.items():
        key, part, field = name.rsplit("|", 2)
        state["tasks"][Key.of(key).task]["entries"][key].setdefault(part, {})[field] = tensor
    return state
