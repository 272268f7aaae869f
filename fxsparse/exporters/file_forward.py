"""Sizes of an ONNX graph node by node, with the whole numbers that are computed from sizes on the way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_graph import ONNX, integer, is_outer, opset
from fxsparse.exporters.file_numbers import LAST, WHOLE, Entries, Numbers, Size, bounds, content, known, names, unknown

_READ = 4096  # bytes of a constant that inference reads


def read_sizes(model: ir.Model) -> dict[ir.Value, Entries]:
    """Fill in sizes of the main graph that ONNX's own inference does not follow.

    That one takes a graph as a whole, but loses sizes behind a division or a remainder, and names of free sizes behind
    a Slice. Here every node of unknown sizes is inferred by itself, with all numbers that are known by then.

    Returns:
        The whole numbers that nodes compute from sizes, as far as known.
    """
    numbers = Numbers()
    for node in model.graph:
        if node.domain in ONNX and not is_outer(node) and node.op_type != "Constant":
            if any(_open(value) for value in node.outputs):
                _size(numbers, node, opset(model))
            numbers.read(node)
    return numbers.computed


def _size(numbers: Numbers, node: ir.Node, version: int) -> None:
    sizer = _SIZES.get(node.op_type)
    made = sizer(numbers, node) if sizer is not None else None
    if made is not None:
        _fill(node.outputs[0], made)
        return
    for value, (kind, sizes) in zip(node.outputs, _inferred(numbers, node, version), strict=False):
        if kind and value.type is None:
            value.type = ir.TensorType(ir.DataType(kind))
        if sizes is not None:
            _fill(value, sizes)


def _inferred(numbers: Numbers, node: ir.Node, version: int) -> list[tuple[int, list[Size] | None]]:
    """Type and sizes of the outputs by the operator's own rule."""
    import onnx

    types, data = {}, {}
    for value in node.inputs:
        if value is not None:
            if not isinstance(value.type, ir.TensorType):
                return []
            name = value.name or ""
            types[name] = onnx.helper.make_tensor_type_proto(int(value.type.dtype), names(value))
            if (read := _data(numbers, value)) is not None:
                data[name] = read
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
        found = onnx.shape_inference.infer_node_outputs(schema, ir.to_proto(node), types, data)
    except Exception:  # an operator without a schema, or sizes that contradict it: they stay unknown
        return []
    made: list[tuple[int, list[Size] | None]] = []
    for value in node.outputs:
        tensor = found[value.name].tensor_type if value.name in found else None
        dims = tensor.shape.dim if tensor is not None and tensor.HasField("shape") else None
        sizes = (
            None if dims is None else [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims]
        )
        made.append((tensor.elem_type if tensor is not None else 0, sizes))
    return made


def _data(numbers: Numbers, value: ir.Value) -> Any:
    """A constant, or numbers that are all known, as a message; None where there are none."""
    import onnx

    array = content(value, _READ)
    if array is None:
        found = numbers.of(value)
        if found is None or known(found) is None or value.dtype is None or value.dtype not in WHOLE:
            return None
        array = found.astype(value.dtype.numpy())
    return onnx.numpy_helper.from_array(np.ascontiguousarray(array))


def _open(value: ir.Value) -> bool:
    return value.shape is None or any(unknown(size) for size in names(value) or ())


def _fill(value: ir.Value, found: Sequence[Size]) -> None:
    """Write sizes where they were not known."""
    old = names(value)
    if old is None or len(old) != len(found):
        value.shape = ir.Shape(found)
    else:
        value.shape = ir.Shape([b if unknown(a) and b is not None else a for a, b in zip(old, found, strict=True)])


def _reshaped(numbers: Numbers, node: ir.Node) -> list[Size] | None:
    x, target = names(node.inputs[0]), numbers.of(node.inputs[1]) if len(node.inputs) > 1 else None
    if target is None or target.ndim != 1:
        return None
    copies = not integer(node, "allowzero", 0)
    made: list[Size] = []
    for i, entry in enumerate(target.tolist()):
        if entry == 0 and copies:
            made.append(x[i] if x is not None and i < len(x) else None)
        else:
            made.append(entry)
    if -1 in made:
        made[made.index(-1)] = _rest(x, [size for size in made if size != -1])
    return [None if isinstance(size, int) and size < 0 else size for size in made]


def _rest(x: Sequence[Size] | None, others: Sequence[Size]) -> Size:
    """What is left of the sizes of a value when those of other axes are taken away."""
    if x is None or any(unknown(size) for size in (*x, *others)):
        return None
    over = Counter(size for size in x if isinstance(size, str))
    under = Counter(size for size in others if isinstance(size, str))
    left, number = over - under, math.prod(size for size in x if isinstance(size, int))
    by = math.prod(size for size in others if isinstance(size, int))
    if under - over or not by or number % by:
        return None
    if not left:
        return number // by
    return next(iter(left)) if left.total() == 1 and number == by else None


def _sliced(numbers: Numbers, node: ir.Node) -> list[Size] | None:
    made, cuts = names(node.inputs[0]), bounds(numbers, node)
    if made is None or cuts is None:
        return None
    for axis, start, end, step in cuts:
        size = made[axis]
        if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
            made[axis] = len(range(size)[start:end:step])
        elif not (start == 0 and step == 1 and isinstance(end, int) and end >= LAST):
            made[axis] = None
    return made


def _expanded(numbers: Numbers, node: ir.Node) -> list[Size] | None:
    x, target = names(node.inputs[0]), numbers.of(node.inputs[1])
    if x is None or target is None or target.ndim != 1:
        return None
    rank = max(len(x), target.size)
    pairs = zip([1] * (rank - len(x)) + x, [1] * (rank - target.size) + target.tolist(), strict=True)
    return [_broadcast(a, b) for a, b in pairs]


def _broadcast(a: Size, b: Size) -> Size:
    """The common size of two axes; what is neither 1 nor the other's size does not run."""
    for one, other in ((a, b), (b, a)):
        if one == 1 or (isinstance(other, int) and other != 1):
            return other
    return a if a == b else None


def _of_shape(numbers: Numbers, node: ir.Node) -> list[Size] | None:
    target = numbers.of(node.inputs[0])
    return None if target is None or target.ndim != 1 else target.tolist()


_SIZES: dict[str, Callable[[Numbers, ir.Node], list[Size] | None]] = {
    "Reshape": _reshaped,
    "Slice": _sliced,
    "Expand": _expanded,
    "ConstantOfShape": _of_shape,
}
