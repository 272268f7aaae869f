"""Whether the zeros of masks are in the initializers of an ONNX file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from fxsparse.errors import ExportError
from fxsparse.exporters.file_graph import Array
from fxsparse.exporters.placement import Placement, check_zeros, find

if TYPE_CHECKING:
    from fxsparse.exporters.against import TicketLike

_CLOSE = 0.5  # alive entries that must be equal for an initializer to be taken for a weight, when others are not


def held_zeros(
    model: ir.Model, ticket: TicketLike, rows: Mapping[str, Mapping[str, Any]]
) -> tuple[int, list[str], list[str]]:
    """Look for every masked weight of a ticket.

    Args:
        model: the file's content.
        ticket: gives masks and values.
        rows: the file's own rows of the masked weights, which name initializers; may be empty.

    Returns:
        The number of weights found with all zeros, the names of those that were not found, and what is wrong.
    """
    values = ticket.weights if ticket.final is None else ticket.final
    arrays = {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.dtype.is_floating_point()
    }
    aliases: Mapping[str, str] = ticket.manifest["weights"]["aliases"]
    missing: list[str] = []
    wrong: list[str] = []
    for name, tensor in ticket.masks.items():
        mask = tensor.numpy()
        weight = values[name].numpy() * mask
        names = (name, *(alias for alias, of in aliases.items() if of == name))
        places = _places(name, names, weight, arrays, rows.get(name, {}))
        if not places:
            missing.append(name)
        for place in places:
            try:
                check_zeros(place, mask, arrays[place.initializer])
            except ExportError:
                stored = arrays[place.initializer]
                alive = int(np.count_nonzero(stored[~mask.transpose(place.axes).reshape(stored.shape)]))
                wrong.append(f"`{name}`: {alive} dead entries are not zero in initializer `{place.initializer}`")
    return len(ticket.masks) - len(missing), missing, wrong


def equal_zeros(model: ir.Model, other: ir.Model) -> tuple[int, list[str]]:
    """Initializers of one name and shape in both: how many have all zeros of the other's, and what is wrong."""
    found, wrong = 0, []
    for name, value in other.graph.initializers.items():
        mine = model.graph.initializers.get(name)
        if mine is None or mine.const_value is None or value.const_value is None:
            continue
        a, b = mine.const_value, value.const_value
        if a.shape != b.shape or not (a.dtype.is_floating_point() and b.dtype.is_floating_point()) or a.size < 2:
            continue
        alive = int(np.count_nonzero(a.numpy()[b.numpy() == 0]))
        if alive:
            wrong.append(f"initializer `{name}`: {alive} zeros of the other file are not zero")
        found += not alive
    return found, wrong


def _places(
    name: str, names: tuple[str, ...], weight: Array, arrays: Mapping[str, Array], row: Mapping[str, Any]
) -> list[Placement]:
    """Where a weight lies: as the file says, as the values say, or nearly as they say."""
    told = [
        Placement(name, initializer, tuple(axes), exact=False)
        for initializer, axes in row.get("initializers", {}).items()
        if initializer in arrays and arrays[initializer].size == weight.size
    ]
    return told or find(name, names, weight, arrays) or _nearly(name, weight, arrays)


def _nearly(name: str, weight: Array, arrays: Mapping[str, Array]) -> list[Placement]:
    """An initializer of the same sizes in which most alive entries are equal."""
    for initializer, stored in arrays.items():
        if stored.size != weight.size or stored.dtype != weight.dtype or weight.ndim > 4:
            continue
        for axes in itertools.permutations(range(weight.ndim)):
            turned = weight.transpose(axes)
            if turned.shape != stored.shape:
                continue
            alive = turned != 0
            if alive.any() and float((turned[alive] == stored[alive]).mean()) > _CLOSE:
                return [Placement(name, initializer, axes, exact=False)]
    return []
