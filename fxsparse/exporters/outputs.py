"""What a model returns, as named tensors and constants."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxsparse.errors import ExportError

_PLAIN = bool | int | float | complex | str | bytes | torch.dtype | torch.device | torch.Size


@dataclass(frozen=True, eq=False)
class Outputs:
    """The leaves of what a model returned.

    Attributes:
        tensors: by key path, in the order of the structure; complex ones as pairs of numbers on a last axis of 2.
        constants: numbers and texts, by key path; ONNX has no place for them.
        opaque: class names of what is neither, by key path (a cache, say).
    """

    tensors: dict[str, Tensor]
    constants: dict[str, Any]
    opaque: dict[str, str]


def flatten_outputs(outputs: Any) -> Outputs:
    """Take apart mappings, sequences, dataclasses and the classes that torch's pytree knows; None is left out."""
    found = Outputs({}, {}, {})
    for keys, leaf in _leaves(outputs, ()):
        path = ".".join(keys)
        if isinstance(leaf, Tensor):
            found.tensors[path] = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        elif isinstance(leaf, _PLAIN):
            found.constants[path] = leaf
        else:
            found.opaque[path] = type(leaf).__name__
    return found


def _leaves(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if value is None:
        return
    if isinstance(value, Mapping):
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        children = list(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        children = [(str(i), child) for i, child in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif type(value) in pytree.SUPPORTED_NODES:
        inside = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0]
        children = [(str(i), child) for i, child in enumerate(inside)]
    else:
        yield keys, value
        return
    for key, child in children:
        yield from _leaves(child, (*keys, key))


def output_names(outputs: Outputs, taken: Sequence[str]) -> tuple[str, ...]:
    """One ONNX name for each tensor: the keys of mappings, the positions in sequences; none of `taken`.

    Raises:
        ExportError: when an output is neither a tensor nor a plain value, or there is no tensor among them.
    """
    for path, kind in outputs.opaque.items():
        raise ExportError(
            f"output `{_name(path)}` (={kind}) is no tensor and ONNX has no place for it: "
            "return tensors only, or export a wrapper that drops it"
        )
    names: list[str] = []
    for path in outputs.tensors:
        name = _name(path)
        while name in taken or name in names:
            name += "_out"
        names.append(name)
    if not names:
        raise ExportError("the model returns no tensor: nothing can be exported")
    return tuple(names)


def output_notes(outputs: Outputs) -> list[str]:
    """What of the outputs the file does not hold, or holds in another form, in words."""
    return [
        f"output `{_name(path)}` (={str(value)[:80]}) is no tensor: the file leaves it out"
        for path, value in outputs.constants.items()
    ]


def _name(path: str) -> str:
    name = re.sub(r"\W", "_", path) or "output"
    return f"output_{name}" if name[0].isdigit() else name
