"""What the quantizer is told of a graph: its products, left operands as convolutions, sums to leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from fxsparse.exporters.quantize_graph import convolve_left_products, products_of, sums_outside_convolutions


def message(nodes: list[Any], constants: dict[str, Any], shape: list[Any], out: list[Any]) -> Any:
    inputs, outputs = [helper.make_tensor_value_info("x", 1, shape)], [helper.make_tensor_value_info("y", 1, out)]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(proto: Any, x: Any) -> Any:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def normal(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("weight", "given"), [((5, 7), (7, 3)), ((2, 5, 7), (2, 7, 3))])
def test_a_left_constant_becomes_a_convolution(weight: tuple[int, ...], given: tuple[int, ...]) -> None:
    free = [*given[:-1], "b"]
    proto = message([helper.make_node("MatMul", ["w", "x"], ["y"])], {"w": normal(*weight)}, free, [*weight[:-1], "b"])
    x = normal(*given)
    before = run(proto, x)
    assert convolve_left_products(proto) == 1
    assert [node.op_type for node in proto.graph.node] == ["Reshape", "Conv", "Reshape"]
    np.testing.assert_allclose(run(proto, x), before, rtol=1e-5, atol=1e-5)
    assert run(proto, normal(*given[:-1], 9)).shape == (*weight[:-1], 9)
    assert "w" not in {tensor.name for tensor in proto.graph.initializer}
    (product,) = products_of(proto)
    assert (product.operator, product.weight, product.left) == ("Conv", "w.kernel", False)


def test_what_broadcasts_or_is_to_stay_is_left_alone() -> None:
    node = helper.make_node("MatMul", ["w", "x"], ["y"], name="m")
    wide = message([node], {"w": normal(5, 7)}, [4, 7, 3], [4, 5, 3])  # one matrix for a stack
    assert convolve_left_products(wide) == 0
    plain = message([node], {"w": normal(5, 7)}, [7, 3], [5, 3])
    assert convolve_left_products(plain, skip={"m"}) == 0 and plain.graph.node[0].op_type == "MatMul"


def test_products_with_a_constant_are_found_and_named() -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["a"]),
        helper.make_node("MatMul", ["a", "a"], ["b"]),
        helper.make_node("Gemm", ["b", "v", "c"], ["y"], name="g"),
    ]
    proto = message(nodes, {"w": normal(4, 4), "v": normal(4, 4), "c": normal(4)}, [4, 4], [4, 4])
    found = products_of(proto)
    assert [(p.operator, p.weight, p.left, p.rank) for p in found] == [
        ("MatMul", "w", False, 2),
        ("Gemm", "v", False, 2),
    ]
    names = [node.name for node in proto.graph.node]
    assert all(names) and len(set(names)) == len(names) and found[1].node == "g"


def test_sums_between_convolutions_and_others() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Add", ["a", "r"], ["s"], name="inside"),
        helper.make_node("Add", ["s", "one"], ["t"], name="constant"),
        helper.make_node("Add", ["x", "t"], ["y"], name="outside"),
    ]
    proto = message(nodes, {"w": normal(3, 3, 1, 1), "one": normal(1)}, [1, 3, 4, 4], [1, 3, 4, 4])
    assert sums_outside_convolutions(proto) == ["constant", "outside"]
