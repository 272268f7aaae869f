"""Products with shared supports become gathers and small dense products, in an ONNX graph.

Linear ones run feature-major, [features, rows]: one Gather of the inputs of all groups, one batched MatMul, one
Reshape. Elementwise operators between two of them stay in that layout, so a chain has one Transpose at each end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_graph import ONNX, Array, add_constant, add_node, fixed, integer, sizes
from fxsparse.exporters.file_rules import UNARY
from fxsparse.exporters.file_supports import Layer, Support

_BETWEEN = (*UNARY, "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "PRelu", "Clip")


@dataclass(frozen=True, eq=False)
class Turned:
    """A value in feature-major layout.

    Attributes:
        value: [features, rows].
        lead: a value in the ordinary layout whose sizes but the last are those of this one.
        places: where the features lie; None where they are in their order and nothing is between.
    """

    value: ir.Value
    lead: ir.Value
    places: Array | None = None


class Lowering:
    """One rewriting of a main graph.

    Args:
        model: changed in place.
        choices: the layers to lower, by node.
    """

    def __init__(self, model: ir.Model, choices: Mapping[ir.Node, tuple[Layer, Support]]) -> None:
        self.graph = model.graph
        self.choices = choices
        self._turned: dict[ir.Value, Turned] = {}
        self._weights: dict[tuple[str, str, int], ir.Value] = {}
        self._columns: dict[tuple[str, int], ir.Value] = {}
        self._replaced: list[ir.Node] = []

    def run(self) -> None:
        """Rewrite; what is no longer needed goes."""
        wanted = self._between()
        for node in list(self.graph):
            if node in self.choices:
                layer, support = self.choices[node]
                (self._lower_conv if layer.is_conv else self._lower_linear)(node, layer, support)
            elif node in wanted:
                self._carry(node)
        for node in self._replaced:
            self._turn_back(node.outputs[0])
        for node in reversed(self._replaced):
            self.graph.remove(node, safe=True)

    def _between(self) -> set[ir.Node]:
        """Elementwise nodes whose results reach a linear layer that is lowered through such nodes only."""
        wanted: set[ir.Node] = set()
        for node in reversed(list(self.graph)):
            users = [user for user, index in node.outputs[0].uses()] if node.outputs else []
            reaches = any(user in wanted or self._is_linear(user) for user in users)
            if node.op_type in _BETWEEN and node.domain in ONNX and reaches:
                wanted.add(node)
        return wanted

    def _is_linear(self, node: ir.Node) -> bool:
        return node in self.choices and not self.choices[node][0].is_conv

    def _lower_conv(self, node: ir.Node, layer: Layer, support: Support) -> None:
        x, value = node.inputs[0], node.inputs[1]
        weight = fixed(value)
        assert x is not None and value is not None and weight is not None
        found, groups = sizes(x), support.columns.shape[0]
        if found is not None:
            found[1] = groups * support.k
        columns = self._constant(layer.weight, support.columns.reshape(-1), support.group, None)
        gathered = add_node(self.graph, node, "Gather", [x, columns], {"axis": 1}, found)
        packed = self._packed(layer, support, weight.reshape(*weight.shape[:2], -1))
        kernel = packed.reshape(-1, support.k, *weight.shape[2:])
        attributes = {name: each for name, each in node.attributes.items() if name != "group"}
        operands = [gathered, self._stored(layer, support, kernel, "conv"), *node.inputs[2:]]
        places = support.places
        if places is not None and len(operands) > 2 and (bias := fixed(operands[2])) is not None:
            operands[2] = add_constant(
                self.graph, f"{layer.weight}_bias", _column(bias, places, support.rows.size)[:, 0]
            )
        made = ir.node("Conv", operands, {}, name=f"{node.name or node.outputs[0].name}_lowered")
        made.attributes.update(attributes)
        made.attributes["group"] = ir.AttrInt64("group", groups)
        node.prepend(made)
        out = made.outputs[0]
        out.name, out.type = f"{node.outputs[0].name}_grouped", node.outputs[0].type
        if places is not None:
            back = add_constant(self.graph, f"{node.outputs[0].name}_places", places)
            out = add_node(self.graph, node, "Gather", [out, back], {"axis": 1}, like=f"{node.outputs[0].name}_ordered")
        out.shape = node.outputs[0].shape
        self._hand_over(node.outputs[0], out)
        self.graph.remove(node, safe=True)

    def _lower_linear(self, node: ir.Node, layer: Layer, support: Support) -> None:
        x, weight = node.inputs[0], fixed(node.inputs[1])
        assert x is not None and weight is not None
        outputs, places = support.rows.size, support.places
        turned = self._turn(x, node, layer.alive.shape[1])
        rows = "rowwise" if node.op_type == "Gemm" and integer(node, "transB", 0) else "columnwise"
        matrix = weight if rows == "rowwise" else weight.T
        packed = self._packed(layer, support, matrix[..., None])[..., 0]
        columns = self._constant(layer.weight, _moved(support.columns, turned.places), support.group, turned.places)
        gathered = add_node(self.graph, node, "Gather", [turned.value, columns], {"axis": 0}, [*columns.shape, None])  # type: ignore[misc]
        stored = self._stored(layer, support, packed, rows)
        made = add_node(self.graph, node, "MatMul", [stored, gathered], {}, [packed.shape[0], support.group, None])
        size = add_constant(self.graph, f"{layer.weight}_rows", np.array([outputs, -1]))
        out = add_node(self.graph, node, "Reshape", [made, size], {}, [outputs, None])
        bias = fixed(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None:
            column = add_constant(self.graph, f"{layer.weight}_bias", _column(bias, places, outputs))
            out = add_node(self.graph, node, "Add", [out, column], {}, [outputs, None])
        self._turned[node.outputs[0]] = Turned(out, turned.lead, places)
        self._replaced.append(node)

    def _carry(self, node: ir.Node) -> None:
        """An elementwise operator in the feature-major layout, where all of its operands can be."""
        first = next((self._turned[v] for v in node.inputs if v is not None and v in self._turned), None)
        shape = sizes(node.outputs[0])
        if first is None or shape is None or shape[-1] is None:
            return
        operands: list[ir.Value | None] = []
        for value in node.inputs:
            if value is None:
                operands.append(None)
            elif value in self._turned:
                other = self._turned[value]
                same_rows = None not in shape[:-1] or other.lead is first.lead
                if sizes(value) != shape or not same_rows or not _same(other.places, first.places):
                    return
                operands.append(self._turned[value].value)
            elif (array := fixed(value)) is not None and array.size == 1:
                flat = array.ndim <= 1
                operands.append(value if flat else add_constant(self.graph, f"{value.name}_flat", array.reshape(1)))
            elif array is not None and array.size == array.shape[-1] == shape[-1]:
                column = _column(array, first.places, sizes(first.value)[0] or 0)  # type: ignore[index]
                operands.append(add_constant(self.graph, f"{value.name}_column", column))
            else:
                return
        made = ir.node(node.op_type, operands, {}, name=f"{node.name or node.outputs[0].name}_turned")
        made.attributes.update(node.attributes)
        node.prepend(made)
        out = made.outputs[0]
        out.name, out.type, out.shape = f"{node.outputs[0].name}_turned", node.outputs[0].type, first.value.shape
        self._turned[node.outputs[0]] = Turned(out, first.lead, first.places)
        self._replaced.append(node)

    def _turn(self, x: ir.Value, before: ir.Node, features: int) -> Turned:
        if x not in self._turned:
            value = x
            if len(sizes(x) or ()) > 2:
                size = add_constant(self.graph, "rows", np.array([-1, features]))
                value = add_node(self.graph, before, "Reshape", [x, size], {}, [None, features], f"{x.name}_rows")
            out = add_node(self.graph, before, "Transpose", [value], {"perm": [1, 0]}, [features, None])
            self._turned[x] = Turned(out, x)
        return self._turned[x]

    def _turn_back(self, value: ir.Value) -> None:
        """The ordinary layout of a value whose node was replaced, for those that still read it."""
        replaced = set(self._replaced)
        if not value.is_graph_output() and all(user in replaced for user, _ in value.uses()):
            return
        turned = self._turned[value]
        maker = turned.value.producer()
        assert maker is not None
        found = sizes(value) or [None, None]
        source = turned.value
        if turned.places is not None:
            back = add_constant(self.graph, f"{value.name}_places", turned.places)
            ordered = ir.node("Gather", [source, back], {"axis": 0})
            maker.append(ordered)
            maker, source = ordered, ordered.outputs[0]
            source.name, source.type = f"{value.name}_ordered", value.type
            source.shape = ir.Shape([found[-1], None])
        after = ir.node("Transpose", [source], {"perm": [1, 0]})
        maker.append(after)
        last = after
        out = after.outputs[0]
        out.name, out.type, out.shape = f"{value.name}_back", value.type, ir.Shape([None, found[-1]])
        if len(found) > 2:
            shape = self._lead_shape(turned.lead, found, last)
            last = ir.node("Reshape", [out, shape])
            (shape.producer() or after).append(last)
            out = last.outputs[0]
            out.name, out.type = f"{value.name}_shaped", value.type
        out.shape = value.shape
        self._hand_over(value, out)

    def _lead_shape(self, lead: ir.Value, found: list[int | None], after: ir.Node) -> ir.Value:
        """The sizes of a result: those of `lead`, the last one replaced."""
        if sum(size is None for size in found[:-1]) <= 1:
            target = np.array([-1 if size is None else size for size in found], np.int64)
            return add_constant(self.graph, "sizes", target)
        names = [add_constant(self.graph, f"sizes_{i}", np.array([number])) for i, number in enumerate((0, -1))]
        last = add_constant(self.graph, "sizes_last", np.array([found[-1] or 0]))
        shape = ir.node("Shape", [lead])
        cut = ir.node("Slice", [shape.outputs[0], *names])
        whole = ir.node("Concat", [cut.outputs[0], last], {"axis": 0})
        place = after
        for made, size in ((shape, len(found)), (cut, len(found) - 1), (whole, len(found))):
            value = made.outputs[0]
            value.name = f"{after.outputs[0].name}_{made.op_type.lower()}"
            value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([size])
            place.append(made)
            place = made
        return whole.outputs[0]

    def _hand_over(self, old: ir.Value, new: ir.Value) -> None:
        """Let everyone read `new`, which takes over the name of an output of the graph."""
        outputs = [i for i, value in enumerate(self.graph.outputs) if value is old]
        replaced = set(self._replaced)
        for user, index in list(old.uses()):
            if user not in replaced:
                user.replace_input_with(index, new)
        if outputs:
            new.name, old.name = old.name, f"{old.name}_before"
        for index in outputs:
            self.graph.outputs[index] = new

    def _packed(self, layer: Layer, support: Support, matrix: Array) -> Array:
        """The alive entries, [groups, group, k, kernel]; zeros where a group has fewer rows or columns."""
        rows = matrix[support.rows]  # row -1 is replaced below
        local = support.columns % matrix.shape[1]
        taken = np.take_along_axis(rows, local[:, None, :, None], axis=2)
        there = support.real[:, None, :, None] & (support.rows >= 0)[:, :, None, None]
        return np.where(there, taken, 0).astype(matrix.dtype)

    def _stored(self, layer: Layer, support: Support, array: Array, form: str) -> ir.Value:
        key = (layer.weight, form, support.group)
        if key not in self._weights:
            self._weights[key] = add_constant(self.graph, f"{layer.weight}_lowered", array)
        return self._weights[key]

    def _constant(self, weight: str, columns: Array, group: int, places: Array | None) -> ir.Value:
        key = (weight, group)
        if places is not None:
            return add_constant(self.graph, f"{weight}_columns", columns)
        if key not in self._columns:
            self._columns[key] = add_constant(self.graph, f"{weight}_columns", columns)
        return self._columns[key]


def _column(array: Array, places: Array | None, size: int) -> Array:
    """One number for each feature, as a column of `size` rows."""
    if places is None:
        return np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (size,)).reshape(size, 1))
    column = np.zeros((size, 1), array.dtype)
    column[places, 0] = array.reshape(-1)
    return column


def _moved(columns: Array, places: Array | None) -> Array:
    return columns if places is None else places[columns]


def _same(a: Array | None, b: Array | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
