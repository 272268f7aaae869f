"""Finders: which nodes of a graph use which parameter as a weight."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxsparse.errors import CaptureError
from fxsparse.graph.edit import resolve
from fxsparse.graph.tree import parameters_of
from fxsparse.sparsity.layout import Layout


class WeightKind(enum.Enum):
    """What kind of product a weight takes part in."""

    LINEAR = "linear"
    CONV = "conv"
    CONV_TRANSPOSE = "conv_transpose"
    MATMUL = "matmul"
    EINSUM = "einsum"
    BILINEAR = "bilinear"


# op name -> (kind, {position: keyword} of the arguments that may hold a weight)
_OPS: dict[str, tuple[WeightKind, dict[int, str]]] = {
    "linear": (WeightKind.LINEAR, {1: "weight"}),
    **{f"conv{n}d": (WeightKind.CONV, {1: "weight"}) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": (WeightKind.CONV_TRANSPOSE, {1: "weight"}) for n in (1, 2, 3)},
    **{name: (WeightKind.MATMUL, {0: "input", 1: "other"}) for name in ("matmul", "inner")},
    "mm": (WeightKind.MATMUL, {0: "input", 1: "mat2"}),
    "bmm": (WeightKind.MATMUL, {0: "input", 1: "mat2"}),
    "mv": (WeightKind.MATMUL, {0: "input", 1: "vec"}),
    "addmm": (WeightKind.MATMUL, {1: "mat1", 2: "mat2"}),
    "addmv": (WeightKind.MATMUL, {1: "mat", 2: "vec"}),
    "addbmm": (WeightKind.MATMUL, {1: "batch1", 2: "batch2"}),
    "baddbmm": (WeightKind.MATMUL, {1: "batch1", 2: "batch2"}),
    "grouped_mm": (WeightKind.MATMUL, {0: "mat_a", 1: "mat_b"}),
    "tensordot": (WeightKind.MATMUL, {0: "a", 1: "b"}),
    "bilinear": (WeightKind.BILINEAR, {2: "weight"}),
}


@dataclass(frozen=True)
class WeightUse:
    """One use of one parameter as a weight.

    Attributes:
        parameter: its name in the graph's module.
        read: the ``get_attr`` node that reads it.
        node: the product.
        argument: the product's argument that holds it, by torch's name ("operand[i]" for einsum).
        kind: the kind of product.
        views: parameter-only nodes between the two, in order (empty = the parameter itself).
        groups: of a convolution, else 1; 0 when the graph computes it.
        rank: number of dimensions of the parameter.
    """

    parameter: str
    read: fx.Node
    node: fx.Node
    argument: str
    kind: WeightKind
    views: tuple[fx.Node, ...] = ()
    groups: int = 1
    rank: int = 2

    @property
    def layout(self) -> Layout:
        """Which dimensions of the parameter are its outputs and inputs.

        Exact for weights of linear layers and convolutions that are used as they are, and for the operands of matrix
        products (the last two dimensions), one transposition of a matrix included; elsewhere the default (out, in).
        """
        if self.kind is WeightKind.CONV:
            return Layout.conv(max(self.groups, 1))
        if self.kind is WeightKind.CONV_TRANSPOSE:
            return Layout.conv_transpose(max(self.groups, 1))
        if self.kind is WeightKind.LINEAR and self.rank > 2:
            return Layout.linear()
        left = Layout(self.rank - 2, self.rank - 1) if self.rank >= 2 else Layout.linear()
        right = Layout(left.in_axis, left.out_axis)
        on_the_right = self.kind is WeightKind.MATMUL and self.argument in _RIGHT
        flipped = sum(op_name(view) in _TRANSPOSITIONS for view in self.views) % 2 == 1
        return right if on_the_right != flipped else left


_RIGHT = frozenset({"other", "mat2", "batch2", "b", "vec", "mat_b"})
_TRANSPOSITIONS = frozenset({"t", "T", "mT", "transpose", "swapaxes", "swapdims", "adjoint"})


def op_name(node: fx.Node) -> str:
    """The plain name of what a node calls: ``F.linear`` -> "linear", ``x @ w`` and ``x.matmul(w)`` -> "matmul"."""
    if node.op == "call_method":
        return str(node.target).strip("_")
    if node.op != "call_function" or isinstance(node.target, str):
        return ""
    if node.target is getattr:
        return str(node.args[1])
    name = str(getattr(node.target, "__name__", ""))
    return name.split(".")[0] if isinstance(node.target, torch._ops.OpOverload) else name.strip("_")


def parameter_reads(module: fx.GraphModule) -> dict[str, tuple[fx.Node, ...]]:
    """Every ``get_attr`` node that reads a parameter, by the parameter's name (the first of its names in `module`)."""
    reads: dict[str, tuple[fx.Node, ...]] = {}
    first: dict[int, str] | None = None
    for node in module.graph.find_nodes(op="get_attr"):
        value = resolve(module, str(node.target))
        if first is None:
            first = {id(parameter): name for name, parameter in parameters_of(module)}
        if isinstance(value, nn.Parameter) and id(value) in first:
            name = first[id(value)]
            reads[name] = (*reads.get(name, ()), node)
    return reads


