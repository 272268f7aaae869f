"""Reading and editing an `onnx_ir` graph: constants, sizes, operands of the main graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]
ONNX = ("", "ai.onnx")


def fixed(value: ir.Value | None) -> Array | None:
    """The array of a value that no caller can change; None where it varies or is given from outside."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value if value.is_initializer() else None
    if tensor is None and (node := value.producer()) is not None and node.op_type == "Constant":
        tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.dtype.is_string() else tensor.numpy()


def whole(value: ir.Value | None) -> list[int] | None:
    """A constant list of whole numbers; None where it varies."""
    found = fixed(value)
    return None if found is None or found.dtype.kind not in "iu" else [int(entry) for entry in found.ravel()]


def sizes(value: ir.Value | None) -> list[int | None] | None:
    """Sizes of a value, None where one is free; None where its rank is unknown."""
    if value is None:
        return None
    if (array := fixed(value)) is not None:
        return [int(size) for size in array.shape]
    if value.shape is None:
        return None
    return [size if isinstance(size, int) else None for size in value.shape]


def is_outer(node: ir.Node) -> bool:
    """Whether a node holds graphs of its own."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def integer(node: ir.Node, name: str, default: int) -> int:
    """A whole-number attribute."""
    return node.attributes.get_int(name, default)


def integers(node: ir.Node, name: str) -> list[int] | None:
    """An attribute that is a list of whole numbers; None where it is not given."""
    found = node.attributes.get_ints(name)
    return None if found is None else [int(entry) for entry in found]


def text(node: ir.Node, name: str, default: str) -> str:
    """A text attribute."""
    return node.attributes.get_string(name, default) or default


def title(node: ir.Node) -> str:
    """A node for messages: its operator and name."""
    domain = "" if node.domain in ONNX else f"{node.domain}."
    named = node.name or (node.outputs[0].name if node.outputs else "")
    return f"{domain}{node.op_type} `{named}`"


def opset(model: ir.Model) -> int:
    """Version of ONNX's own operators."""
    return int(model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1)))


def add_constant(graph: ir.Graph, like: str, array: Array) -> ir.Value:
    """A new initializer whose name starts with `like`."""
    name = fresh_name(graph, like)
    value = ir.Value(name=name, const_value=ir.Tensor(np.require(array, requirements="C"), name=name))
    value.shape = ir.Shape(array.shape)
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(value)
    return value


def fresh_name(graph: ir.Graph, like: str) -> str:
    """A name that no value of the model's main graph has, and no other call gives."""
    taken: set[str] = graph.meta.setdefault("fxsparse.names", set())
    if not taken:
        taken |= {value.name or "" for value in (*graph.inputs, *graph.initializers.values())}
        taken |= {value.name or "" for node in graph.all_nodes() for value in node.outputs}
    name, count = like, 1
    while name in taken:
        name, count = f"{like}_{count}", count + 1
    taken.add(name)
    return name


def add_node(
    graph: ir.Graph,
    before: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any] | None = None,
    shape: Sequence[int | None] | None = None,
    like: str = "",
) -> ir.Value:
    """A new node in front of another; returns its only output, of the type of the first input."""
    node = ir.node(kind, inputs, attributes or {})
    out = node.outputs[0]
    out.name = fresh_name(graph, like or f"{before.outputs[0].name}_{kind.lower()}")
    node.name = out.name
    first = next((value for value in inputs if value is not None), None)
    out.type = first.type if first is not None else None
    if shape is not None:
        out.shape = ir.Shape(shape)
    before.prepend(node)
    return out


def remove_unused(graph: ir.Graph) -> int:
    """Remove nodes and initializers of the main graph that nothing reads; returns the number of nodes."""
    removed = 0
    for node in reversed(list(graph)):
        if not any(value.is_graph_output() or value.uses() for value in node.outputs):
            graph.remove(node, safe=True)
            removed += 1
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]
    return removed
