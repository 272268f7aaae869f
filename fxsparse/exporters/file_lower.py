"""Products with shared supports become gathers and small dense products, in an ONNX graph.

Linear ones run feature-major, [1, features, rows]: one Gather of the inputs of all groups, then a convolution with a
group for each, or a batched MatMul and a Reshape. Elementwise operators between two of them stay in that layout, so a
chain has one Transpose at each end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_graph import ONNX, Array, add_constant, add_node, fixed, fresh_name, integer, sizes
from fxsparse.exporters.file_rules import UNARY
from fxsparse.exporters.file_supports import Layer, Support

_BETWEEN = (*UNARY, "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "PRelu", "Clip")


@dataclass(frozen=True, eq=False)
class Turned:
    """A value in feature-major layout.

    Attributes:
        value: [1, features, rows].
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
        self._stored: dict[tuple[object, ...], ir.Value] = {}
        self._widened: dict[ir.Value, ir.Value] = {}
        self._replaced: dict[ir.Node, None] = {}  # in order

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
        x, weight = node.inputs[0], fixed(node.inputs[1])
        assert x is not None and weight is not None
        places = support.places
        gathered = self._gathered(node, layer, support, x, layer.alive.shape[1] * layer.parts)
        flat = weight.reshape(*weight.shape[:2], -1)
        operands = [gathered, *self._blocks(layer, support, flat, weight.shape[2:], "conv")]
        made = ir.node("Conv", operands, {}, name=f"{node.name or node.outputs[0].name}_lowered")
        made.attributes.update({name: each for name, each in node.attributes.items() if name != "group"})
        made.attributes["group"] = ir.AttrInt64("group", support.columns.shape[0])
        node.prepend(made)
        out = made.outputs[0]
        out.name, out.type = fresh_name(self.graph, f"{node.outputs[0].name}_grouped"), node.outputs[0].type
        if places is not None:
            back = add_constant(self.graph, f"{node.outputs[0].name}_places", places)
            out = add_node(self.graph, node, "Gather", [out, back], {"axis": 1}, like=f"{node.outputs[0].name}_ordered")
        out.shape = node.outputs[0].shape
        self._hand_over(node.outputs[0], out)
        self.graph.remove(node, safe=True)

    def _lower_linear(self, node: ir.Node, layer: Layer, support: Support) -> None:
        x, weight = node.inputs[0], fixed(node.inputs[1])
        assert x is not None and weight is not None
        outputs, groups = support.rows.size, support.rows.shape[0]
        turned = self._turn(x, node, layer.alive.shape[1])
        rows = "rowwise" if node.op_type == "Gemm" and integer(node, "transB", 0) else "columnwise"
        matrix = (weight if rows == "rowwise" else weight.T)[..., None]
        moved = support if turned.places is None else replace(support, columns=turned.places[support.columns])
        gathered = self._gathered(node, layer, moved, turned.value, (sizes(turned.value) or [0, 0])[1] or 0)
        if support.as_conv:
            operands = self._blocks(layer, support, matrix, (1,), rows)
            out = add_node(self.graph, node, "Conv", [gathered, *operands], {"group": groups}, [1, outputs, None])
        else:
            stored, *bias = self._blocks(layer, support, matrix, (), rows)
            made = add_node(self.graph, node, "MatMul", [stored, gathered], {}, [1, groups, support.group, None])
            out = add_node(self.graph, node, "Reshape", [made, self._numbers(1, outputs, -1)], {}, [1, outputs, None])
            if bias:
                out = add_node(self.graph, node, "Add", [out, bias[0]], {}, [1, outputs, None])
        self._turned[layer.result] = Turned(out, turned.lead, support.places)
        self._replaced |= dict.fromkeys((node,) if layer.adder is None else (node, layer.adder))

    def _gathered(self, node: ir.Node, layer: Layer, support: Support, x: ir.Value, width: int) -> ir.Value:
        """The inputs of all groups along axis 1, a one behind those of each where the bias is inside."""
        columns, found = support.columns, sizes(x)
        if support.inside:
            x = self._with_ones(node, x)
            columns = np.concatenate([columns, np.full((len(columns), 1), width)], axis=1)
        columns = columns.reshape(-1) if layer.is_conv or support.as_conv else columns
        key = (layer.weight, columns.shape, columns.tobytes())
        index = self._constant(key, f"{layer.weight}_columns", lambda: columns)
        shape = None if found is None else [found[0], *columns.shape, *found[2:]]
        return add_node(self.graph, node, "Gather", [x, index], {"axis": 1}, shape)

    def _with_ones(self, before: ir.Node, x: ir.Value) -> ir.Value:
        """The value with a channel of ones, its last."""
        if x not in self._widened:
            found, dtype = sizes(x) or [], x.dtype
            assert dtype is not None
            pads = np.zeros(2 * len(found), np.int64)
            pads[len(found) + 1] = 1
            one = np.array(1, dtype.numpy())
            operands = [x, *(add_constant(self.graph, name, each) for name, each in (("pads", pads), ("one", one)))]
            self._widened[x] = add_node(self.graph, before, "Pad", operands, {})
        return self._widened[x]

    def _blocks(
        self, layer: Layer, support: Support, matrix: Array, kernel: tuple[int, ...], form: str
    ) -> list[ir.Value]:
        """The stored weight, [rows, k, *kernel] or for a batched product [groups, group, k], and the bias beside it.

        Args:
            layer: its name and bias.
            support: its groups and form.
            matrix: the weight, [rows, inputs, kernel].
            kernel: axes of a convolution's weight behind the first two.
            form: how the matrix lies in the initializer, which several layers may read.
        """
        bias, conv = fixed(layer.bias), layer.is_conv or support.as_conv

        def blocks() -> Array:
            made = _packed(support, matrix)
            if support.inside and bias is not None:
                column = _column(bias, support.places, support.rows.size)
                made = np.concatenate([made, column.reshape(*support.rows.shape, 1, 1)], axis=2)
            return made.reshape(-1, made.shape[2], *kernel) if conv else made[..., 0]

        key = (layer.weight, form, support.key, layer.bias if support.inside else None)
        operands = [self._constant(key, f"{layer.weight}_lowered", blocks)]
        if bias is None or layer.bias is None or support.inside:
            return operands
        if conv and layer.adder is None and support.places is None and bias.shape == (support.rows.size,):
            return [*operands, layer.bias]  # it is there before the product
        column = _column(bias, support.places, support.rows.size)
        return [*operands, add_constant(self.graph, f"{layer.weight}_bias", column[:, 0] if conv else column)]

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
                column = _column(array, first.places, (sizes(first.value) or [0, 0])[1] or 0)
                operands.append(add_constant(self.graph, f"{value.name}_column", column))
            else:
                return
        made = ir.node(node.op_type, operands, {}, name=f"{node.name or node.outputs[0].name}_turned")
        made.attributes.update(node.attributes)
        node.prepend(made)
        out = made.outputs[0]
        out.name, out.type, out.shape = f"{node.outputs[0].name}_turned", node.outputs[0].type, first.value.shape
        self._turned[node.outputs[0]] = Turned(out, first.lead, first.places)
        self._replaced[node] = None

    def _turn(self, x: ir.Value, before: ir.Node, features: int) -> Turned:
        if x not in self._turned:
            rows = add_node(
                self.graph,
                before,
                "Reshape",
                [x, self._numbers(1, -1, features)],
                {},
                [1, None, features],
                f"{x.name}_rows",
            )
            out = add_node(self.graph, before, "Transpose", [rows], {"perm": [0, 2, 1]}, [1, features, None])
            self._turned[x] = Turned(out, x)
        return self._turned[x]

    def _turn_back(self, value: ir.Value) -> None:
        """The ordinary layout of a value whose node was replaced, for those that still read it."""
        if not value.is_graph_output() and all(user in self._replaced for user, _ in value.uses()):
            return
        turned = self._turned[value]
        source, name, places = turned.value, value.name or "", turned.places
        features = places.size if places is not None else (sizes(source) or [0, 0])[1]
        found = [*(sizes(value) or sizes(turned.lead) or [None, None])[:-1], features]
        if places is not None:
            back = add_constant(self.graph, f"{name}_places", places)
            source = self._behind(source, "Gather", [source, back], {"axis": 1}, f"{name}_ordered", [1, features, None])
        source = self._behind(source, "Transpose", [source], {"perm": [0, 2, 1]}, f"{name}_back", [1, None, features])
        shape = self._lead_shape(turned.lead, found, source)
        out = self._behind(source, "Reshape", [source, shape], {}, f"{name}_shaped", found, shape.producer())
        out.shape = value.shape
        self._hand_over(value, out)

    def _behind(
        self,
        value: ir.Value,
        kind: str,
        inputs: list[ir.Value],
        attributes: dict[str, Any],
        name: str,
        shape: Sequence[int | None],
        after: ir.Node | None = None,
    ) -> ir.Value:
        """A new node behind the one that makes `value`, or behind `after`; returns its output, of the value's type."""
        after = after or value.producer()
        assert after is not None
        node = ir.node(kind, inputs, attributes)
        after.append(node)
        out = node.outputs[0]
        out.name, out.type, out.shape = fresh_name(self.graph, name), value.type, ir.Shape(shape)
        node.name = out.name
        return out

    def _lead_shape(self, lead: ir.Value, found: list[int | None], source: ir.Value) -> ir.Value:
        """The sizes of a result: those of `lead`, the last one replaced; computed behind `source` if two are free."""
        if sum(size is None for size in found[:-1]) <= 1:
            return self._numbers(*(-1 if size is None else size for size in found))
        start, end, last = (self._numbers(number) for number in (0, -1, found[-1] or 0))
        shape = self._behind(source, "Shape", [lead], {}, f"{source.name}_sizes", [len(found)])
        cut = self._behind(shape, "Slice", [shape, start, end], {}, f"{source.name}_lead", [len(found) - 1])
        whole = self._behind(cut, "Concat", [cut, last], {"axis": 0}, f"{source.name}_whole", [len(found)])
        for value in (shape, cut, whole):
            value.type = ir.TensorType(ir.DataType.INT64)
        return whole

    def _numbers(self, *numbers: int) -> ir.Value:
        return self._constant(("numbers", *numbers), "numbers", lambda: np.array(numbers))

    def _hand_over(self, old: ir.Value, new: ir.Value) -> None:
        """Let everyone read `new`, which takes over the name of an output of the graph."""
        outputs = [i for i, value in enumerate(self.graph.outputs) if value is old]
        for user, index in list(old.uses()):
            if user not in self._replaced:
                user.replace_input_with(index, new)
        if outputs:
            new.name, old.name = old.name, f"{old.name}_before"
        for index in outputs:
            self.graph.outputs[index] = new

    def _constant(self, key: tuple[object, ...], name: str, make: Callable[[], Array]) -> ir.Value:
        """An initializer that is made once for all who ask for the same."""
        if key not in self._stored:
            self._stored[key] = add_constant(self.graph, name, make())
        return self._stored[key]


def _packed(support: Support, matrix: Array) -> Array:
    """The alive entries, [groups, group, k, kernel]; zeros where a group has fewer rows or columns."""
    rows = matrix[support.rows]  # row -1 is replaced below
    local = support.columns % matrix.shape[1]
    taken = np.take_along_axis(rows, local[:, None, :, None], axis=2)
    there = support.real[:, None, :, None] & (support.rows >= 0)[:, :, None, None]
    return np.where(there, taken, 0).astype(matrix.dtype)


def _column(array: Array, places: Array | None, size: int) -> Array:
    """One number for each feature, as a column of `size` rows."""
    if places is None:
        return np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (size,)).reshape(size, 1))
    column = np.zeros((size, 1), array.dtype)
    column[places, 0] = array.reshape(-1)
    return column


def _same(a: Array | None, b: Array | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
