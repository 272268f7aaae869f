"""Rules of products with a constant weight, of normalisations, and of tables that are looked up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_channels import Channels, Keep, Track
from fxsparse.exporters.file_graph import Array, add_constant, fixed, fresh_name, integer, integers, opset, sizes, text
from fxsparse.exporters.file_rules_heads import matmul as multiply
from fxsparse.graph.channels_atoms import Labels

_EPSILON = float(np.float32(1e-5))  # attributes are float32, so is what ONNX takes where one is missing


def matmul(channels: Channels, node: ir.Node) -> None:
    """Rows of x [..., K] times W [K, N]; other products keep what they read."""
    x, weight = node.inputs[0], fixed(node.inputs[1])
    rank = len(sizes(x) or ())
    if weight is None and any(channels.table(value) is not None for value in node.inputs):
        multiply(channels, node)
        return
    if x is None or weight is None or weight.ndim != 2 or rank < 2:
        for value in node.inputs:
            channels.freeze(node, value, "is no product of rows with a constant matrix")
        return
    inputs, known = _read(channels, node, rank - 1, weight.shape[0])
    made = _constant_rows(weight.T[..., None], known, None)
    outputs = channels.fresh(node.outputs[0], rank - 1, weight.shape[1], made)
    channels.multiply(node, weight.T != 0, inputs, known, outputs)

    def edit(keep: Keep) -> None:
        missing = _missing(weight.T[..., None], known, keep(inputs))[keep(outputs)]
        if missing.any():
            _add_after(channels, node, missing.astype(weight.dtype))

    channels.edit(edit)
    channels.cut(node, 1, 0, inputs)
    channels.cut(node, 1, 1, outputs)


def gemm(channels: Channels, node: ir.Node) -> None:
    """As `matmul`, with a bias; scaled or transposed rows keep what they read."""
    x, weight = node.inputs[0], fixed(node.inputs[1])
    bias = fixed(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
    plain = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
    if x is None or weight is None or bias is None or integer(node, "transA", 0) or not plain:
        for value in node.inputs:
            channels.freeze(node, value, "is scaled, transposed, or has operands that vary")
        return
    turned = bool(integer(node, "transB", 0))
    matrix = weight if turned else weight.T
    if bias.ndim > 1 and bias.shape[0] != 1:
        channels.freeze(node, x, "has a bias that varies over rows")
        return
    full = np.broadcast_to(bias.reshape(-1), (matrix.shape[0],))
    inputs, known = _read(channels, node, 1, matrix.shape[1])
    outputs = channels.fresh(
        node.outputs[0], 1, matrix.shape[0], _constant_rows(matrix[..., None], known, full.astype(np.float64))
    )
    channels.multiply(node, matrix != 0, inputs, known, outputs)
    channels.edit(lambda keep: _edit_bias(channels, node, matrix[..., None], known, inputs, outputs, full, keep))
    channels.cut(node, 1, int(turned), inputs)
    channels.cut(node, 1, int(not turned), outputs)


def conv(channels: Channels, node: ir.Node) -> None:
    """One group: a product over channels. As many groups as channels: an operator for each. Else nothing goes."""
    x, weight = node.inputs[0], fixed(node.inputs[1])
    bias = fixed(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
    if x is None or weight is None or bias is None:
        for value in node.inputs:
            channels.freeze(node, value, "has a weight that varies")
        return
    groups = integer(node, "group", 1)
    matrix = weight.reshape(*weight.shape[:2], -1)
    full = np.broadcast_to(bias.reshape(-1), (matrix.shape[0],))
    if groups == 1:
        inputs, known = _read(channels, node, 1, matrix.shape[1])
        known = known if not _pads(node) else np.where(known == 0, known, np.nan)
        made = _constant_rows(matrix, known, full.astype(np.float64))
        outputs = channels.fresh(node.outputs[0], 1, matrix.shape[0], made)
        channels.multiply(node, np.any(matrix, axis=2), inputs, known, outputs)
        channels.edit(lambda keep: _edit_bias(channels, node, matrix, known, inputs, outputs, full, keep))
        channels.cut(node, 1, 1, inputs)
        channels.cut(node, 1, 0, outputs)
    elif weight.shape[1] == 1 and (track := _own(channels, node, 1)) is not None and track.size == groups:
        _depthwise(channels, node, track, matrix, full)
    else:
        channels.freeze(node, x, "has groups of several channels")


def _depthwise(channels: Channels, node: ir.Node, track: Track, matrix: Array, bias: Array) -> None:
    times = matrix.shape[0] // track.size
    labels = np.repeat(track.labels, times)
    known = np.repeat(track.known, times)
    known = np.where(known == 0, known, np.nan) if _pads(node) else known
    sums = matrix.sum(axis=(1, 2), dtype=np.float64)
    made = np.where(matrix.any(axis=(1, 2)), bias + sums * known, bias.astype(np.float64))
    channels.follow(node.outputs[0], 1, labels, made)
    channels.cut(node, 1, 0, labels)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        channels.cut(node, 2, 0, labels)
    channels.edit(lambda keep: node.attributes.add(ir.AttrInt64("group", int(keep(track.labels).size))))


def conv_transpose(channels: Channels, node: ir.Node) -> None:
    """One group: W [inputs, outputs, ...]. A constant other than zero is none behind it."""
    x, weight = node.inputs[0], fixed(node.inputs[1])
    bias = fixed(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
    if x is None or weight is None or bias is None or integer(node, "group", 1) != 1:
        for value in node.inputs:
            channels.freeze(node, value, "has groups, or a weight that varies")
        return
    matrix = np.moveaxis(weight.reshape(*weight.shape[:2], -1), 0, 1)
    full = np.broadcast_to(bias.reshape(-1), (matrix.shape[0],))
    inputs, known = _read(channels, node, 1, matrix.shape[1])
    known = np.where(known == 0, known, np.nan)
    made = _constant_rows(matrix, known, full.astype(np.float64))
    outputs = channels.fresh(node.outputs[0], 1, matrix.shape[0], made)
    channels.multiply(node, np.any(matrix, axis=2), inputs, known, outputs)
    channels.cut(node, 1, 0, inputs)
    channels.cut(node, 1, 1, outputs)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        channels.cut(node, 2, 0, outputs)


def batch_norm(channels: Channels, node: ir.Node) -> None:
    """For each channel: y = scale (x - mean) / sqrt(variance + epsilon) + B."""
    track = _own(channels, node, 1)
    parts = [fixed(value) for value in node.inputs[1:5]]
    several = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    if track is None or several or integer(node, "training_mode", 0) or any(part is None for part in parts):
        channels.freeze(node, node.inputs[0], "has statistics that vary")
        return
    scale, shift, mean, variance = (np.asarray(part, np.float64) for part in parts)
    with np.errstate(all="ignore"):
        slope = scale / np.sqrt(variance + node.attributes.get_float("epsilon", _EPSILON))
    known = np.where(slope == 0, shift, slope * (track.known - mean) + shift)
    channels.follow(node.outputs[0], 1, track.labels, known)
    for index in range(1, 5):
        channels.cut(node, index, 0, track.labels)


def instance_norm(channels: Channels, node: ir.Node) -> None:
    """Each channel of each sample by itself: a constant one becomes B."""
    track = _own(channels, node, 1)
    scale, shift = fixed(node.inputs[1]), fixed(node.inputs[2])
    if track is None or scale is None or shift is None:
        channels.freeze(node, node.inputs[0], "has parameters that vary")
        return
    known = np.where(np.isfinite(track.known) | (scale == 0), shift, np.nan)
    channels.follow(node.outputs[0], 1, track.labels, known)
    channels.cut(node, 1, 0, track.labels)
    channels.cut(node, 2, 0, track.labels)


def layer_norm(channels: Channels, node: ir.Node) -> None:
    """Reads the axes from `axis` on together; channels before them pass."""
    _along(channels, node, lambda axis, first: axis >= first)


def softmax(channels: Channels, node: ir.Node) -> None:
    """Reads one axis together (all from it on before operator set 13)."""
    early = opset(channels.model) < 13
    _along(channels, node, lambda axis, first: axis == first or (early and axis > first), 1 if early else -1)


def _along(channels: Channels, node: ir.Node, reads: Callable[[int, int], bool], first: int = -1) -> None:
    value = node.inputs[0]
    track, found = channels.tracks.get(value) if value is not None else None, sizes(value)
    if track is None:
        return
    several = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
    if found is None or several or reads(track.axis, integer(node, "axis", first) % len(found)):
        channels.freeze(node, value, "reads all channels together")
        return
    channels.follow(node.outputs[0], track.axis, track.labels)


def gather(channels: Channels, node: ir.Node) -> None:
    """1. Rows of a constant table: its columns are channels. 2. Constant indices along the channels reorder them.

    3. Along another axis channels pass.
    """
    data, index = node.inputs[0], node.inputs[1]
    table, order = fixed(data), fixed(index)
    axis = integer(node, "axis", 0)
    places = sizes(index)
    if table is not None:
        if table.ndim == 2 and axis == 0 and table.dtype.kind == "f" and places is not None:
            columns = np.where((table == table[:1]).all(axis=0), table[0], np.nan)
            labels = channels.fresh(node.outputs[0], len(places), table.shape[1], columns)
            channels.cut(node, 0, 1, labels)
        channels.freeze(node, index, "are indices")
        return
    track, found = channels.tracks.get(data) if data is not None else None, sizes(data)
    channels.freeze(node, index, "are indices")
    if track is None:
        return
    if found is None or places is None:
        channels.freeze(node, data, "meets an operand of unknown rank")
        return
    axis %= len(found)
    if axis != track.axis:
        moved = track.axis + (len(places) - 1 if track.axis > axis else 0)
        channels.follow(node.outputs[0], moved, track.labels, track.known)
    elif order is not None and order.ndim == 1:
        channels.follow(node.outputs[0], axis, track.labels[order], track.known[order])
        channels.edit(lambda keep: _edit_indices(channels, node, order, track, keep))
    else:
        channels.freeze(node, data, "picks channels by indices that vary")


def _edit_indices(channels: Channels, node: ir.Node, order: Array, track: Track, keep: Keep) -> None:
    kept = keep(track.labels)
    if kept.size == track.size:
        return
    place = np.full(track.size, -1)
    place[kept] = np.arange(kept.size)
    moved = place[order]
    channels.replace(node, 1, moved[moved >= 0].astype(order.dtype))


def _own(channels: Channels, node: ir.Node, axis: int) -> Track | None:
    """The channels of the first operand, if they lie at `axis`."""
    value = node.inputs[0]
    track = channels.tracks.get(value) if value is not None else None
    return track if track is not None and track.axis == axis else None


def _read(channels: Channels, node: ir.Node, axis: int, size: int) -> tuple[Labels, Array]:
    """Atoms and constants of the channels that a product reads; fixed ones where they are not followed."""
    track = _own(channels, node, axis)
    if track is not None and track.size == size:
        return track.labels, track.known
    channels.freeze(node, node.inputs[0], "reads another axis")
    return np.zeros(size, np.int64), np.full(size, np.nan)


def _constant_rows(matrix: Array, known: Array, bias: Array | None) -> Array:
    """Outputs that are constant: every weight of theirs meets a constant; NaN for others."""
    reads: Array = np.any(matrix, axis=2)
    finite = np.isfinite(known)
    constant = ~reads[:, ~finite].any(axis=1)
    made = np.full(matrix.shape[0], np.nan)
    sums = matrix[constant].sum(axis=2, dtype=np.float64) @ np.where(finite, known, 0.0)
    made[constant] = sums + (0.0 if bias is None else bias[constant])
    return made


def _missing(matrix: Array, known: Array, kept: Array) -> Array:
    """What the inputs that go would have added, for each output."""
    going = np.ones(matrix.shape[1], bool)
    going[kept] = False
    values = np.where(np.isfinite(known[going]), known[going], 0.0)
    return np.asarray(matrix[:, going].sum(axis=2, dtype=np.float64) @ values)


def _edit_bias(
    channels: Channels,
    node: ir.Node,
    matrix: Array,
    known: Array,
    inputs: Labels,
    outputs: Labels,
    bias: Array,
    keep: Keep,
) -> None:
    """The bias takes over what constant inputs added, and loses its entries of outputs that go."""
    kept, rows = keep(inputs), keep(outputs)
    missing = _missing(matrix, known, kept)[rows] if kept.size < inputs.size else np.zeros(rows.size)
    present = len(node.inputs) > 2 and node.inputs[2] is not None
    if not missing.any() and (rows.size == outputs.size or not present):
        return
    made = (bias[rows].astype(np.float64) + missing).astype(matrix.dtype)
    if present:
        channels.replace(node, 2, made)
    else:
        node.resize_inputs(3)
        channels.replace(node, 2, made)


def _add_after(channels: Channels, node: ir.Node, bias: Array) -> None:
    """An addition behind a product that has no bias of its own; it takes over the name of an output of the graph."""
    out = node.outputs[0]
    addition = ir.node("Add", [out, add_constant(channels.graph, f"{out.name}_bias", bias)])
    total = addition.outputs[0]
    total.type, total.shape, total.name = out.type, out.shape, fresh_name(channels.graph, f"{out.name}_biased")
    addition.name = total.name
    outputs = [i for i, value in enumerate(channels.graph.outputs) if value is out]
    for user, index in list(out.uses()):
        if user is not addition:
            user.replace_input_with(index, total)
    node.append(addition)
    if outputs:
        total.name, out.name = out.name, total.name
    for index in outputs:
        channels.graph.outputs[index] = total
    channels.tracks[total] = channels.tracks[out]


def _pads(node: ir.Node) -> bool:
    """Whether zeros may be put around the input."""
    if text(node, "auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        return True
    return text(node, "auto_pad", "NOTSET") == "NOTSET" and any(integers(node, "pads") or ())


RULES: dict[str, Callable[[Channels, ir.Node], None]] = {
    "MatMul": matmul,
    "Gemm": gemm,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "RMSNormalization": layer_norm,
    "Softmax": softmax,
    "LogSoftmax": softmax,
    "Gather": gather,
}
