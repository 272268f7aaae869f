"""What an elementwise operator makes of channels that are constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_graph import Array, opset


def per_channel(array: Array, axis: int, size: int) -> Array:
    """The number that a constant operand holds for each channel, NaN where it holds several; `axis` < 0 for none."""
    if axis < 0 or array.shape[axis] == 1:
        flat = array.reshape(1, -1)
    else:
        flat = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    if not flat.shape[1]:
        return np.full(size, np.nan)
    same = (flat == flat[:, :1]).all(axis=1)
    return np.broadcast_to(np.where(same, flat[:, 0].astype(np.float64), np.nan), (size,)).copy()


def evaluate(model: ir.Model, node: ir.Node, operands: Sequence[Array | None], size: int) -> Array:
    """The channels of the result, from those of the operands; NaN where it varies or is not finite.

    Args:
        model: gives the version of the operators.
        node: an operator that treats every entry alike.
        operands: one number for each channel of each operand, in float64, NaN where it varies; None where the operator
            has no such operand.
        size: number of channels.
    """
    given = [operand for operand in operands if operand is not None]
    ready = np.all([np.isfinite(operand) for operand in given], axis=0) if given else np.zeros(size, bool)
    result = np.full(size, np.nan)
    if ready.any():
        result[ready] = _run(model, node, [None if o is None else o[ready] for o in operands])
    if node.op_type == "Mul":
        result[np.any([operand == 0 for operand in given], axis=0)] = 0.0
    return np.where(np.isfinite(result), result, np.nan)


def _run(model: ir.Model, node: ir.Node, operands: Sequence[Array | None]) -> Array:
    import onnx
    from onnx.reference import ReferenceEvaluator

    names = [f"x{i}" if operand is not None else "" for i, operand in enumerate(operands)]
    proto = ir.to_proto(node)
    attributes = [attribute for attribute in proto.attribute if attribute.name not in ("to", "axis")]
    single = onnx.helper.make_node(node.op_type, names, ["y"])
    single.attribute.extend(attributes)
    if node.op_type == "Cast":
        return np.asarray(operands[0])
    typed = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None) for name in names if name]
    made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, None)
    graph = onnx.helper.make_graph([single], "one", typed, [made])
    whole = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset(model))])
    feed = {name: operand for name, operand in zip(names, operands, strict=True) if operand is not None}
    with np.errstate(all="ignore"):
        try:
            found: Any = ReferenceEvaluator(whole).run(None, feed)
        except Exception:  # an operator that the reference lacks: nothing is known of its result
            return np.full(next(iter(feed.values())).shape, np.nan)
    return np.asarray(found[0], np.float64)
