"""How each operator of ONNX treats channels; an operator without a rule needs all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from fxsparse.exporters import (
    file_rules_heads,
    file_rules_move,
    file_rules_product,
    file_rules_reshape,
    file_rules_tables,
    file_rules_views,
)
from fxsparse.exporters.file_channels import Channels
from fxsparse.exporters.file_graph import ONNX, Array, fixed, integer, is_outer, sizes
from fxsparse.exporters.file_values import evaluate, per_channel

Rule = Callable[[Channels, ir.Node], None]

UNARY = (
    *("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Gelu", "Erf", "Exp", "Log", "Neg", "Abs", "Sqrt", "Reciprocal"),
    *("HardSigmoid", "HardSwish", "Elu", "Selu", "Celu", "Softplus", "Softsign", "Mish", "ThresholdedRelu", "Swish"),
    *("Floor", "Ceil", "Round", "Sin", "Cos", "Atan", "Sign", "Identity"),
)
ELEMENTWISE = (*UNARY, "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "PRelu")


def apply_rule(channels: Channels, node: ir.Node) -> None:
    """Follow the channels of a node's operands into its results.

    Rules come in families: elementwise, products (`file_rules_product`), operators on axes (`file_rules_move`,
    `file_rules_reshape`). A node of another domain, or without a rule, needs all channels of what it reads.
    """
    if node.op_type == "Constant":
        return
    along_several = any(value in channels.tables for value in node.inputs if value is not None)
    rule = (TABLES if along_several else RULES).get(node.op_type) if node.domain in ONNX else None
    if rule is None:
        for value in node.inputs:
            channels.freeze(node, value, "has no rule, it is left as it is")
        return
    rule(channels, node)


def without_rule(graph: ir.Graph) -> dict[str, int]:
    """How many nodes of a main graph are left as they are, by operator: foreign ones, nested ones, and others."""
    found: dict[str, int] = {}
    for node in graph:
        foreign = node.domain not in ONNX
        if foreign or is_outer(node) or node.op_type not in (*RULES, "Constant"):
            name = f"{node.domain}.{node.op_type}" if foreign else node.op_type
            found[name] = found.get(name, 0) + 1
    return found


def elementwise(channels: Channels, node: ir.Node) -> None:
    """Operands aligned at the right; those with as many channels have the same ones, a single one serves all."""
    values = [value for value in node.inputs if value is not None]
    ranks = [sizes(value) for value in values]
    tracked = [value for value in values if value in channels.tracks]
    if not tracked:
        return
    if any(rank is None for rank in ranks):
        for value in tracked:
            channels.freeze(node, value, "meets an operand of unknown rank")
        return
    rank = max(len(found or ()) for found in ranks)
    placed = {value: channels.tracks[value].axis + rank - len(sizes(value) or ()) for value in tracked}
    main = max(tracked, key=lambda value: channels.tracks[value].size)
    axis, track = placed[main], channels.tracks[main]
    if track.size == 1:
        for value in tracked:
            channels.freeze(node, value, "may be broadcast")
        return
    for value in tracked:
        other = channels.tracks[value]
        if placed[value] == axis and other.size == track.size:
            channels.atoms.unite(track.labels, other.labels)
        else:
            channels.freeze(node, value, "is broadcast over other channels")
    operands: list[Array | None] = []
    for index, operand in enumerate(node.inputs):
        if operand is None:
            operands.append(None)
            continue
        operands.append(_operand(channels, node, index, operand, axis - rank, main))
    known = evaluate(channels.model, node, operands, track.size)
    channels.follow(node.outputs[0], axis, track.labels, known)


def _operand(
    channels: Channels, node: ir.Node, index: int, operand: ir.Value, from_right: int, main: ir.Value
) -> Array:
    """The constants of one operand; a constant one is cut with the channels, one that varies over them keeps them."""
    track = channels.tracks[main]
    mine = channels.tracks.get(operand)
    rank = len(sizes(operand) or ())
    axis = rank + from_right
    if mine is not None:
        same = mine.axis == axis and mine.size == track.size
        return mine.known if same else np.full(track.size, np.nan)
    array = fixed(operand)
    if array is not None:
        if axis >= 0 and array.shape[axis] == track.size:
            channels.cut(node, index, axis, track.labels)
        return per_channel(array, axis, track.size)
    size = (sizes(operand) or [])[axis] if axis >= 0 else 1
    if size != 1:
        channels.freeze(node, main, "meets an operand that is not followed")
        channels.hold(track.labels)
    return np.full(track.size, np.nan)


def dropout(channels: Channels, node: ir.Node) -> None:
    """In inference what comes in goes out."""
    training = fixed(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    masked = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
    if masked or (len(node.inputs) > 2 and node.inputs[2] is not None and (training is None or bool(training))):
        channels.freeze(node, node.inputs[0], "draws at random")
        return
    _pass_on(channels, node)


def cast(channels: Channels, node: ir.Node) -> None:
    """Between floats."""
    if ir.DataType(integer(node, "to", 0)) in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16):
        _pass_on(channels, node)
    else:
        channels.freeze(node, node.inputs[0], "rounds")


def clip(channels: Channels, node: ir.Node) -> None:
    """Bounds are numbers."""
    for value in node.inputs[1:]:
        if value is not None and ((bound := fixed(value)) is None or bound.size != 1):
            channels.freeze(node, node.inputs[0], "has bounds that vary")
            return
    track = channels.tracks.get(node.inputs[0]) if node.inputs[0] is not None else None
    if track is None:
        return
    bounds = [None if v is None else np.full(track.size, float(fixed(v))) for v in node.inputs[1:]]  # type: ignore[arg-type]
    known = evaluate(channels.model, node, [track.known, *bounds], track.size)
    channels.follow(node.outputs[0], track.axis, track.labels, known)


def _pass_on(channels: Channels, node: ir.Node) -> None:
    table = channels.table(node.inputs[0])
    if table is not None:
        channels.tabulate(node.outputs[0], table)


TABLES: dict[str, Rule] = {
    **dict.fromkeys((*ELEMENTWISE, "Clip", "Where", "IsNaN"), file_rules_heads.elementwise),
    "Dropout": dropout,
    "Cast": cast,
    "MatMul": file_rules_heads.matmul,
    **file_rules_tables.RULES,
    **file_rules_views.RULES,
}


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    "Dropout": dropout,
    "Cast": cast,
    "Clip": clip,
    **file_rules_product.RULES,
    **file_rules_move.RULES,
    **file_rules_reshape.RULES,
    **file_rules_views.RULES,
    "Where": file_rules_heads.elementwise,
    "IsNaN": file_rules_heads.elementwise,
}
