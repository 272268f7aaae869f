"""Nested state (dicts, lists, numbers, tensors) as named tensors and JSON, bit for bit, without pickle.

Snapshots hold whole training states: the point that a lottery ticket rewinds to, and the checkpoints from which a
killed run goes on. On disk a snapshot is a directory of two files, ``tensors.safetensors`` and ``state.json``.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxsparse.errors import ConfigError, DataError

TENSORS = "tensors.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class Snapshot:
    """A nested state, cut into tensors and JSON.

    Attributes:
        tensors: copies on the CPU, by their path in the state, parts joined by ``/``.
        values: everything else, as JSON; tensors stand in it as ``{"$tensor": path}``.
    """

    tensors: Mapping[str, torch.Tensor]
    values: Any

    @classmethod
    def of(cls, state: object) -> Snapshot:
        """Copy a nested state.

        Raises:
            ConfigError: when a leaf is neither None, bool, number, string nor tensor; its path is named.
        """
        tensors: dict[str, torch.Tensor] = {}
        return cls(tensors, _pack(state, "", tensors))

    def state(self) -> Any:
        """The nested state again; every tensor is a fresh copy."""
        return _unpack(self.values, self.tensors)

    def write(self, directory: Path) -> None:
        """Write both files into an existing directory (making that durable and atomic is the caller's business)."""
        from safetensors.torch import save

        # `save_file` would raise its own error on a full disk, not an OSError
        (directory / TENSORS).write_bytes(save({name: tensor.contiguous() for name, tensor in self.tensors.items()}))
        (directory / STATE).write_text(json.dumps(self.values, sort_keys=True, allow_nan=False), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Snapshot:
        """Read what `write` wrote.

        Raises:
            DataError: a file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            values = json.loads((directory / STATE).read_text(encoding="utf-8"))
            tensors = load_file(directory / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(f"snapshot `directory` (={directory}) cannot be read: {error}; delete it") from error
        return cls(tensors, values)


def _join(path: str, part: object) -> str:
    return f"{path}/{part}" if path else str(part)


def _pack(value: object, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().to("cpu", copy=True)
        return {"$tensor": path}
    if isinstance(value, list | tuple):
        items = [_pack(item, _join(path, index), tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        tag = "$counter" if isinstance(value, collections.Counter) else "$dict"
        pairs = [[_pack(key, path, tensors), _pack(item, _join(path, key), tensors)] for key, item in value.items()]
        return {tag: pairs}
    raise ConfigError(
        f"state `{path}` (={value!r}) of type {type(value).__name__} cannot be stored without pickle; "
        "keep only None, numbers, strings and tensors in state dictionaries"
    )


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "$tensor":
        return tensors[content].clone()
    if tag == "$float":
        return float(content)
    if tag == "$tuple":
        return tuple(_unpack(item, tensors) for item in content)
    pairs = {_unpack(key, tensors): _unpack(item, tensors) for key, item in content}
    return collections.Counter(pairs) if tag == "$counter" else pairs
