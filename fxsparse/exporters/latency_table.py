"""Latencies of a model's products at several widths, measured in onnxruntime on this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.exporters.runtime import interleaved, open_session
from fxsparse.graph.channels_products import ProductKey, weight_products
from fxsparse.passes.compact_analysis import analysed
from fxsparse.planning.compaction import captured_form, check_compactable, folded_form
from fxsparse.planning.latency_table import LatencyGrid, LatencyTable

WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
_OPSET, _IR = 17, 8


@dataclass
class _Wanted:
    """Whether the inputs and the outputs of a product can get fewer, in any of its places."""

    inputs: bool = False
    outputs: bool = False


def measure_latency_table(
    model: nn.Module,
    example_inputs: Any,
    *,
    widths: Sequence[float] = WIDTHS,
    threads: int = 1,
    seconds: float = 0.2,
) -> LatencyTable:
    """Measure every different product with a weight, alone, in float32, at several numbers of channels.

    Alone a product finds its weights in the cache, so that the sum is less than the latency of the whole model; how
    products compare with each other, and with themselves at fewer channels, is what the table is for.

    Args:
        model: any module; it stays as it is.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``; latencies hold for their sizes.
        widths: fractions of the channels at which to measure, in (0, 1], with 1 among them.
        threads: threads of onnxruntime.
        seconds: about how long to measure each product, all its widths together.

    Returns:
        The table, for `LatencyBudget`: lower quartiles.

    Raises:
        ConfigError: `widths`, `threads` or `seconds` out of range.
        CaptureError: the model cannot be run on the inputs.
        ExportError: onnxruntime refuses a product.
    """
    import onnxruntime

    _check(widths, threads, seconds)
    check_compactable(model)
    channels = analysed(folded_form(captured_form(model, example_inputs)), example_inputs)
    wanted: dict[ProductKey, _Wanted] = {}
    for product in weight_products(channels, [name for name, _ in model.named_parameters()]):
        if product.key is not None:
            entry = wanted.setdefault(product.key, _Wanted())
            entry.inputs |= product.inputs is not None
            entry.outputs |= product.outputs is not None
    grids = {key: _grid(key, entry, widths, threads, seconds) for key, entry in wanted.items()}
    return LatencyTable(grids, f"onnxruntime {onnxruntime.__version__}, {threads} thread{'s' * (threads > 1)}")


def _check(widths: Sequence[float], threads: int, seconds: float) -> None:
    if not widths or any(not 0 < width <= 1 for width in widths) or max(widths) != 1:
        raise ConfigError(f"`widths` (={tuple(widths)}) must be in (0, 1], with 1 among them")
    if not isinstance(threads, int) or threads < 1:
        raise ConfigError(f"`threads` (={threads!r}) must be an int of at least 1")
    if not math.isfinite(seconds) or seconds <= 0:
        raise ConfigError(f"`seconds` (={seconds}) must be positive")


def _grid(key: ProductKey, wanted: _Wanted, widths: Sequence[float], threads: int, seconds: float) -> LatencyGrid:
    inputs, outputs = key.channels
    if key.groups > 1:
        steps = _grouped_widths(key, widths if wanted.inputs or wanted.outputs else (1.0,))
        points = {(i, o): groups for i, o, groups in steps}
        rows: tuple[int, ...] = ()
        columns = tuple(sorted({o for _, o, _ in steps}))
    else:
        rows = _sizes(inputs, widths if wanted.inputs else (1.0,))
        columns = _sizes(outputs, widths if wanted.outputs else (1.0,))
        points = {(i, o): 1 for i in rows for o in columns}
    calls = {f"{i}/{o}": _call(key, i, o, groups, threads) for (i, o), groups in points.items()}
    times = {name: float(np.quantile(each, 0.25)) for name, each in interleaved(calls, seconds).items()}  # noise adds
    found = {point: times[f"{point[0]}/{point[1]}"] for point in points}
    if rows:
        return LatencyGrid(rows, columns, tuple(tuple(found[i, o] for o in columns) for i in rows))
    by_output = {o: value for (_, o), value in found.items()}
    return LatencyGrid((), columns, (tuple(by_output[o] for o in columns),))


def _sizes(channels: int, widths: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(width * channels)) for width in widths}))


def _grouped_widths(key: ProductKey, widths: Sequence[float]) -> list[tuple[int, int, int]]:
    """(Inputs, outputs, groups): fewer groups where that comes out even, else fewer channels in each."""
    inputs, outputs = key.channels
    found: dict[int, tuple[int, int, int]] = {}
    for width in widths:
        groups = max(1, round(key.groups * width))
        if groups * 8 < key.groups * width * 7 or groups * 7 > key.groups * width * 8:
            i, o = (max(1, round(n / key.groups * width)) for n in (inputs, outputs))
            found[o * key.groups] = (i * key.groups, o * key.groups, key.groups)
        else:
            found[outputs // key.groups * groups] = (
                inputs // key.groups * groups,
                outputs // key.groups * groups,
                groups,
            )
    return list(found.values())


def _call(key: ProductKey, inputs: int, outputs: int, groups: int, threads: int) -> Any:
    """A call of onnxruntime that runs the product at these widths on random numbers."""
    random = np.random.default_rng(0)
    axis = -1 if key.kind == "linear" else 1
    shape = list(key.input)
    shape[axis] = inputs
    session = open_session(_model(key, shape, inputs, outputs, groups, random), threads)
    feed = {"x": random.standard_normal(shape, dtype=np.float32)}
    return partial(session.run, None, feed)


def _model(
    key: ProductKey, shape: Sequence[int], inputs: int, outputs: int, groups: int, random: np.random.Generator
) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    size: tuple[int, ...] = (inputs, outputs)
    op, attributes = "MatMul", dict[str, Any]()
    if key.kind != "linear":
        transposed, taps = key.kind == "conv_transpose", key.weight[2:]
        size = (inputs, outputs // groups, *taps) if transposed else (outputs, inputs // groups, *taps)
        op, attributes = ("ConvTranspose" if transposed else "Conv"), _attributes(key, groups)
    weight = numpy_helper.from_array(random.standard_normal(size, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], **attributes)],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    message: bytes = model.SerializeToString()
    return message


def _attributes(key: ProductKey, groups: int) -> dict[str, Any]:
    options = dict(key.options)
    attributes: dict[str, Any] = {"kernel_shape": list(key.weight[2:]), "group": groups}
    for name, attribute in (("stride", "strides"), ("dilation", "dilations")):
        if name in options:
            attributes[attribute] = list(options[name])
    if "padding" in options:
        attributes["pads"] = [*options["padding"], *options["padding"]]
    if key.kind == "conv_transpose" and any(options.get("output_padding", ())):
        attributes["output_padding"] = list(options["output_padding"])
    return attributes
