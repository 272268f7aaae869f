"""Where an exported graph multiplies by a weight: the layers that can be lowered."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxsparse.graph import edit
from fxsparse.passes.lower_values import ATEN, sizes_of

CONVOLUTIONS = {
    ATEN.conv1d.default: 1,
    ATEN.conv2d.default: 2,
    ATEN.conv3d.default: 3,
    ATEN.conv1d.padding: 1,
    ATEN.conv2d.padding: 2,
    ATEN.conv3d.padding: 3,
    ATEN.convolution.default: 0,
}
"""Operators -> spatial axes; 0 where the weight tells."""

_PRODUCTS = (ATEN.linear.default, ATEN.addmm.default, ATEN.mm.default, ATEN.matmul.default)


@dataclass(frozen=True, eq=False)
class Site:
    """One product with a weight.

    Attributes:
        node: The node.
        kind: "linear" or "conv".
        name: The parameter that the weight is, or is computed from.
        input: The node that makes the input.
        weight: (rows, positions of a group, *kernel).
        weight_node: What makes the weight; the same object for every use.
        bias: The bias (rows), or None.
        groups: Groups of the convolution.
        direct: Whether the weight is the parameter itself or its transpose.
        options: Arguments after the bias, by name.
    """

    node: fx.Node
    kind: str
    name: str
    input: fx.Node
    weight: Tensor
    weight_node: fx.Node
    bias: Tensor | None
    groups: int
    direct: bool
    options: Mapping[str, Any]

    @property
    def columns(self) -> int:
        """Columns of the product on the example inputs."""
        sizes = sizes_of(self.node)
        assert sizes is not None
        total = 1
        for size in sizes:
            total *= size.hint
        return max(1, total // max(1, self.weight.shape[0]))

    def wide(self) -> Tensor:
        """The weight with the positions of all groups, (rows, positions, *kernel)."""
        return widened(self.weight.detach(), self.groups)


def widened(weight: Tensor, groups: int) -> Tensor:
    """A grouped weight with the positions of all its groups; zeros where a row reads nothing."""
    if groups == 1:
        return weight
    rows, inputs = weight.shape[:2]
    wide = weight.new_zeros(rows, inputs * groups, *weight.shape[2:])
    for group in range(groups):
        part = slice(group * rows // groups, (group + 1) * rows // groups)
        wide[part, group * inputs : (group + 1) * inputs] = weight[part]
    return wide


class Constants:
    """Values of the nodes that depend on nothing but parameters and buffers.

    Args:
        module: The exported module.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self._found: dict[fx.Node, Tensor | None] = {}
        self._parts: dict[fx.Node, Any] = {}
        self._parameters: dict[fx.Node, tuple[str, bool]] = {}

    def __call__(self, node: Any) -> Tensor | None:
        """The value; None where the node depends on more, or is no tensor."""
        if not isinstance(node, fx.Node):
            return None
        for found in _inputs_first(node, self._found):
            self._found[found] = self._evaluate(found)
        return self._found[node]

    def _evaluate(self, node: fx.Node) -> Tensor | None:
        if node.op == "get_attr":
            found = edit.resolve(self.module, str(node.target))
            return found if isinstance(found, Tensor) else None
        if node.op != "call_function" or not node.all_input_nodes or edit.is_impure(node):
            return None
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            if node.args[0] not in self._parts:
                self._parts[node.args[0]] = self._computed(node.args[0])
            parts = self._parts[node.args[0]]
            found = None if parts is None else parts[node.args[1]]
        else:
            found = self._computed(node) if sizes_of(node) is not None else None
        return found if isinstance(found, Tensor) else None

    def _computed(self, node: fx.Node) -> Any:
        """What an operator makes of constants; None where one of its inputs is none."""
        if not isinstance(node.target, torch._ops.OpOverload) or not self.follows(node):
            return None
        values = {found: self(found) for found in node.all_input_nodes}
        if any(value is None for value in values.values()):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda found: values[found])
        with torch.no_grad():
            return node.target(*args, **kwargs)

    def follows(self, node: fx.Node) -> bool:
        """Whether the operator may be computed."""
        return True

    def parameter(self, node: fx.Node) -> tuple[str, bool]:
        """The largest parameter that a constant node reads, and whether it is that, at most transposed."""
        for found in _inputs_first(node, self._parameters):
            self._parameters[found] = self._largest(found)
        return self._parameters[node]

    def _largest(self, node: fx.Node) -> tuple[str, bool]:
        if node.op == "get_attr":
            return str(node.target), True
        read = [(self(found), *self._parameters[found]) for found in node.all_input_nodes]
        name = min((-(value.numel() if value is not None else 0), name) for value, name, _ in read)[1]
        same = node.target in (ATEN.t.default, ATEN.transpose.int, ATEN.permute.default)
        return name, same and read[0][2]


