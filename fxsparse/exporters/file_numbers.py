"""Whole numbers that an ONNX graph computes from sizes: entries of shapes, bounds of slices, targets of reshapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fxsparse.exporters.file_graph import Array, fixed, integer, integers

_MOST = 64  # entries up to which a list is one of sizes
LAST = 2**31 - 1  # an end of a slice from which on it means the last entry
WHOLE = (ir.DataType.INT32, ir.DataType.INT64)

Size = int | str | None
Entries = NDArray[np.object_]  # a number or a list of numbers: ints, names of free sizes, None where unknown
Operands = list[Entries | None]
Rule = Callable[["Numbers", ir.Node, Operands], Entries | None]


def names(value: ir.Value | None) -> list[Size] | None:
    """Sizes of a value: a number, a name that stands for one, or None; None where its rank is unknown."""
    shape = stored.shape if value is not None and (stored := _stored(value)) is not None else None
    if shape is None and value is not None:
        shape = value.shape
    return None if shape is None else [size if isinstance(size, int) else size.value for size in shape]


def content(value: ir.Value, most: int) -> Array | None:
    """The array of a constant of at most so many bytes; None for others. Larger ones are not read."""
    stored = _stored(value)
    return None if stored is None or stored.nbytes > most else fixed(value)


def _stored(value: ir.Value) -> ir.TensorProtocol | None:
    if value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    return ir.convenience.get_const_tensor(value) if node is not None and node.op_type == "Constant" else None


def unknown(size: Size) -> bool:
    """Whether nothing is known of a size; a name says that it equals others of that name."""
    return size is None or (isinstance(size, str) and size.startswith("unk__"))  # what inference makes up


def known(entries: Entries) -> list[int] | None:
    """The numbers, where all are known."""
    found = entries.reshape(-1).tolist()
    return found if all(isinstance(entry, int) for entry in found) else None


class Numbers:
    """The whole numbers that the nodes of a graph compute from sizes, read in the order of the graph.

    Attributes:
        computed: those that are known, also in part.
    """

    def __init__(self) -> None:
        self.computed: dict[ir.Value, Entries] = {}

    def read(self, node: ir.Node) -> None:
        """Add what a node computes; the sizes of its operands and results are known by now."""
        rule = _RULES.get(node.op_type)
        made = rule(self, node, [self.of(value) for value in node.inputs]) if rule is not None else None
        if made is not None and made.size <= _MOST:
            self.computed[node.outputs[0]] = made

    def of(self, value: ir.Value | None) -> Entries | None:
        """A scalar or list of whole numbers; None where it is none, or a long one."""
        if value is None:
            return None
        array = content(value, 8 * _MOST)
        if array is None:
            return self.computed.get(value)
        if array.ndim > 1 or array.dtype not in (np.int64, np.int32, np.bool_):
            return None
        return np.array(array.tolist(), dtype=object)

    def integers(self, value: ir.Value | None) -> list[int] | None:
        """The same as a list, where all of it is known."""
        found = self.of(value)
        return None if found is None else known(found)


def _shape(numbers: Numbers, node: ir.Node, operands: Operands) -> Entries | None:
    found = names(node.inputs[0])
    if found is None:
        return None
    cut = slice(integer(node, "start", 0), node.attributes.get_int("end"))
    return _entries([None if unknown(size) else size for size in found[cut]])


def _entries(found: Sequence[Size]) -> Entries:
    made = np.empty(len(found), dtype=object)
    made[:] = found
    return made


def _same(numbers: Numbers, node: ir.Node, operands: Operands) -> Entries | None:
    return operands[0]


def _cast(numbers: Numbers, node: ir.Node, operands: Operands) -> Entries | None:
    return operands[0] if integer(node, "to", 0) in WHOLE else None


def _gather(numbers: Numbers, node: ir.Node, operands: Operands) -> Entries | None:
    data, order = operands[0], numbers.of(node.inputs[1])
    if data is None or order is None or data.ndim != 1 or numbers.integers(node.inputs[1]) is None:
        return None
    places = order.astype(np.int64)
    if ((places < -data.size) | (places >= data.size)).any():
        return None
    return np.array(data[places], dtype=object)


def bounds(numbers: Numbers, node: ir.Node) -> list[tuple[int, Size, Size, int]] | None:
    """Axis, start, end and step of what a Slice cuts; None where the axes or steps are not known."""
    if len(node.inputs) == 1:  # before operator set 10
        starts, ends, axes = (integers(node, name) for name in ("starts", "ends", "axes"))
        steps: list[int] | None = None
        first, last = (None if each is None else _entries(each) for each in (starts, ends))
    else:
        first, last, *_ = (numbers.of(value) for value in node.inputs[1:3])
        axes, steps = (numbers.integers(value) for value in (*node.inputs, None, None)[3:5])
        if any(value is not None and not numbers.integers(value) for value in node.inputs[3:5]):
            return None
    if first is None or last is None or first.shape != last.shape or first.ndim != 1:
        return None
    axes, steps = axes or list(range(first.size)), steps or [1] * first.size
    return list(zip(axes, first.tolist(), last.tolist(), steps, strict=True))


def _slice(numbers: Numbers, node: ir.Node, operands: Operands) -> Entries | None:
    data, cuts = operands[0], bounds(numbers, node)
    if data is None or data.ndim != 1 or cuts is None or len(cuts) != 1:
        return None
    _, start, end, step = cuts[0]
    return data[start:end:step] if isinstance(start, int) and isinstance(end, int) else None


def _concat(numbers: Numbers, node: ir.Node, operands: Operands) -> Entries | None:
    parts = []
    for value, part in zip(node.inputs, operands, strict=True):
        if part is None:
            found = names(value)
            if found is None or len(found) != 1 or not isinstance(found[0], int) or found[0] > _MOST:
                return None
            part = _entries([None] * found[0])
        parts.append(part)
    return np.concatenate(parts) if all(part.ndim == 1 for part in parts) else None


def _restack(numbers: Numbers, node: ir.Node, operands: Operands) -> Entries | None:
    """Squeeze, Unsqueeze and Reshape between a number and a list."""
    data, found = operands[0], names(node.outputs[0])
    if data is None or found is None or len(found) > 1 or (not found and data.size != 1):
        return None
    return data.reshape([data.size] * len(found))


def _given(operands: Operands) -> list[Entries] | None:
    """The operands, where all are known in part."""
    given = [each for each in operands if each is not None]
    return given if len(given) == len(operands) else None


def _computed(function: Callable[[int, int], int | None]) -> Rule:
    def compute(numbers: Numbers, node: ir.Node, operands: Operands) -> Entries | None:
        given = _given(operands)
        if given is None:
            return None
        result = given[0]
        for part in given[1:]:
            try:
                result = np.array(np.frompyfunc(_both(function), 2, 1)(result, part), dtype=object)
            except ValueError:  # lengths that cannot be broadcast
                return None
        return result

    return compute


def _both(function: Callable[[int, int], int | None]) -> Callable[[Size, Size], Size]:
    def checked(a: Size, b: Size) -> Size:
        result = function(a, b) if isinstance(a, int) and isinstance(b, int) else None
        return result if result is not None and abs(result) <= LAST else None  # beyond, it may wrap around

    return checked


def _divided(a: int, b: int) -> int | None:
    return a // b if a >= 0 and b > 0 else None


def _remainder(a: int, b: int) -> int | None:
    return a % b if a >= 0 and b > 0 else None


def _equal(numbers: Numbers, node: ir.Node, operands: Operands) -> Entries | None:
    given = _given(operands)
    if given is None:
        return None

    def equal(a: Size, b: Size) -> Size:
        if isinstance(a, int) and isinstance(b, int):
            return int(a == b)
        negative = any(isinstance(each, int) and each < 0 for each in (a, b))
        return 0 if negative and a is not None and b is not None else None  # no size is negative

    try:
        return np.array(np.frompyfunc(equal, 2, 1)(*given), dtype=object)
    except ValueError:  # lengths that cannot be broadcast
        return None


def _where(numbers: Numbers, node: ir.Node, operands: Operands) -> Entries | None:
    given = _given(operands)
    if given is None:
        return None
    try:
        picked = np.frompyfunc(lambda c, a, b: (a if c else b) if isinstance(c, int) else None, 3, 1)(*given)
    except ValueError:  # lengths that cannot be broadcast
        return None
    return np.array(picked, dtype=object)


def _filled(numbers: Numbers, node: ir.Node, operands: Operands) -> Entries | None:
    target, value = numbers.integers(node.inputs[0]), node.attributes.get_tensor("value")
    if value is None or value.dtype not in WHOLE or target is None or len(target) != 1 or target[0] > _MOST:
        return None
    return _entries([int(value.numpy().reshape(-1)[0])] * target[0])


def _product(numbers: Numbers, node: ir.Node, operands: Operands) -> Entries | None:
    entries, found = numbers.integers(node.inputs[0]), names(node.outputs[0])
    if entries is None or operands[0] is None or operands[0].ndim != 1 or found not in ([], [1]):
        return None
    return np.array([math.prod(entries)] if found else math.prod(entries), dtype=object)


_RULES: dict[str, Rule] = {
    "Shape": _shape,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Identity": _same,
    "Cast": _cast,
    "Squeeze": _restack,
    "Unsqueeze": _restack,
    "Reshape": _restack,
    "Add": _computed(lambda a, b: a + b),
    "Sub": _computed(lambda a, b: a - b),
    "Mul": _computed(lambda a, b: a * b),
    "Max": _computed(max),
    "Min": _computed(min),
    "Div": _computed(_divided),
    "Mod": _computed(_remainder),
    "Equal": _equal,
    "Where": _where,
    "ConstantOfShape": _filled,
    "ReduceProd": _product,
}
