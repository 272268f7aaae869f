"""What the quantizer has to know of a graph: its products with a constant operand, and where sums may be 8-bit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fxsparse.exporters.program import MODULE_KEY

KERNEL = ".kernel"
"""What is added to the name of an initializer that became the kernel of a convolution."""

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_KEEPING = ("Relu", "Clip", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Pad", "Add", "Concat")


@dataclass(frozen=True)
class Product:
    """A node that multiplies with a constant.

    Attributes:
        node: its name.
        operator: its operator.
        weight: the initializer.
        rank: number of axes of the constant.
        left: whether the constant is the left operand.
        module: path of the module that it computes for; empty where that is not known.
    """

    node: str
    operator: str
    weight: str
    rank: int
    left: bool
    module: str

    @property
    def is_matmul(self) -> bool:
        """Whether it is a product of (stacks of) matrices."""
        return self.operator == "MatMul"


def products_of(proto: Any) -> list[Product]:
    """The products of the graph with a float32 constant operand; every node of it gets a name of its own.

    A constant may be read through one Transpose.
    """
    from onnx import TensorProto

    _name_nodes(proto)
    held = {t.name: t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT}
    made = {output: node for node in proto.graph.node for output in node.output}
    found = []
    for node in proto.graph.node:
        if node.op_type not in _PRODUCTS or node.domain not in ("", "ai.onnx"):
            continue
        operands = (0, 1) if node.op_type == "MatMul" else (1,)
        sources = {i: _constant(node.input[i], held, made) for i in operands}
        position = next((i for i in reversed(operands) if sources[i]), None)
        if position is None or len([i for i in operands if sources[i]]) == 2:
            continue
        weight = sources[position]
        module = next((p.value for p in node.metadata_props if p.key == MODULE_KEY), "")
        found.append(Product(node.name, node.op_type, weight, len(held[weight].dims), position == 0, module))
    return found


def _constant(name: str, held: Any, made: Any) -> str:
    if name in held:
        return name
    node = made.get(name)
    through = node is not None and node.op_type == "Transpose" and node.input[0] in held
    return str(node.input[0]) if through else ""


def _name_nodes(proto: Any) -> None:
    taken: set[str] = set()
    for i, node in enumerate(proto.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{i}_node"
        taken.add(node.name)


def convolve_left_products(proto: Any, skip: Collection[str] = ()) -> int:
    """Write products with a constant left operand as convolutions, for which onnxruntime has a fast 8-bit kernel.

    W [m, k] @ X [k, b] is a convolution of the one sample X with m kernels of width 1, and a stack of n of them,
    W [n, m, k] @ X [n, k, b], is one with n groups. Products in `skip` stay, and those for which X is not known to have
    as many axes as W. Exact: the same sums.

    Returns:
        How many were rewritten.
    """
    from onnx import helper, numpy_helper

    graph = proto.graph
    tensors = {t.name: t for t in graph.initializer}
    left = {p.node: p for p in products_of(proto) if p.is_matmul and p.left and p.rank in (2, 3)}
    chosen = {name: p for name, p in left.items() if name not in skip and p.weight in tensors}
    shapes = _shapes(proto) if chosen else {}
    nodes, done = [], 0
    for node in graph.node:
        product = chosen.get(node.name)
        values = None if product is None else numpy_helper.to_array(tensors[product.weight])
        if product is None or values is None or not _fits(values.shape, shapes.get(node.input[1])):
            nodes.append(node)
            continue
        groups = values.shape[0] if values.ndim == 3 else 1
        rows, width = values.shape[-2:]
        base = node.name
        weight = product.weight + KERNEL
        if weight not in tensors:
            graph.initializer.append(numpy_helper.from_array(values.reshape(groups * rows, width, 1), weight))
            tensors[weight] = graph.initializer[-1]
        targets = {"wide": (1, groups * width, -1), "back": (*values.shape[:-1], -1)}
        names = {key: _shape(graph, f"{base}_{key}", shape) for key, shape in targets.items()}
        made = (
            helper.make_node("Reshape", [node.input[1], names["wide"]], [f"{base}_in"], name=f"{base}_before"),
            helper.make_node("Conv", [f"{base}_in", weight], [f"{base}_out"], name=base, group=groups),
            helper.make_node("Reshape", [f"{base}_out", names["back"]], [node.output[0]], name=f"{base}_after"),
        )
        for each in made:
            each.metadata_props.extend(node.metadata_props)
        nodes += made
        done += 1
    if done:
        del graph.node[:]
        graph.node.extend(nodes)
        _drop_unused(graph)
    return done


def _shapes(proto: Any) -> dict[str, tuple[int, ...]]:
    """The shapes that shape inference finds, -1 for a size that is free."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(proto).graph
    return {
        value.name: tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info)
        if value.type.tensor_type.HasField("shape")
    }


def _fits(weight: tuple[int, ...], given: tuple[int, ...] | None) -> bool:
    return given is not None and len(given) == len(weight) and given[:-2] == weight[:-2]


def _shape(graph: Any, name: str, shape: tuple[int, ...]) -> str:
    import numpy as np
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.array(shape, dtype=np.int64), name))
    return name


def _drop_unused(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def sums_outside_convolutions(proto: Any) -> list[str]:
    """Names of the Add nodes that do not join feature maps of convolutions: there 8 bits cost more than they gain."""
    inside: set[str] = set()
    outside = []
    for node in proto.graph.node:
        from_convolution = [name for name in node.input if name in inside]
        if node.op_type in ("Conv", "ConvTranspose"):
            inside.update(node.output)
        elif node.op_type == "Add":
            if len(from_convolution) == 2:
                inside.update(node.output)
            else:
                outside.append(node.name)
        elif node.op_type in _KEEPING and from_convolution:
            inside.update(node.output)
    return outside
