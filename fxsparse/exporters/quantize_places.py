"""Where masked weights lie in an 8-bit file, and whether their zeros are still there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fxsparse.exporters.placement import Placement, check_zeros
from fxsparse.nn import MaskedWeight

_SUFFIXES = ("_quantized", "_transposed_quantized", "_Transposed_quantized")


def places_in_int8(proto: Any, places: Sequence[Placement], weights: Mapping[str, MaskedWeight]) -> list[Placement]:
    """The places of a float file, by the names and axes of its 8-bit twin, without those held there in another form.

    Raises:
        ExportError: a dead entry is not zero.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    found = []
    for place in places:
        if place.part:
            continue
        if place.initializer in tensors:
            found.append(place)
            continue
        name = next((place.initializer + s for s in _SUFFIXES if place.initializer + s in tensors), None)
        if name is None:
            continue
        stored = numpy_helper.to_array(tensors[name])
        shape = tuple(weights[place.weight].mask.permute(place.axes).shape)
        for axes in (place.axes, place.axes[::-1]):
            if tuple(weights[place.weight].mask.permute(axes).shape) == stored.shape:
                moved = replace(place, initializer=name, axes=axes, exact=False)
                if shape[0] != shape[-1] or axes == place.axes:
                    check_zeros(moved, weights[place.weight].mask.numpy(), stored)
                    found.append(moved)
                break
    return found
