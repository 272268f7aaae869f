"""Which products of an ONNX graph are lowered, by estimate or by measurement in onnxruntime."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from fxsparse.errors import ExportError
from fxsparse.exporters.file_costs import WORTHWHILE, dense_us, expected_gain, lowered_us
from fxsparse.exporters.file_inputs import Feed
from fxsparse.exporters.file_io import to_bytes
from fxsparse.exporters.file_lower import Lowering
from fxsparse.exporters.file_shapes import on_feed
from fxsparse.exporters.file_supports import Layer, Support, forms_of, layer_of, supports_of
from fxsparse.exporters.runtime import interleaved, open_session

_FASTER = 1.05  # measured gains below this are noise
_TRIED = 3  # group sizes that are measured
_SECONDS = 0.15  # for one layer at one size

Sizes = Mapping[str, tuple[int, ...]]


@dataclass(eq=False)
class Choice:
    """What was decided for all products of a graph.

    Attributes:
        lowered: the layers to lower, by node.
        reports: one for each product, in the order of the graph.
        us: estimated microseconds of all products of known size, as chosen.
    """

    lowered: dict[ir.Node, tuple[Layer, Support]] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    us: float = 0.0


@dataclass(frozen=True)
class LayerReport:
    """What was decided for one product with a constant weight.

    Attributes:
        weight: name of the initializer.
        op: its operator.
        shape: [rows, inputs] of its matrix.
        density: alive fraction.
        form: "dense", "gather + matmul" or "gather + conv".
        group: rows of a group; None for a dense one.
        k: columns of a group, without that of a bias.
        bias_inside: whether the bias is a column of the product.
        gain: dense over lowered time, of this layer alone; None where it was not asked.
        measured: whether the gain is a measurement.
        reason: why it stayed dense.
    """

    weight: str
    op: str
    shape: tuple[int, int]
    density: float
    form: str
    group: int | None = None
    k: int | None = None
    bias_inside: bool = False
    gain: float | None = None
    measured: bool = False
    reason: str = ""

    def __str__(self) -> str:
        head = f"{self.weight}  {self.op} {self.shape[0]}x{self.shape[1]}  density {self.density:.3f}  {self.form}"
        gain = "" if self.gain is None else f", {'measured' if self.measured else 'expected'} {self.gain:.2f}x"
        if self.group is None:
            return f"{head}: no speed-up expected: {self.reason}{gain}" if self.reason else head
        bias = ", its bias computed with the product" if self.bias_inside else ""
        return f"{head}: groups of {self.group} rows with {self.k} inputs{bias}{gain}"


def choose(model: ir.Model, feeds: Sequence[Feed], *, measure: bool, threads: int) -> Choice:
    """Decide for every product of the main graph.

    Args:
        model: read only.
        feeds: inputs of the sizes to decide for.
        measure: time each layer in onnxruntime, dense and lowered, instead of the estimate.
        threads: of onnxruntime.
    """
    found = [on_feed(model, feed) for feed in feeds]
    choice = Choice()
    cache: dict[tuple[object, ...], tuple[float, int]] | None = {} if measure else None
    for node in model.graph:
        layer = layer_of(node)
        if layer is None:
            continue
        points = _points(layer, found)
        ways = [way for each in supports_of(layer) for way in forms_of(layer, each)]
        report, support = _decide(model, layer, ways, points, found, cache, threads)
        choice.reports.append(report)
        if support is not None:
            choice.lowered[node] = layer, support
        choice.us += dense_us(layer, points) if support is None else lowered_us(layer, support, points)
    return choice


def _decide(
    model: ir.Model,
    layer: Layer,
    ways: Sequence[Support],
    points: Sequence[tuple[int, int, int]],
    found: Sequence[Sizes],
    cache: dict[tuple[object, ...], tuple[float, int]] | None,
    threads: int,
) -> tuple[LayerReport, Support | None]:
    report = LayerReport(layer.weight, layer.node.op_type, _shape(layer), layer.density, "dense")
    if not ways:
        return replace(report, reason=_why_not(layer)), None
    if not points:
        return replace(report, reason="the sizes of its input are not known"), None
    gain, best = _gain(model, layer, ways, points, found, cache, threads)
    support, measured = ways[best], cache is not None
    if gain < (_FASTER if measured else WORTHWHILE):
        said = f"{'measured' if measured else 'expected'} {gain:.2f}x with groups of {support.group} rows"
        return replace(report, reason=said), None
    form = "gather + conv" if support.as_conv else "gather + matmul"
    report = replace(report, form=form, group=support.group, k=support.k, bias_inside=support.inside)
    return replace(report, gain=gain, measured=measured), support


def _gain(
    model: ir.Model,
    layer: Layer,
    supports: Sequence[Support],
    points: Sequence[tuple[int, int, int]],
    found: Sequence[Sizes],
    cache: dict[tuple[object, ...], tuple[float, int]] | None,
    threads: int,
) -> tuple[float, int]:
    """The best gain, and the support that reaches it."""
    expected = [expected_gain(layer, support, points) for support in supports]
    if cache is None:
        return max((gain, i) for i, gain in enumerate(expected))
    tried = _promising(supports, expected)
    keys = tuple(supports[i].key for i in tried)
    key = (
        layer.node.op_type,
        layer.alive.shape,
        layer.parts,
        layer.bias is None,
        layer.adder is None,
        tuple(points),
        keys,
    )
    if key not in cache:
        try:
            gains = _measured(model, layer, [supports[i] for i in tried], found, threads)
        except ExportError:
            gains = [expected[i] for i in tried]
        cache[key] = max((gain, i) for gain, i in zip(gains, tried, strict=True))
    return cache[key]


def _promising(supports: Sequence[Support], expected: Sequence[float]) -> list[int]:
    """Which to time: the best form of each of the best groups, and every form of the best one of those."""
    order = sorted(range(len(supports)), key=lambda i: -expected[i])
    first: dict[tuple[int, ...], int] = {}
    for i in order:
        first.setdefault(supports[i].key[:3], i)
    best = supports[order[0]].key[:3]
    return [*list(first.values())[:_TRIED], *(i for i in order[1:] if supports[i].key[:3] == best)]


def _measured(
    model: ir.Model, layer: Layer, supports: Sequence[Support], found: Sequence[Sizes], threads: int
) -> list[float]:
    """Dense over lowered time of one layer alone, the geometric mean over the sizes, for each support."""
    logs: list[list[float]] = [[] for _ in supports]
    for each in found:
        x = layer.node.inputs[0]
        shape = each[x.name or ""] if x is not None else ()
        variants = [_single(model, layer, shape, support) for support in (None, *supports)]
        sessions = [open_session(to_bytes(variant), threads) for variant in variants]
        feed = {"x": np.random.default_rng(0).standard_normal(shape).astype(_dtype(layer))}
        calls = {str(i): partial(session.run, None, feed) for i, session in enumerate(sessions)}
        times = interleaved(calls, _SECONDS)
        fast = [statistics.quantiles(times[str(i)], n=4)[0] for i in range(len(sessions))]
        for log, time in zip(logs, fast[1:], strict=True):
            log.append(math.log(fast[0] / time))
    return [math.exp(sum(log) / len(log)) for log in logs]


def _dtype(layer: Layer) -> np.dtype[Any]:
    dtype = layer.node.inputs[1].dtype if layer.node.inputs[1] is not None else None
    return np.dtype(np.float32 if dtype is None else dtype.numpy())


def _single(model: ir.Model, layer: Layer, shape: tuple[int, ...], support: Support | None) -> ir.Model:
    """A model of one layer with its bias, as it is or lowered."""
    dtype = layer.node.inputs[1].type if layer.node.inputs[1] is not None else None
    x = ir.Value(name="x", shape=ir.Shape(shape), type=dtype)
    stored = [_copy(value, f"w{i}") for i, value in enumerate(layer.node.inputs[1:])]
    nodes = [ir.node(layer.node.op_type, [x, *stored], {})]
    nodes[0].attributes.update(layer.node.attributes)
    bias = stored[1] if len(stored) > 1 else None
    outputs = [None] * len(shape) if layer.is_conv else [*shape[:-1], layer.alive.shape[0]]
    if layer.adder is not None:
        stored.append(bias := _copy(layer.bias, "bias"))
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias], {}))
    for node, name in zip(nodes, ("y", "z"), strict=False):
        out = node.outputs[0]
        out.name, out.type, out.shape = name, dtype, ir.Shape(outputs)
    kept = [value for value in stored if value is not None]
    graph = ir.Graph([x], [out], nodes=nodes, initializers=kept, opset_imports=model.opset_imports)
    single = ir.Model(graph, ir_version=model.ir_version)
    if support is not None:
        adder = nodes[1] if layer.adder is not None else None
        alone = replace(layer, node=nodes[0], weight="w0", bias=bias, adder=adder)
        Lowering(single, {nodes[0]: (alone, support)}).run()
    return single


def _copy(value: ir.Value | None, name: str) -> ir.Value | None:
    if value is None:
        return None
    return ir.Value(name=name, shape=value.shape, type=value.type, const_value=_tensor(value))


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    return value.const_value if value.const_value is not None else ir.convenience.get_const_tensor(value)


def _shape(layer: Layer) -> tuple[int, int]:
    rows, inputs = layer.alive.shape
    return int(rows), int(inputs)


def _points(layer: Layer, found: Sequence[Sizes]) -> list[tuple[int, int, int]]:
    """For each size of the input: rows of the product, entries of one input feature, samples."""
    x, out = layer.node.inputs[0], layer.node.outputs[0]
    points = []
    for each in found:
        before, behind = each.get((x.name if x is not None else "") or ""), each.get(out.name or "")
        if before is None or behind is None or not math.prod(before):
            return []
        if layer.is_conv:
            points.append((before[0] * math.prod(behind[2:]), before[0] * math.prod(before[2:]), before[0]))
        else:
            rows = math.prod(before[:-1])
            points.append((rows, rows, 1))
    return points


def _why_not(layer: Layer) -> str:
    if layer.density == 1.0:
        return "it has no zeros" if not layer.is_conv else "every filter reads every input channel"
    if not layer.alive.any():
        return "nothing in it is alive"
    if layer.density > 0.75:
        return "it is too dense"
    return "its zeros are not shared by groups of rows, and onnxruntime makes sparse weights dense"
