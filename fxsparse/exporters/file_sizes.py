"""Sizes that the file fixes become constants, and a transposition of two axes becomes one operator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_graph import ONNX, add_constant, fixed, integer, integers, opset, sizes, whole

Names = list[int | str | None]


def settle_sizes(model: ir.Model) -> int:
    """Let constants take the place of what reads fixed sizes off a Shape; returns how many did.

    Which sizes a file fixes follows from its inputs; onnxruntime takes no others.
    """
    if opset(model) < 10:
        return 0
    settled = 0
    for node in list(model.graph):
        if node.op_type != "Shape" or node.domain not in ONNX or node.outputs[0].is_graph_output():
            continue
        found = sizes(node.inputs[0])
        if found is None:
            continue
        start, end, _ = slice(integer(node, "start", 0), node.attributes.get_int("end"), 1).indices(len(found))
        for user, index in list(node.outputs[0].uses()):
            picked = _picked(user, index, found[start:end]) if user.graph is model.graph else None
            if picked is not None and not user.outputs[0].is_graph_output():
                constant = add_constant(model.graph, f"{user.outputs[0].name}_size", picked)
                user.outputs[0].replace_all_uses_with(constant)
                settled += 1
    return settled


def _picked(
    user: ir.Node, index: int, found: Sequence[int | None]
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    """What a Gather or Slice takes of a shape; None where it is not all known."""
    if user.domain not in ONNX or index != 0:
        return None
    if user.op_type == "Gather" and integer(user, "axis", 0) in (0, -1):
        order = fixed(user.inputs[1])
        if order is None or order.ndim > 1 or any(not -len(found) <= i < len(found) for i in order.reshape(-1)):
            return None
        taken: list[int | None] = [found[int(i)] for i in order.reshape(-1)]
        return None if None in taken else np.asarray(taken, np.int64).reshape(order.shape)
    if user.op_type == "Slice" and len(user.inputs) >= 3:
        starts, ends, steps = (whole(value) for value in [*user.inputs[1:3], (*user.inputs, None, None)[4]])
        if starts is None or ends is None or len(starts) != 1 or (len(user.inputs) > 4 and steps is None):
            return None
        taken = list(found)[slice(starts[0], ends[0], steps[0] if steps else 1)]
        return None if None in taken else np.asarray(taken, np.int64)
    return None


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
        x, merged, out = _names(before.inputs[0]), _names(middle.inputs[0]), _names(node.outputs[0])
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


def _names(value: ir.Value | None) -> Names | None:
    """Sizes of a value: a number, a name that stands for one, or None."""
    if value is None or value.shape is None:
        return None
    return [size if isinstance(size, int) else size.value for size in value.shape]


def _is_transposition(x: Names, merged: Names, out: Names) -> bool:
    if len(x) != len(out) or len(merged) != 3 or len(x) < 3:
        return False
    same = [*zip(merged[1:], x[-2:], strict=True), *zip(out, [*x[:-2], x[-1], x[-2]], strict=True)]
    unknown = [a is None or b is None or a != b for a, b in same]
    # of the leading axes one may be unknown: the product says what it is
    return not any(unknown[:2]) and not any(unknown[-2:]) and sum(unknown[2:-2]) <= 1
