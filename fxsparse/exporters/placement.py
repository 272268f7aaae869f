"""Where the weights of a model lie in an ONNX file, and whether their zeros are still there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
        axes: the initializer is the weight with its axes in this order, then in the initializer's own shape.
        exact: whether the values are the weight's, bit for bit (else rescaled, as by a folded normalisation).
        part: whether it holds some rows of the weight only, among others; `axes` is empty then.
    """

    weight: str
    initializer: str
    axes: tuple[int, ...]
    exact: bool
    part: bool = False


def find(
    weight: str,
    aliases: Sequence[str],
    values: Array,
    initializers: Mapping[str, Array],
    others: Sequence[Array] = (),
) -> list[Placement]:
    """All initializers that store `values`; `others` are the other parameters of the model.

    1. Whole, bit for bit, in any order of axes and any shape.
    2. Whole, under the weight's own name, with other values.
    3. Else in parts: every row that has an alive entry lies in some initializer bit for bit (split, joined, reordered).
    4. Else whole, by the pattern of zeros.
    """
    found = []
    for name, stored in initializers.items():
        axes = _order(values, stored)
        if axes is not None:
            found.append(Placement(weight, name, axes, exact=True))
        elif name in aliases and stored.shape == values.shape:
            found.append(Placement(weight, name, tuple(range(values.ndim)), exact=False))
    found = found or [Placement(weight, name, (), True, part=True) for name in _parts(values, initializers, others)]
    if not found and 0 < np.count_nonzero(values) < values.size:
        zeros = values == 0
        for name, stored in initializers.items():
            if stored.dtype == values.dtype and sorted(stored.shape) == sorted(values.shape):
                axes = _order(zeros, stored == 0)
                if axes is not None:
                    found.append(Placement(weight, name, axes, exact=False))
    return found


def locate(
    weights: Mapping[str, MaskedWeight], folded: Mapping[str, Tensor], initializers: Mapping[str, Array]
) -> list[Placement]:
    """Every place of every masked weight in a file; all have zeros at the dead entries.

    Args:
        weights: the masked weights by name.
        folded: all parameters with the masks folded.
        initializers: the arrays of the file by name.

    Raises:
        ExportError: when a dead entry is not zero.
    """
    places = []
    arrays = {name: tensor.detach().numpy() for name, tensor in folded.items()}
    for name, weight in weights.items():
        others = [array for other, array in arrays.items() if other not in weight.names]
        found = find(name, weight.names, arrays[name], initializers, others)
        for place in found:
            check_zeros(place, weight.mask.numpy(), initializers[place.initializer])
        places += found
    return places


def check_zeros(placement: Placement, alive: Array, stored: Array) -> None:
    """Raise ExportError unless every dead entry of the weight is an exact zero in the file.

    Parts need no look: their rows are those of the weight, whose dead entries are zeros, bit for bit.
    """
    if placement.part:
        return
    revived = int(np.count_nonzero(stored[~_laid(placement, alive, stored)]))
    if revived:
        raise ExportError(
            f"`{placement.weight}`: {revived} dead entries are not zero in initializer `{placement.initializer}`; "
            "the exporter changed them, so the file would not hold the ticket"
        )


def check_file(
    proto: Any,
    places: Sequence[Placement],
    weights: Mapping[str, MaskedWeight],
    folder: Path | None = None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Check the zeros once more, in the message that is written.

    Args:
        proto: the message.
        places: where the weights lie.
        weights: the weights.
        folder: where files of the message's initializers lie.
        values: initializers that are added as the message is written, as `onnx_ir` holds them.

    Raises:
        ExportError: a dead entry is not zero, or an initializer is gone.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for place in places:
        if place.initializer not in tensors:
            raise ExportError(f"`{place.weight}`: initializer `{place.initializer}` is not in the file")
        tensor, later = tensors[place.initializer], (values or {}).get(place.initializer)
        if later is not None and tensor.external_data:
            stored = later.numpy()
        else:
            stored = numpy_helper.to_array(tensor, base_dir=str(folder or ""))
        check_zeros(place, weights[place.weight].mask.numpy(), stored)


def dense_twin(proto: Any, places: Sequence[Placement], weights: Mapping[str, MaskedWeight]) -> bytes:
    """The same file with every weight alive; `proto` itself becomes it, which saves a copy."""
    from onnx import numpy_helper

    by_name = {place.initializer: place for place in places if not place.part}
    for tensor in proto.graph.initializer:
        if tensor.name in by_name:
            place = by_name[tensor.name]
            filled = fill_dead(place, weights[place.weight].mask.numpy(), numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(filled, tensor.name))
    return bytes(proto.SerializeToString())


def fill_dead(placement: Placement, alive: Array, stored: Array) -> Array:
    """A dense twin of an initializer: its dead entries become values of the size of the alive ones."""
    dead = ~_laid(placement, alive, stored)
    scale = float(np.abs(stored[~dead]).mean()) if (~dead).any() else 1.0
    noise = np.random.default_rng(0).uniform(0.5, 1.5, size=stored.shape) * (scale or 1.0)
    return np.where(dead, noise, stored).astype(stored.dtype)


def _laid(placement: Placement, alive: Array, stored: Array) -> Array:
    """The mask in the layout of the initializer."""
    return alive.transpose(placement.axes).reshape(stored.shape)


def _order(values: Array, stored: Array) -> tuple[int, ...] | None:
    """The order of axes in which `values` read like `stored`, whatever its shape."""
    if values.dtype != stored.dtype or values.size != stored.size:
        return None
    if np.count_nonzero(values) != np.count_nonzero(stored) or values.size and values.max() != stored.max():
        return None
    permutations = itertools.permutations(range(values.ndim))
    same: list[tuple[int, ...]] = []
    other: list[tuple[int, ...]] = []
    for axes in permutations:
        (same if values.transpose(axes).shape == stored.shape else other).append(axes)
    for axes in (*same, *other) if values.any() else same:
        if np.array_equal(values.transpose(axes).reshape(stored.shape), stored):
            return axes
    return None


def _parts(values: Array, initializers: Mapping[str, Array], others: Sequence[Array]) -> list[str]:
    """The initializers that hold all rows of `values` together, beside rows of `others`; empty when one is missing.

    Any row that is neither the weight's nor another's could be a dead one that came to life.
    """
    if values.ndim < 2 or not values.any():
        return []
    for axis in range(min(values.ndim, 2)):
        length = values.size // values.shape[axis]
        rows = _rows(np.moveaxis(values, axis, 0).reshape(-1, length))
        missing, names = set(rows), []
        for name, stored in initializers.items():
            for view in _views(stored, length) if stored.dtype == values.dtype else ():
                held = _rows(view)
                if held & rows and _all_known(held - rows, others, length):
                    names.append(name)
                    missing -= held
                    break
        if not missing:
            return names
    return []


def _all_known(rows: set[bytes], others: Sequence[Array], length: int) -> bool:
    left = set(rows)
    for other in others if left else ():
        for view in _views(other, length):
            left -= _rows(view)
    return not left


def _views(stored: Array, length: int) -> Iterator[Array]:
    """An array as rows of `length` numbers, along every axis where that is possible."""
    for axis in range(stored.ndim):
        if stored.shape[axis] == length:
            yield np.moveaxis(stored, axis, -1).reshape(-1, length)
        elif stored.shape[axis] and stored.size // stored.shape[axis] == length:
            yield np.moveaxis(stored, axis, 0).reshape(-1, length)


def _rows(matrix: Array) -> set[bytes]:
    """The rows with an entry that is not zero."""
    return {row.tobytes() for row in np.ascontiguousarray(matrix) if row.any()}
