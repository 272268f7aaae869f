"""The products of weights in an operator graph, and how many multiply-accumulates they take when channels go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxsparse.graph.channels import Channels
from fxsparse.graph.channels_atoms import Labels
from fxsparse.graph.channels_flow import bound, op_of, shape_of, tensor_arguments
from fxsparse.graph.channels_recurrent import Recurrent, recurrent_of
from fxsparse.graph.operators import OperatorGraph

_OPTIONS = ("stride", "padding", "dilation", "output_padding", "groups")


@dataclass(frozen=True)
class ProductKey:
    """What the latency of one product depends on; products with equal keys take equally long.

    Attributes:
        kind: "linear" (also a product with a matrix), "conv" or "conv_transpose".
        input: shape of the activation, channels included.
        weight: shape of the weight, for "linear" (out, in).
        options: the convolution's options, by name.
    """

    kind: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    options: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for other products."""
        return dict(self.options).get("groups", (1,))[0]

    @property
    def channels(self) -> tuple[int, int]:
        """Input and output channels."""
        if self.kind == "linear":
            return self.weight[1], self.weight[0]
        first, second = self.weight[0], self.weight[1] * self.groups
        return (first, second) if self.kind == "conv_transpose" else (second, first)


@dataclass(frozen=True, eq=False)
class WeightProduct:
    """One product of an activation with something made of parameters.

    Attributes:
        node: the operator.
        fixed: the factor of the multiply-accumulates that no channel changes.
        factors: labels of the dimensions whose sizes are the other factors.
        inputs: labels of its input channels; None = of fixed size.
        outputs: labels of its output channels; None = of fixed size.
        key: what its latency depends on; None where that is not known.
    """

    node: fx.Node
    fixed: int
    factors: tuple[Labels, ...]
    inputs: Labels | None
    outputs: Labels | None
    key: ProductKey | None


def weight_products(channels: Channels, parameters: Iterable[str]) -> tuple[WeightProduct, ...]:
    """Every product with a weight in the first graph, in its order.

    Args:
        channels: the channels of a model.
        parameters: names of its parameters; what is made of buffers only is no weight.
    """
    made = _made_of(channels.graph, set(parameters))
    found: list[WeightProduct | None] = []
    for node in channels.graph.graph.nodes:
        if node.op == "call_function":
            call = recurrent_of(node)
            found += [_product(channels, node, made)] if call is None else _recurrent(channels, node, call, made)
    return tuple(product for product in found if product is not None)


def _made_of(graph: OperatorGraph, parameters: set[str]) -> dict[fx.Node, bool]:
    """Nodes that depend on no input -> whether they depend on a parameter."""
    made: dict[fx.Node, bool] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            made[node] = graph.source(node) in parameters
        elif node.op == "call_function" and all(each in made for each in node.all_input_nodes):
            made[node] = any(made[each] for each in node.all_input_nodes)
    return made


def _product(channels: Channels, node: fx.Node, made: Mapping[fx.Node, bool]) -> WeightProduct | None:
    name = op_of(node)
    if name == "linear":
        a = bound(node)
        return _matrix(channels, node, a["input"], a["weight"], -1) if made.get(a["weight"]) else None
    if name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "mv"):
        left, right = tensor_arguments(node)[-2:] if "add" in name else tensor_arguments(node)[:2]
        if made.get(right) and left not in made:
            return _matrix(channels, node, left, right, -2)
        if made.get(left) and right not in made:
            return _matrix(channels, node, right, left, -1, right_hand=False)
        return None
    if name == "einsum":
        return _einsum(channels, node, made)
    if name == "bilinear":
        weight = bound(node)["weight"]
        return _bilinear(channels, node, weight) if made.get(weight) else None
    if name == "_grouped_mm":
        a = bound(node)
        fixed, factors = _terms(channels, a["mat2"], (1, 2))
        rows = shape_of(node)[0] * fixed
        return WeightProduct(node, rows, tuple(factors), None, None, None) if made.get(a["mat2"]) else None
    if "conv" in name and len(node.args) > 1:
        a = bound(node)
        return _conv(channels, node, a) if made.get(a["weight"]) else None
    return None


def _free(channels: Channels, node: fx.Node, axis: int) -> Labels | None:
    """The labels of a dimension; None where nothing can shorten it."""
    dims = channels.flow.of(node)
    labels = dims[axis] if dims else None
    return None if labels is None or bool(channels.fixed[channels.classes[labels]].all()) else labels


def _terms(channels: Channels, node: fx.Node, axes: Iterable[int]) -> tuple[int, list[Labels]]:
    shape = shape_of(node)
    fixed, factors = 1, []
    for axis in axes:
        labels = _free(channels, node, axis)
        if labels is None:
            fixed *= shape[axis]
        else:
            factors.append(labels)
    return fixed, factors