def _inputs_first(node: fx.Node, known: Container[fx.Node]) -> Iterator[fx.Node]:
    """The node and what it reads, each after its inputs; whoever asks makes each known before going on."""
    waiting = [node]  # no recursion: chains may be thousands of nodes long
    while waiting:
        missing = [found for found in waiting[-1].all_input_nodes if found not in known]
        waiting += missing
        if not missing:
            last = waiting.pop()
            if last not in known:
                yield last


def find_sites(module: fx.GraphModule, constants: Constants) -> list[Site]:
    """Every product of an input with a weight that depends on parameters only, in the order of the graph."""
    found = (_site(node, constants) for node in list(module.graph.nodes))
    return [site for site in found if site is not None]


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an operator by name, with defaults."""
    schema = node.target._schema  # type: ignore[union-attr]  # operators have one
    result: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            result[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            result[argument.name] = node.kwargs[argument.name]
        else:
            result[argument.name] = argument.default_value if argument.has_default_value() else None
    return result


def _site(node: fx.Node, constants: Constants) -> Site | None:
    if node.op != "call_function":
        return None
    if node.target in CONVOLUTIONS:
        return _conv_site(node, constants)
    if node.target in _PRODUCTS:
        return _linear_site(node, constants)
    return None


def _conv_site(node: fx.Node, constants: Constants) -> Site | None:
    given = arguments(node)
    weight, bias = constants(given["weight"]), constants(given.get("bias"))
    if weight is None or (given.get("bias") is not None and bias is None) or given.get("transposed"):
        return None
    sizes = sizes_of(node)
    source = given["input"]
    if sizes is None or len(sizes) != weight.ndim or constants(source) is not None:  # without a batch axis
        return None
    name, direct = constants.parameter(given["weight"])
    options = {key: given[key] for key in ("stride", "padding", "dilation")}
    return Site(node, "conv", name, source, weight, given["weight"], bias, given["groups"], direct, options)


def _linear_site(node: fx.Node, constants: Constants) -> Site | None:
    if node.target is ATEN.linear.default:
        given = arguments(node)
        source, weight_node, bias_node = given["input"], given["weight"], given["bias"]
        weight = constants(weight_node)
    else:
        if node.target is ATEN.addmm.default:
            given = arguments(node)
            if given["beta"] != 1 or given["alpha"] != 1:
                return None
            bias_node, source, weight_node = given["self"], given["mat1"], given["mat2"]
        else:
            source, weight_node = node.args[:2]
            bias_node = None
        found = constants(weight_node)
        weight = found.t() if found is not None and found.ndim == 2 else None
    bias = constants(bias_node)
    if weight is None or weight.ndim != 2 or constants(source) is not None or sizes_of(source) is None:
        return None
    if bias_node is not None and (bias is None or bias.shape != weight.shape[:1]):
        return None
    name, direct = constants.parameter(weight_node)
    return Site(node, "linear", name, source, weight, weight_node, bias, 1, direct, {})
