"""Constants of an ONNX graph: computed ahead where that does not enlarge the file, and each stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fxsparse.errors import ExportError
from fxsparse.exporters.file_double import runner_of
from fxsparse.exporters.file_graph import ONNX, Array, add_constant, fixed, is_outer, sizes
from fxsparse.exporters.inputs import first_line

_SMALL = 64 * 1024  # bytes that a folded constant may always take
_LARGEST = 2**28  # bytes that one may take at all
_KEPT = {
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Dropout", "Bernoulli", "Multinomial"),
    *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"),
    *("SequenceConstruct", "SequenceEmpty", "SplitToSequence", "Optional", "OptionalHasElement", "OptionalGetElement"),
}


def fold(model: ir.Model) -> tuple[int, str]:
    """Replace nodes of the main graph whose operands are all constant by what onnxruntime makes of them.

    1. Nodes with subgraphs, foreign operators, random and quantizing ones stay.
    2. A result that takes more bytes than the constants that go with it stays, unless it is small.
    3. A result that is an output of the graph stays.

    Returns:
        The number of constants that took the place of nodes, and why nothing was folded where that failed.
    """
    graph = model.graph
    nodes = _foldable(graph)
    wanted = [value for node in nodes for value in node.outputs if _is_read(value, set(nodes))]
    wanted = [value for value in wanted if value.producer().op_type != "Constant"]  # type: ignore[union-attr]
    if not wanted:
        return 0, ""
    try:
        arrays = _compute(model, nodes, wanted)
    except ExportError as error:
        return 0, f"constants were not folded ({error})"
    folded = 0
    for value, array in zip(wanted, arrays, strict=True):
        if array.dtype.kind in "OUS" or not _worth_it(value, array, set(nodes)):
            continue
        like = value.name or "constant"
        constant = add_constant(graph, f"{like}_folded", array)
        value.replace_all_uses_with(constant)
        folded += 1
    return folded, ""


def share(graph: ir.Graph) -> int:
    """Let initializers of the same type, shape and bytes be one; returns how many went."""
    seen: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    gone = 0
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype.is_string() or value.is_graph_input() or value.is_graph_output():
            continue
        shape = tuple(int(size) for size in tensor.shape.numpy())
        digest = hashlib.sha256(np.ascontiguousarray(tensor.numpy()).view(np.uint8).data if tensor.size else b"")
        first = seen.setdefault((tensor.dtype, shape, digest.digest()), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.initializers[name]
            gone += 1
    return gone


def _foldable(graph: ir.Graph) -> list[ir.Node]:
    known: set[ir.Value] = set()
    nodes = []
    for node in graph:
        if node.domain not in ONNX or node.op_type in _KEPT or is_outer(node):
            continue
        if any(value.is_graph_output() or _bytes(value) > _LARGEST for value in node.outputs):
            continue
        if node.op_type != "Constant" and not any(value is not None for value in node.inputs):
            continue
        if all(value is None or value in known or fixed(value) is not None for value in node.inputs):
            nodes.append(node)
            known.update(node.outputs)
    return nodes


def _bytes(value: ir.Value) -> int:
    """Bytes of a value, as far as its sizes are known."""
    found = sizes(value) or []
    return int(np.prod([size or 1 for size in found], dtype=np.float64)) * 4


def _is_read(value: ir.Value, inside: set[ir.Node]) -> bool:
    return any(node not in inside for node, _ in value.uses())


def _worth_it(value: ir.Value, array: Array, inside: set[ir.Node]) -> bool:
    if array.nbytes <= _SMALL:
        return True
    roots, stack = set(), [value]
    while stack:
        node = stack.pop().producer()
        for operand in node.inputs if node is not None else ():
            if operand is None:
                continue
            if operand.is_initializer():
                roots.add(operand)
            stack.append(operand)
    alone = [root for root in roots if all(node in inside for node, _ in root.uses())]
    return array.nbytes <= sum(root.const_value.nbytes for root in alone if root.const_value is not None)


def _compute(model: ir.Model, nodes: Sequence[ir.Node], wanted: Sequence[ir.Value]) -> list[Array]:
    """The values of `wanted`, from a model that has nothing but these nodes."""
    values: dict[ir.Value, ir.Value] = {}
    copies = []
    for node in nodes:
        inputs = []
        for value in node.inputs:
            if value is not None and value not in values:
                stored = ir.Value(name=value.name, const_value=value.const_value, shape=value.shape, type=value.type)
                values[value] = stored
            inputs.append(None if value is None else values[value])
        copy = ir.node(node.op_type, inputs, node.attributes, num_outputs=len(node.outputs), name=node.name)
        for mine, theirs in zip(copy.outputs, node.outputs, strict=True):
            mine.name, mine.type, mine.shape = theirs.name, theirs.type, theirs.shape
            values[theirs] = mine
        copies.append(copy)
    used = [value for value in values.values() if value.const_value is not None and value.producer() is None]
    graph = ir.Graph(
        [], [values[value] for value in wanted], nodes=copies, initializers=used, opset_imports=model.opset_imports
    )
    part = ir.Model(graph, ir_version=max(model.ir_version, 4))
    with runner_of(part) as runner:
        try:
            return [np.asarray(array) for array in runner.run(None, {})]
        except Exception as error:  # onnxruntime's errors share no base class
            raise ExportError(first_line(error)) from error
