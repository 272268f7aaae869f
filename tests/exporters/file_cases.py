"""ONNX graphs by hand and at random, and the slow comparison that shows that a rewriting is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]


@dataclass
class Builder:
    """A graph in float64 that grows node by node."""

    seed: int = 0
    opset: int = 18
    nodes: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def input(self, name: str, shape: Sequence[int | str | None], kind: int = TensorProto.DOUBLE) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def constant(self, array: Any, name: str = "") -> str:
        name = name or f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, kind: str, inputs: Sequence[str], outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        names = [f"v{self.count + i}" for i in range(outputs)]
        self.count += outputs
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, *shape: int, dead: Sequence[int] = (), axis: int = 0) -> Array:
        """Random numbers, zero at the indices `dead` of an axis."""
        array = self.random.standard_normal(shape)
        np.moveaxis(array, axis, 0)[list(dead)] = 0.0
        return array

    def proto(self, *outputs: str) -> Any:
        made = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, made, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        model.ir_version = 10
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        types = {value.name: value for value in inferred.graph.value_info}
        types |= {value.name: value for value in inferred.graph.output}
        for value in model.graph.output:
            value.CopyFrom(types[value.name])
        return model


def model_of(proto: Any) -> ir.Model:
    from fxsparse.exporters.file_shapes import infer

    model = ir.from_proto(proto)
    infer(model)
    return model


def evaluate(model: Any, feed: Mapping[str, Array]) -> list[Array]:
    """Outputs by ONNX's own reference, float64."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    onnx.checker.check_model(proto)
    return [np.asarray(output) for output in ReferenceEvaluator(proto).run(None, dict(feed))]


def assert_equal(before: Any, after: Any, feeds: Sequence[Mapping[str, Array]]) -> list[list[Array]]:
    """Both give the same to 1e-12 of the output's scale; returns the outputs."""
    shown = []
    for feed in feeds:
        expected, got = evaluate(before, feed), evaluate(after, feed)
        assert len(expected) == len(got)
        for a, b in zip(expected, got, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-12 * max(1.0, float(np.abs(a).max(initial=0.0))))
        shown.append(expected)
    return shown