def _matrix(
    channels: Channels, node: fx.Node, x: fx.Node, weight: fx.Node, inner: int, right_hand: bool = True
) -> WeightProduct | None:
    """A product with a matrix whose dimension `inner` is contracted."""
    shape, rank = shape_of(x), len(shape_of(node))
    contracted = (len(shape) - 1) if right_hand or len(shape) == 1 else len(shape) - 2
    a, first = _terms(channels, node, range(rank))
    b, second = _terms(channels, x, (contracted,))
    w = shape_of(weight)
    key, inputs, outputs = None, _free(channels, x, contracted), None
    if len(w) == 2:
        out = 0 if inner in (-1, 1) else 1
        outputs = _free(channels, weight, out)
        key = ProductKey("linear", shape, (w[out], w[1 - out])) if right_hand else None
    return WeightProduct(node, a * b, (*first, *second), inputs, outputs, key)


def _recurrent(
    channels: Channels, node: fx.Node, call: Recurrent, made: Mapping[fx.Node, bool]
) -> list[WeightProduct | None]:
    """Each weight once a step and batch entry."""
    steps = math.prod(shape_of(call.x)[:-1])
    cells = [cell for layer in call.layers for cell in layer]
    weights = [w for cell in cells for w in (cell.w_ih, cell.w_hh, cell.projection) if w is not None and made.get(w)]
    found: list[WeightProduct | None] = []
    for weight in weights:
        fixed, factors = _terms(channels, weight, (0, 1))
        found.append(WeightProduct(node, steps * fixed, tuple(factors), None, None, None))
    return found


def _bilinear(channels: Channels, node: fx.Node, weight: fx.Node) -> WeightProduct:
    tokens = math.prod(shape_of(node)[:-1])
    fixed, factors = _terms(channels, weight, (0, 1, 2))
    return WeightProduct(node, tokens * fixed, tuple(factors), None, None, None)


def _einsum(channels: Channels, node: fx.Node, made: Mapping[fx.Node, bool]) -> WeightProduct | None:
    """A contraction of two operands, one of them a weight: the product of the sizes of all indices."""
    equation, operands = str(node.args[0]).replace(" ", ""), tensor_arguments(node)
    terms = equation.partition("->")[0].split(",")
    weights = [operand for operand in operands if made.get(operand)]
    if len(operands) != 2 or len(weights) != 1 or all(operand in made for operand in operands) or "." in equation:
        return None
    fixed, factors, seen = 1, list[Labels](), set[str]()
    for term, operand in zip(terms, operands, strict=True):
        for axis, letter in enumerate(term):
            if letter not in seen:
                a, b = _terms(channels, operand, (axis,))
                fixed, factors = fixed * a, [*factors, *b]
            seen.add(letter)
    return WeightProduct(node, fixed, tuple(factors), None, None, None)


def _conv(channels: Channels, node: fx.Node, a: Mapping[str, Any]) -> WeightProduct:
    x, weight = a["input"], a["weight"]
    transposed = bool(a.get("transposed", "transpose" in op_of(node)))
    axis = len(shape_of(x)) - len(shape_of(weight)) + 1
    spatial = x if transposed else node  # the dense sum runs over the input's positions there
    size = math.prod(n for place, n in enumerate(shape_of(spatial)) if place != axis)
    fixed, factors = _terms(channels, weight, (0, 1))
    taps = math.prod(shape_of(weight)[2:])
    key = ProductKey("conv_transpose" if transposed else "conv", shape_of(x), shape_of(weight), _options(a))
    inputs, outputs = _free(channels, x, axis), _free(channels, node, axis)
    return WeightProduct(node, size * fixed * taps, tuple(factors), inputs, outputs, key if axis == 1 else None)


def _options(a: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    rank = len(shape_of(a["weight"])) - 2
    found = []
    for name in _OPTIONS:
        value = a.get(name)
        if isinstance(value, str):  # "same" and "valid"
            value = _named_padding(a, value, rank)
        if value is not None and not isinstance(value, torch.Tensor):
            numbers = tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)
            found.append((name, numbers * rank if len(numbers) == 1 and name != "groups" else numbers))
    return tuple(found)


def _named_padding(a: Mapping[str, Any], name: str, rank: int) -> tuple[int, ...]:
    dilation = a.get("dilation") or (1,) * rank
    steps = [int(dilation[i if len(dilation) > 1 else 0]) for i in range(rank)]
    taps = shape_of(a["weight"])[2:]
    return tuple(step * (k - 1) // 2 if name == "same" else 0 for step, k in zip(steps, taps, strict=True))
