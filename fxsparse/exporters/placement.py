"""Where the weights of a model lie in an ONNX file, and whether their zeros are still there."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fxsparse.errors import ExportError
from fxsparse.nn import MaskedWeight

Array = NDArray[Any]


@dataclass(frozen=True)
class Placement:
    """One initializer that stores a weight.

    Attributes:
        weight: name of the parameter.
        initializer: name of the initializer.
        axes: the initializer is the weight with its axes in this order.
        exact: whether the values are the weight's, bit for bit (else rescaled, as by a folded normalisation).
    """

    weight: str
    initializer: str
    axes: tuple[int, ...]
    exact: bool


def find(weight: str, aliases: Sequence[str], values: Array, initializers: Mapping[str, Array]) -> list[Placement]:
    """All initializers that store `values`: by bits in any order of axes, by name, or else by the pattern of zeros."""
    found = []
    for name, stored in initializers.items():
        axes = _order(values, stored)
        if axes is not None:
            found.append(Placement(weight, name, axes, exact=True))
        elif name in aliases and stored.shape == values.shape:
            found.append(Placement(weight, name, tuple(range(values.ndim)), exact=False))
    if not found and 0 < np.count_nonzero(values) < values.size:
        zeros = values == 0
        for name, stored in initializers.items():
            axes = _order(zeros, stored == 0)
            if axes is not None and stored.dtype == values.dtype:
                found.append(Placement(weight, name, axes, exact=False))
    return found


def locate(
    weights: Mapping[str, MaskedWeight], folded: Mapping[str, Tensor], initializers: Mapping[str, Array]
) -> list[Placement]:
    """Every place of every masked weight in a file; all have zeros at the dead entries.

    Args:
        weights: the masked weights by name.
        folded: the parameters with the masks folded.
        initializers: the arrays of the file by name.

    Raises:
        ExportError: when a dead entry is not zero.
    """
    places = []
    for name, weight in weights.items():
        found = find(name, weight.names, folded[name].detach().numpy(), initializers)
        for place in found:
            check_zeros(place, weight.mask.numpy(), initializers[place.initializer])
        places += found
    return places


def check_zeros(placement: Placement, alive: Array, stored: Array) -> None:
    """Raise ExportError unless every dead entry of the weight is an exact zero in the file."""
    revived = int(np.count_nonzero(stored[~alive.transpose(placement.axes)]))
    if revived:
        raise ExportError(
            f"`{placement.weight}`: {revived} dead entries are not zero in initializer `{placement.initializer}`; "
            "the exporter changed them, so the file would not hold the ticket"
        )


def dense_twin(proto: Any, places: Sequence[Placement], weights: Mapping[str, MaskedWeight]) -> bytes:
    """The same file with every weight alive."""
    from onnx import ModelProto, numpy_helper

    dense = ModelProto()
    dense.CopyFrom(proto)
    by_name = {place.initializer: place for place in places}
    for tensor in dense.graph.initializer:
        if tensor.name in by_name:
            place = by_name[tensor.name]
            filled = fill_dead(place, weights[place.weight].mask.numpy(), numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(filled, tensor.name))
    return bytes(dense.SerializeToString())


def fill_dead(placement: Placement, alive: Array, stored: Array) -> Array:
    """A dense twin of an initializer: its dead entries become values of the size of the alive ones."""
    dead = ~alive.transpose(placement.axes)
    scale = float(np.abs(stored[~dead]).mean()) if (~dead).any() else 1.0
    noise = np.random.default_rng(0).uniform(0.5, 1.5, size=stored.shape) * (scale or 1.0)
    return np.where(dead, noise, stored).astype(stored.dtype)


def _order(values: Array, stored: Array) -> tuple[int, ...] | None:
    if values.dtype != stored.dtype or sorted(values.shape) != sorted(stored.shape):
        return None
    for axes in itertools.permutations(range(values.ndim)):
        moved = values.transpose(axes)
        if moved.shape == stored.shape and np.array_equal(moved, stored):
            return axes
    return None