def shapes_of(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the initializers."""
    return {
        name: tuple(value.const_value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


Step = Callable[["Random"], None]


class Random(Builder):
    """A random graph of images, then of rows, in which a good part of the weights is dead."""

    def grow(self, steps: Sequence[int]) -> Any:
        """Apply the steps (any whole numbers); returns the finished model."""
        self.input("x", ["batch", 4, 6, 6])
        self.at, self.shape = "x", [None, 4, 6, 6]
        self.pool: list[tuple[str, list[Any]]] = []
        for step in steps:
            menu = IMAGE if len(self.shape) == 4 else ROWS
            menu[step % len(menu)](self)
            self.pool.append((self.at, list(self.shape)))
        if len(self.shape) == 4:
            flatten(self)
        last = self.constant(self.random.standard_normal((self.shape[1], 3)))
        return self.proto(self.node("MatMul", [self.at, last]))

    def put(self, name: str, shape: Sequence[Any]) -> None:
        self.at, self.shape = name, list(shape)

    def some(self, count: int) -> list[int]:
        return [i for i in range(count) if self.random.random() < 0.4]


def conv(b: Random) -> None:
    channels, size = b.shape[1], int(b.random.integers(1, 4))
    out, padding = int(b.random.integers(3, 8)), int(b.random.integers(0, 2))
    if b.shape[2] + 2 * padding < size:
        return
    weight = b.weight(out, channels, size, size, dead=b.some(out))
    weight[:, b.some(channels)] = 0
    operands = [b.at, b.constant(weight)]
    if b.random.random() < 0.6:
        bias = b.random.standard_normal(out)
        bias[b.some(out)] = 0
        operands.append(b.constant(bias))
    edge = b.shape[2] + 2 * padding - size + 1
    b.put(b.node("Conv", operands, pads=[padding] * 4), [None, out, edge, edge])


def depthwise(b: Random) -> None:
    channels, times = b.shape[1], int(b.random.integers(1, 3))
    weight = b.weight(channels * times, 1, 1, 1, dead=b.some(channels * times))
    if b.random.random() < 0.5 and b.shape[2] >= 1:
        weight = b.weight(channels * times, 1, 3, 3, dead=b.some(channels * times))
    pads = [1] * 4 if weight.shape[2] == 3 else [0] * 4
    bias = b.constant(b.random.standard_normal(channels * times))
    made = b.node("Conv", [b.at, b.constant(weight), bias], group=channels, pads=pads)
    b.put(made, [None, channels * times, *b.shape[2:]])


def transposed(b: Random) -> None:
    out = int(b.random.integers(3, 6))
    weight = b.weight(b.shape[1], out, 2, 2, dead=b.some(out), axis=1)
    made = b.node("ConvTranspose", [b.at, b.constant(weight), b.constant(b.random.standard_normal(out))])
    b.put(made, [None, out, b.shape[2] + 1, b.shape[3] + 1])


def unary(b: Random) -> None:
    kind = ("Relu", "Sigmoid", "Tanh", "Neg", "Abs", "LeakyRelu", "Softplus", "HardSigmoid", "Elu")[
        int(b.random.integers(0, 9))
    ]
    b.put(b.node(kind, [b.at]), b.shape)


def clip(b: Random) -> None:
    b.put(b.node("Clip", [b.at, b.constant(np.float64(-0.3)), b.constant(np.float64(0.7))]), b.shape)


def norm(b: Random) -> None:
    size = b.shape[1]
    scale = b.weight(size, dead=b.some(size))
    parts = [scale, b.random.standard_normal(size), b.random.standard_normal(size), b.random.uniform(0.5, 2, size)]
    b.put(b.node("BatchNormalization", [b.at, *(b.constant(part) for part in parts)]), b.shape)


def scaled(b: Random) -> None:
    size = b.shape[1]
    shape = (size, 1, 1) if len(b.shape) == 4 else (size,)
    shape = shape if b.random.random() < 0.5 else (1,)
    array = b.random.standard_normal(shape)
    if b.random.random() < 0.4:
        array = np.where(b.random.random(shape) < 0.5, 0, array)
    kind = ("Add", "Mul", "Sub", "Max")[int(b.random.integers(0, 4))]
    operands = [b.at, b.constant(array)]
    b.put(b.node(kind, operands if b.random.random() < 0.5 else operands[::-1]), b.shape)


def joined(b: Random) -> None:
    """With an earlier value: added where the shapes agree, else side by side."""
    rest = [(name, shape) for name, shape in b.pool if shape[2:] == b.shape[2:] and len(shape) == len(b.shape)]
    if not rest:
        return
    name, shape = rest[int(b.random.integers(0, len(rest)))]
    if shape == b.shape and b.random.random() < 0.7:
        b.put(b.node(("Add", "Mul")[int(b.random.integers(0, 2))], [b.at, name]), shape)
    else:
        b.put(b.node("Concat", [b.at, name], axis=1), [None, b.shape[1] + shape[1], *b.shape[2:]])


def gate(b: Random) -> None:
    size = b.shape[1]
    if len(b.shape) != 4:
        return
    pooled = b.node("GlobalAveragePool", [b.at])
    weight = b.weight(size, size, 1, 1, dead=b.some(size))
    made = b.node("Sigmoid", [b.node("Conv", [pooled, b.constant(weight)])])
    b.put(b.node("Mul", [b.at, made]), b.shape)


def pooled(b: Random) -> None:
    if len(b.shape) != 4 or b.shape[2] < 2:
        return
    counted = int(b.random.integers(0, 2))
    kind = ("MaxPool", "AveragePool")[int(b.random.integers(0, 2))]
    extra = {"count_include_pad": counted} if kind == "AveragePool" else {}
    made = b.node(kind, [b.at], kernel_shape=[2, 2], pads=[1, 0, 0, 1], **extra)
    b.put(made, b.shape)


def cut(b: Random) -> None:
    """A split whose parts come back in another order, or a slice."""
    size = b.shape[1]
    if size < 3:
        return
    first = int(b.random.integers(1, size))
    if b.random.random() < 0.5:
        one, two = b.node("Split", [b.at, b.constant(np.array([first, size - first]))], 2, axis=1)
        b.put(b.node("Concat", [two, one], axis=1), b.shape)
    else:
        places = [b.constant(np.array([n])) for n in (first - 1, size, 1)]
        b.put(b.node("Slice", [b.at, *places]), [None, size - first + 1, *b.shape[2:]])


def shuffle(b: Random) -> None:
    order = b.random.permutation(b.shape[1])
    b.put(b.node("Gather", [b.at, b.constant(order)], axis=1), b.shape)


def turned(b: Random) -> None:
    """To channels last, an operator there, and back."""
    if len(b.shape) != 4:
        return
    last = b.node("Transpose", [b.at], perm=[0, 2, 3, 1])
    weight = b.weight(b.shape[1], b.shape[1] + 1, dead=b.some(b.shape[1] + 1), axis=1)
    made = b.node("Add", [b.node("MatMul", [last, b.constant(weight)]), b.constant(b.weight(b.shape[1] + 1))])
    b.put(b.node("Transpose", [made], perm=[0, 3, 1, 2]), [None, b.shape[1] + 1, *b.shape[2:]])


def padded(b: Random) -> None:
    if len(b.shape) == 4 and b.shape[2] < 9:
        made = b.node("Pad", [b.at, b.constant(np.array([0, 0, 1, 0, 0, 0, 0, 1])), b.constant(np.float64(0.5))])
        b.put(made, [None, b.shape[1], b.shape[2] + 1, b.shape[3] + 1])


def instance(b: Random) -> None:
    size = b.shape[1]
    if len(b.shape) == 4:
        parts = [b.constant(b.weight(size, dead=b.some(size))), b.constant(b.weight(size))]
        b.put(b.node("InstanceNormalization", [b.at, *parts], epsilon=0.1), b.shape)


def flatten(b: Random) -> None:
    area = b.shape[1] * b.shape[2] * b.shape[3]
    way = int(b.random.integers(0, 4))
    if way == 0:
        made = b.node("Flatten", [b.at])
    elif way == 1:
        made = b.node("Reshape", [b.at, b.constant(np.array([0, -1]))])
    elif way == 2:
        made = b.node("Reshape", [b.at, b.constant(np.array([-1, area]))])
    else:
        made, area = b.node("ReduceMean", [b.at, b.constant(np.array([2, 3]))], keepdims=0), b.shape[1]
    b.put(made, [None, area])


def linear(b: Random) -> None:
    inputs, outputs = b.shape[1], int(b.random.integers(3, 9))
    weight = b.weight(outputs, inputs, dead=b.some(outputs))
    if b.random.random() < 0.5:
        b.put(b.node("MatMul", [b.at, b.constant(weight.T)]), [None, outputs])
        return
    flip = int(b.random.integers(0, 2))
    operands = [b.at, b.constant(weight if flip else weight.T)]
    if b.random.random() < 0.7:
        operands.append(b.constant(b.random.standard_normal((1, outputs) if b.random.random() < 0.3 else outputs)))
    b.put(b.node("Gemm", operands, transB=flip), [None, outputs])


def layer_norm(b: Random) -> None:
    size = b.shape[1]
    if len(b.shape) == 2:
        made = b.node("LayerNormalization", [b.at, b.constant(b.weight(size)), b.constant(b.weight(size))], epsilon=0.1)
        b.put(made, b.shape)


IMAGE: tuple[Step, ...] = (
    *(conv, conv, conv, depthwise, transposed, unary, unary, clip, norm, norm, scaled, joined, joined, gate, pooled),
    *(cut, shuffle, turned, padded, instance, flatten),
)
ROWS: tuple[Step, ...] = (linear, linear, linear, unary, unary, clip, scaled, joined, cut, shuffle, layer_norm)


def shared(random: np.random.Generator, rows: int, width: int, group: int, k: int) -> Array:
    """Random numbers in groups of rows, each group alive on k positions of its own."""
    array = random.standard_normal((rows, width))
    for start in range(0, rows, group):
        dead = np.ones(width, bool)
        dead[random.permutation(width)[:k]] = False
        array[start : start + group, dead] = 0.0
    return array


def rows(*shape: Any) -> Builder:
    """A graph with an input of this shape, by default of 24 features."""
    b = Builder()
    b.input("x", shape or ("batch", 24))
    return b


def feeds(*shapes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Random inputs of these shapes."""
    return [{"x": np.random.default_rng(i).standard_normal(shape)} for i, shape in enumerate(shapes)]
