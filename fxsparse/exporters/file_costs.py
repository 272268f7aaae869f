"""What a product costs in onnxruntime on one thread, dense and lowered: an estimate that measurements replace.

The constants come from runs on one AVX-512 core (fp32, onnxruntime 1.31): 768x3072 takes 120, 327 and 2315 us at batch
1, 16 and 128, and lowered with 90 % zeros in groups of 64 rows 44, 70 and 450 us. Only ratios are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fxsparse.exporters.file_supports import Layer, Support

_RATE = 250e3  # multiply-adds (as two operations) in a microsecond, for many rows
_HALF = 5.5  # rows at which half of that is reached: fewer are bound by memory
_LOWERED = 0.8  # of that rate, for batched and grouped products
_NODE = 2.5  # us for any operator
_MOVED = 3e-4  # us for an entry that is transposed
_COPIED = 1e-4  # us for an entry that is gathered in long runs
_RUN = 3e-3  # us for one run of entries that is gathered
_CALL = 0.1  # us for one small product of a batched one
_ADDED = 2e-4  # us for an entry of a batched product's result that a bias is added to, by an operator of its own
_ROW = 6e-3  # us for one row of it
_PASSED = 5e-5  # us for an entry of any other product's
_CACHED = 2**18  # entries that are copied fast, to put ones beside them
_COPY = {False: (1e-4, 3e-4), True: (7e-5, 1.1e-4)}  # us for one of few and of many, of rows and of images
WORTHWHILE = 1.15


def expected_gain(layer: Layer, support: Support, points: Sequence[tuple[int, int, int]]) -> float:
    """Dense over lowered time, the geometric mean over several sizes of the input.

    Args:
        layer: the product.
        support: how its rows are grouped.
        points: for each size of the input: rows of the product, entries of one input feature, and samples.
    """
    ratios = [_dense(layer, rows) / _lowered(layer, support, rows, entries, n) for rows, entries, n in points]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0


def _taps(layer: Layer) -> int:
    weight = layer.node.inputs[1]
    shape = [int(size) for size in weight.shape.numpy()] if weight is not None and weight.shape is not None else []
    return math.prod(shape[2:]) if layer.is_conv else 1


def _product(multiply_adds: float, rows: int) -> float:
    return 2 * multiply_adds / (_RATE * rows / (rows + _HALF))


def _dense(layer: Layer, rows: int) -> float:
    outputs, inputs = layer.alive.shape
    added = 0.0 if layer.bias is None else outputs * rows * _PASSED + _NODE * (layer.adder is not None)
    return float(_NODE + _product(outputs * inputs * _taps(layer) * rows, rows) + added)


def dense_us(layer: Layer, points: Sequence[tuple[int, int, int]]) -> float:
    """Estimated microseconds of a layer as it is, summed over the sizes of the input."""
    return sum(_dense(layer, rows) for rows, _, _ in points)


def lowered_us(layer: Layer, support: Support, points: Sequence[tuple[int, int, int]]) -> float:
    """Estimated microseconds of a lowered layer, summed over the sizes of the input."""
    return sum(_lowered(layer, support, rows, entries, n) for rows, entries, n in points)


def _lowered(layer: Layer, support: Support, rows: int, entries: int, samples: int) -> float:
    outputs, inputs = layer.alive.shape
    groups, k = support.columns.shape[0], support.k + support.inside
    gathered, made = groups * k, support.rows.size
    product = _product(made * k * _taps(layer) * rows, rows) / _LOWERED + _CALL * groups
    product += _bias(layer, support, made * rows, rows) + _ones(layer, support, entries)
    reordered = outputs * rows * _COPIED + _NODE if support.places is not None else 0.0
    if layer.is_conv:
        return float(2 * _NODE + gathered * (entries * _COPIED + samples * _RUN) + product + reordered)
    moved = (inputs + outputs) * rows * _MOVED if rows > 1 else 0.0
    nodes = 3 if support.as_conv else 4
    return float(nodes * _NODE + moved + gathered * (rows * _COPIED + _RUN) + product + reordered)


def _bias(layer: Layer, support: Support, results: int, rows: int) -> float:
    """Microseconds to add a bias to the results, 0 where that is part of the product."""
    if layer.bias is None or support.inside:
        return 0.0
    if support.as_conv:
        return results * _PASSED
    return _NODE + (results * _ADDED + results / rows * _ROW if rows > 1 else 0.0)


def _ones(layer: Layer, support: Support, entries: int) -> float:
    """Microseconds to copy the input with ones beside it."""
    if not support.inside:
        return 0.0
    copied = layer.alive.shape[1] * layer.parts * entries
    few, many = _COPY[layer.is_conv]
    return float(_NODE + copied * (many if copied >= _CACHED else few))
