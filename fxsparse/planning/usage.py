"""The uses of every parameter, in one form, whether a run or only the graphs told them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from fxsparse.graph import Capture, Use, WeightUse, weight_uses
from fxsparse.graph.derivations import CONVS, FLIPS, MOVES, PRODUCTS, TRANSPOSED
from fxsparse.graph.match import op_name
from fxsparse.graph.tree import parameters_of
from fxsparse.passes import graphs_of
from fxsparse.planning.layouts import ON_THE_LEFT, ON_THE_RIGHT, einsum_layout, flipped, use_layout
from fxsparse.sparsity import Layout

_FORGETS = frozenset("zeros ones empty full rand randn".split())
"""`x_like` and `new_x` take a shape and no values."""


@dataclass(frozen=True)
class Usage:
    """One use of a parameter.

    Attributes:
        op: The operation, by torch's plain name.
        module: Path of the module whose code uses it.
        weight: Whether the operation takes it as a weight (not as a bias).
        derived: Parameter-only operations before it.
        layout: Which axes of the parameter are outputs and inputs; None when this use does not tell.
        seen: Shape of what reached the operation; None where only a graph tells of the use.
    """

    op: str
    module: str
    weight: bool
    derived: tuple[str, ...]
    layout: Layout | None
    seen: tuple[int, ...] | None = None

    @property
    def plain(self) -> bool:
        """Whether a layer's own forward would use its weight so."""
        return not self.derived and self.weight and (self.op == "linear" or self.op in CONVS or self.op in TRANSPOSED)


def usages_of(model: nn.Module, captured: Capture) -> dict[str, tuple[Usage, ...]]:
    """The uses of every parameter by its first name: from the recording, and what only the graphs can tell.

    Args:
        model: The model.
        captured: Its capture.
    """
    found: dict[str, list[Usage]] = {}
    equations = _graph_uses(captured)
    if captured.recording is None:
        return {name: _up_to_products(uses) for name, uses in equations.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters_of(model)}
    for use in captured.recording.uses:
        if any(op.removesuffix("_like").removeprefix("new_") in _FORGETS for op in use.derived):
            continue
        weight = _is_weight(use)
        layout = _recorded_layout(use, shapes[use.parameter]) if weight else None
        usage = Usage(use.op, use.module, weight, use.derived, layout, use.weight_shape)
        if usage.op == "einsum":
            twins = [other for other in equations.get(use.parameter, ()) if other.op == "einsum"]
            usage = replace(usage, weight=True, layout=common_layout(twins))
        found.setdefault(use.parameter, []).append(usage)
    return {name: _up_to_products(uses) for name, uses in found.items()}


def _up_to_products(uses: Sequence[Usage]) -> tuple[Usage, ...]:
    """The uses up to the first product: what comes out of it is no weight of its factors.

    The operations before a use are told for all the parameters in it together, so a product among them counts only
    where the parameter takes part in one.
    """
    factor = {use.op for use in uses if use.op in PRODUCTS and not PRODUCTS & set(use.derived)}
    return tuple(use for use in uses if not factor & set(use.derived))


def common_layout(usages: Sequence[Usage]) -> Layout | None:
    """The layout on which all uses agree; None when there is none."""
    layouts = {usage.layout for usage in usages}
    return layouts.pop() if len(layouts) == 1 else None


def _is_weight(use: Use) -> bool:
    if use.op == "linear" or use.op in CONVS or use.op in TRANSPOSED:
        return use.argument == "weight"
    if use.op == "multi_head_attention_forward":
        return use.argument.endswith("weight")
    if use.op.startswith("add"):
        return use.argument in ON_THE_LEFT[1:] + ON_THE_RIGHT + ("vec",)
    return True


def _recorded_layout(use: Use, shape: tuple[int, ...]) -> Layout | None:
    return use_layout(use.op, use.argument, use.derived, shape, use.weight_shape, _groups(use))


def _groups(use: Use) -> int:
    """Groups of a convolution, from the channels that went in or came out."""
    convolution, transposed = use.op in CONVS, use.op in TRANSPOSED
    shape = use.input_shape if convolution else use.output_shape
    if not (convolution or transposed) or shape is None:
        return 1
    return max(shape[1 - len(use.weight_shape)] // max(use.weight_shape[1], 1), 1)


def _graph_uses(captured: Capture) -> dict[str, list[Usage]]:
    first = {id(parameter): name for name, parameter in parameters_of(captured.module)}
    found: dict[str, list[Usage]] = {}
    for path, graph in graphs_of(captured.module).items():
        reads = graph.graph.find_nodes(op="get_attr")
        if not reads:
            continue
        parameters = dict(graph.named_parameters(remove_duplicate=False))
        products: set[tuple[str, fx.Node]] = set()
        views: set[fx.Node] = set()
        for use in weight_uses(graph):
            views.update(use.views)
            name = first[id(parameters[use.parameter])]
            shape = tuple(parameters[use.parameter].shape)
            derived = tuple(op_name(view) for view in use.views)
            op = op_name(use.node).removeprefix("r") if op_name(use.node) == "rmatmul" else op_name(use.node)
            found.setdefault(name, []).append(Usage(op, path, True, derived, _graph_layout(use, op, derived, shape)))
            products.add((name, use.node))
        for node in reads:
            if str(node.target) in parameters:
                name = first[id(parameters[str(node.target)])]
                others = [user for user in node.users if (name, user) not in products]
                found.setdefault(name, []).extend(
                    Usage(op_name(user), path, False, (), None) for user in others if user not in views
                )
    return {name: list(dict.fromkeys(uses)) for name, uses in found.items()}


def _graph_layout(use: WeightUse, op: str, derived: tuple[str, ...], shape: tuple[int, ...]) -> Layout | None:
    if use.groups == 0 or any(view not in MOVES | FLIPS for view in derived):
        return None
    flips = sum(view in FLIPS for view in derived) % 2
    if flips and len(shape) != 2:
        return None
    if op == "einsum":
        place = int(use.argument.removeprefix("operand[").removesuffix("]"))
        layout = einsum_layout(use.node.args[0], place, len(shape))
        return flipped(layout) if layout is not None and flips else layout
    return use_layout(op, use.argument, derived, shape, shape[::-1] if flips else shape, use.groups)