def weight_uses(module: fx.GraphModule) -> tuple[WeightUse, ...]:
    """Every use of a parameter as a weight of a product in the graph of `module`, in graph order.

    A weight may be reached through parameter-only nodes (view, transpose, cat, mask, norm...); a parameter of fewer
    than two dimensions is not a weight unless something reshapes it. Layers that are called as modules are not in it.
    """
    chains: dict[fx.Node, list[tuple[str, fx.Node, tuple[fx.Node, ...]]]] = {}
    for name, reads in parameter_reads(module).items():
        for read in reads:
            chains[read] = [(name, read, ())]
    if not chains:
        return ()
    uses: list[WeightUse] = []
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    for node in order:
        uses.extend(_uses_at(module, node, chains))
        inputs = node.all_input_nodes
        if node.op in ("call_function", "call_method") and any(i in chains for i in inputs):
            if all(i in chains or _is_buffer(module, i) for i in inputs):
                found: dict[tuple[str, fx.Node], dict[fx.Node, None]] = {}
                for name, read, views in (chain for i in inputs for chain in chains.get(i, [])):
                    found.setdefault((name, read), {}).update(dict.fromkeys(views))
                chains[node] = [(*key, (*sorted(views, key=order.__getitem__), node)) for key, views in found.items()]
    return tuple(use for use in uses if use.views or use.rank >= 2)


def _is_buffer(module: nn.Module, node: fx.Node) -> bool:
    return node.op == "get_attr" and not isinstance(resolve(module, str(node.target)), nn.Parameter)


def _uses_at(
    module: fx.GraphModule, node: fx.Node, chains: dict[fx.Node, list[tuple[str, fx.Node, tuple[fx.Node, ...]]]]
) -> list[WeightUse]:
    kind, arguments = _weight_arguments(node)
    if kind is None:
        return []
    groups = _groups(node) if kind in (WeightKind.CONV, WeightKind.CONV_TRANSPOSE) else 1
    return [
        WeightUse(name, read, node, argument, kind, views, groups, module.get_parameter(name).ndim)
        for argument, value in arguments
        if isinstance(value, fx.Node)
        for name, read, views in chains.get(value, [])
    ]


def _weight_arguments(node: fx.Node) -> tuple[WeightKind | None, list[tuple[str, Any]]]:
    name = op_name(node)
    if node.op not in ("call_function", "call_method"):
        return None, []
    if name == "einsum":
        rest = node.args[1:]
        operands = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
        return WeightKind.EINSUM, [(f"operand[{i}]", value) for i, value in enumerate(operands)]
    if name == "rmatmul":
        return WeightKind.MATMUL, [("other", node.args[0]), ("input", node.args[1])]
    if name not in _OPS:
        return None, []
    kind, places = _OPS[name]
    found = []
    for position, keyword in places.items():
        value = node.args[position] if position < len(node.args) else node.kwargs.get(keyword)
        found.append((keyword, value))
    return kind, found


def _groups(node: fx.Node) -> int:
    # conv(input, weight, bias, stride, padding, dilation, groups), conv_transpose(..., padding, output_padding, groups)
    value = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return value if isinstance(value, int) else 0


def verify_match_complete(requested: Iterable[str], matched: Iterable[str]) -> None:
    """Check that every requested target was matched exactly once.

    Raises:
        CaptureError: naming the targets that were not matched, or matched more than once.
    """
    counts = Counter(matched)
    wanted = list(requested)
    missing = [name for name in wanted if counts[name] == 0]
    twice = [name for name in wanted if counts[name] > 1]
    if missing:
        raise CaptureError(
            f"no use found for {', '.join(f'`{name}`' for name in missing)}: exclude it, or mask it at the parameter"
        )
    if twice:
        raise CaptureError(f"{', '.join(f'`{n}` (={counts[n]} matches)' for n in twice)} must be matched exactly once")
