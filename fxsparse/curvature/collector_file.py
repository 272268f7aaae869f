"""The state of a collector as nested dicts, and as a safetensors file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from fxsparse.curvature.collector_ranks import rank, ranks
from fxsparse.curvature.collector_tasks import TaskState
from fxsparse.curvature.keys import Key
from fxsparse.errors import ConfigError, FxSparseError

SCHEMA = 2
_FORMAT = "fxsparse.fisher"
_NUMBERS = ("numbers", "shared_numbers")
DECAYING = ("den", "steps", "count", "squares")


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
            numbers = {each: float(getattr(running, each)) for each in DECAYING}
            held["numbers"] = {**numbers, "mass": state.mass[entry]}
            held["tensors"] = {} if running.num is None else {"num": running.num.clone()}
    for entry, stored in state.stored.items():
        kept = {"values": stored.values.clone()} | ({} if stored.scale is None else {"scale": stored.scale.clone()})
        entries.setdefault(str(Key(name, *entry)), {"numbers": {}, "tensors": {}})["stored"] = kept
    told = {"skipped": state.skipped, "shared_skipped": state.shared_skipped, "origin": state.origin}
    return {**told, "entries": entries}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


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
    told = json.dumps(structure)
    data = save(tensors, metadata={"format": _FORMAT, "structure": told, "sha256": _sha256(told, tensors)})
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(data)
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any]:
    """The state in a file.

    Raises:
        ConfigError: no such file, or one of another kind, or a damaged one.
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
    with undamaged(f"`path` (={path})"):
        if metadata.get("sha256", "") not in ("", _sha256(metadata["structure"], tensors)):  # "": of earlier versions
            raise ValueError("its contents are not those that were written")
        return _state(json.loads(metadata["structure"]), tensors)


def _sha256(structure: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(structure.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def undamaged(what: str) -> Iterator[None]:
    """Raise ConfigError for what has another form than `state_of` gives it."""
    try:
        yield
    except FxSparseError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{what} is damaged: {type(error).__name__} ({error}); collect it anew") from error


def _state(state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
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
