"""Sizes that the file fixes become constants, and a transposition of two axes becomes one operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_forward import read_sizes
from fxsparse.exporters.file_graph import ONNX, add_constant, integers, opset
from fxsparse.exporters.file_numbers import WHOLE, Size, known, names


def settle_sizes(model: ir.Model) -> int:
    """Let constants take the place of whole numbers that are computed from fixed sizes; returns how many did.

    Which sizes a file fixes follows from its inputs; onnxruntime takes no others.
    """
    if opset(model) < 10:
        return 0
    numbers = {
        value: np.array(entries, dtype=dtype.numpy())
        for value, entries in read_sizes(model).items()
        if (dtype := value.dtype) in WHOLE and dtype is not None
        if known(entries) is not None and not value.is_graph_output()
    }
    settled = 0
    for value, array in numbers.items():
        uses = [(node, index) for node, index in value.uses() if not all(out in numbers for out in node.outputs)]
        if uses:
            constant = add_constant(model.graph, f"{value.name}_size", array)
            for node, index in uses:
                node.replace_input_with(index, constant)
            settled += 1
    return settled


def join_transpositions(model: ir.Model) -> int:
    """Let a Reshape to [-1, s, d], a Transpose and a Reshape to [.., d, s] be one Transpose; returns the number."""
    joined = 0
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain not in ONNX:
            continue
        middle = node.inputs[0].producer() if node.inputs[0] is not None else None
        if middle is None or middle.op_type != "Transpose" or integers(middle, "perm") != [0, 2, 1]:
            continue
        before = middle.inputs[0].producer() if middle.inputs[0] is not None else None
        if before is None or before.op_type != "Reshape" or before.domain not in ONNX:
            continue
        x, merged, out = names(before.inputs[0]), names(middle.inputs[0]), names(node.outputs[0])
        if x is None or merged is None or out is None or not _is_transposition(x, merged, out):
            continue
        rank = len(x)
        made = ir.node("Transpose", [before.inputs[0]], {"perm": [*range(rank - 2), rank - 1, rank - 2]})
        value, old = made.outputs[0], node.outputs[0]
        value.name, value.type, value.shape = old.name, old.type, old.shape
        made.name = node.name
        node.prepend(made)
        old.name = f"{old.name}_before"
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        joined += 1
    return joined


def _is_transposition(x: list[Size], merged: list[Size], out: list[Size]) -> bool:
    if len(x) != len(out) or len(merged) != 3 or len(x) < 3:
        return False
    same = [*zip(merged[1:], x[-2:], strict=True), *zip(out, [*x[:-2], x[-1], x[-2]], strict=True)]
    unknown = [a is None or b is None or a != b for a, b in same]
    # of the leading axes one may be unknown: the product says what it is
    return not any(unknown[:2]) and not any(unknown[-2:]) and sum(unknown[2:-2]) <= 1
