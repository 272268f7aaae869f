"""The uses of every parameter, in one form, whether a run or only the graphs told them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fxsparse.graph import Capture, Use, WeightUse, weight_uses
from fxsparse.graph.match import op_name
from fxsparse.passes import graphs_of
from fxsparse.sparsity import Layout

_CONVS = tuple(f"conv{n}d" for n in (1, 2, 3))
_TRANSPOSED = tuple(f"conv_transpose{n}d" for n in (1, 2, 3))
_ON_THE_RIGHT = ("other", "mat2", "batch2", "b")
_ON_THE_LEFT = ("input", "mat", "mat1", "batch1", "a")

PRODUCTS = frozenset(
    (*_CONVS, *_TRANSPOSED, *"linear matmul mm bmm mv addmm addmv addbmm baddbmm inner tensordot einsum".split())
    + ("multi_head_attention_forward",)
)
"""Operations whose weights are sparsified by default."""

_MOVES = frozenset("to float double half bfloat16 type type_as contiguous clone detach requires_grad view_as".split())
_FLIPS = frozenset("t T mT transpose swapaxes swapdims".split())
KEEPS_ZEROS = (
    _MOVES
    | _FLIPS
    | frozenset(
        "H mH permute movedim moveaxis view reshape reshape_as flatten unflatten unsqueeze squeeze expand expand_as "
        "cat concat concatenate stack hstack vstack split chunk tensor_split unbind narrow select getitem index_select "
        "flip roll repeat tile pad mul div neg data real imag masked_fill masked_weight where tril triu dropout "
        "cpu cuda multiply divide truediv repeat_interleave broadcast_to block_diag as_strided unfold diagonal".split()
    )
)
"""Derivations that leave a dead entry zero wherever it goes."""


@dataclass(frozen=True)
class Usage:
    """One use of a parameter.

    Attributes:
        op: The operation, by torch's plain name.
        module: Path of the module whose code uses it.
        weight: Whether the operation takes it as a weight (not as a bias).
        derived: Parameter-only operations before it.
        layout: Which axes of the parameter are outputs and inputs; None when this use does not tell.
    """

    op: str
    module: str
    weight: bool
    derived: tuple[str, ...]
    layout: Layout | None

    @property
    def plain(self) -> bool:
        """Whether a layer's own forward would use its weight so."""
        return not self.derived and self.weight and (self.op == "linear" or self.op in _CONVS or self.op in _TRANSPOSED)


def usages_of(model: nn.Module, captured: Capture) -> dict[str, tuple[Usage, ...]]:
    """The uses of every parameter by its first name: from the recording, and what only the graphs can tell.

    Args:
        model: The model.
        captured: Its capture.
    """
    found: dict[str, list[Usage]] = {}
    equations = _graph_uses(model, captured)
    if captured.recording is None:
        return {name: tuple(uses) for name, uses in equations.items()}
    for use in captured.recording.uses:
        weight = _is_weight(use)
        usage = Usage(use.op, use.module, weight, use.derived, _recorded_layout(use) if weight else None)
        if usage.op == "einsum":
            twins = [other for other in equations.get(use.parameter, ()) if other.op == "einsum"]
            usage = Usage(usage.op, usage.module, True, usage.derived, common_layout(twins))
        found.setdefault(use.parameter, []).append(usage)
    return {name: tuple(uses) for name, uses in found.items()}


def common_layout(usages: Sequence[Usage]) -> Layout | None:
    """The layout on which all uses agree; None when there is none."""
    layouts = {usage.layout for usage in usages}
    return layouts.pop() if len(layouts) == 1 else None


def _is_weight(use: Use) -> bool:
    if use.op == "linear" or use.op in _CONVS or use.op in _TRANSPOSED:
        return use.argument == "weight"
    if use.op == "multi_head_attention_forward":
        return use.argument.endswith("weight")
    if use.op.startswith("add"):
        return use.argument in _ON_THE_LEFT[1:] + _ON_THE_RIGHT + ("vec",)
    return True


def _recorded_layout(use: Use) -> Layout | None:
    rank = len(use.weight_shape)
    flips = sum(op in _FLIPS for op in use.derived)
    if any(op not in _MOVES | _FLIPS for op in use.derived) or (flips and rank != 2):
        return None
    layout = _product_layout(use.op, use.argument, rank, _groups(use))
    return _flipped(layout) if layout is not None and flips % 2 else layout


def _product_layout(op: str, argument: str, rank: int, groups: int) -> Layout | None:
    if op in ("linear", "multi_head_attention_forward"):
        return Layout.linear()
    if op in _CONVS:
        return Layout.conv(groups)
    if op in _TRANSPOSED:
        return Layout.conv_transpose(groups)
    if op == "einsum" or op == "tensordot" or rank < 2:
        return None
    if argument in _ON_THE_RIGHT:
        inner = op == "inner"
        return Layout(rank - 2, rank - 1) if inner else Layout(rank - 1, rank - 2)
    return Layout(rank - 2, rank - 1) if argument in _ON_THE_LEFT else None


def _flipped(layout: Layout) -> Layout:
    return Layout(layout.in_axis, layout.out_axis, layout.groups)


def _groups(use: Use) -> int:
    """Groups of a convolution, from the channels that went in or came out."""
    convolution, transposed = use.op in _CONVS, use.op in _TRANSPOSED
    shape = use.input_shape if convolution else use.output_shape
    if not (convolution or transposed) or shape is None:
        return 1
    return max(shape[1 - len(use.weight_shape)] // max(use.weight_shape[1], 1), 1)


def _graph_uses(model: nn.Module, captured: Capture) -> dict[str, list[Usage]]:
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[Usage]] = {}
    for path, graph in graphs_of(captured.module).items():
        parameters = dict(graph.named_parameters(remove_duplicate=False))
        products = set()
        for use in weight_uses(graph):
            name = first[id(parameters[use.parameter])]
            derived = tuple(op_name(view) for view in use.views)
            op = op_name(use.node).removeprefix("r") if op_name(use.node) == "rmatmul" else op_name(use.node)
            found.setdefault(name, []).append(Usage(op, path, True, derived, _graph_layout(use, op, derived)))
            products.add((name, use.node))
        for node in graph.graph.nodes:
            if node.op == "get_attr" and str(node.target) in parameters:
                name = first[id(parameters[str(node.target)])]
                others = [user for user in node.users if (name, user) not in products]
                found.setdefault(name, []).extend(
                    Usage(op_name(user), path, False, (), None) for user in others if not _leads_to_product(user, graph)
                )
    return {name: list(dict.fromkeys(uses)) for name, uses in found.items()}


def _leads_to_product(user: object, graph: nn.Module) -> bool:
    return any(user in use.views for use in weight_uses(graph))  # type: ignore[arg-type]  # graph is a GraphModule


def _graph_layout(use: WeightUse, op: str, derived: tuple[str, ...]) -> Layout | None:
    rank = int(use.read.meta.get("rank", 2))
    flips = sum(view in _FLIPS for view in derived)
    if any(view not in _MOVES | _FLIPS for view in derived) or (flips and rank != 2):
        return None
    if op == "einsum":
        layout = _einsum_layout(use, rank)
    else:
        if use.groups == 0:
            return None
        layout = _product_layout(op, use.argument, rank, use.groups)
    return _flipped(layout) if layout is not None and flips % 2 else layout


def _einsum_layout(use: WeightUse, rank: int) -> Layout | None:
    """The letter that only the weight brings is the output; the one that is summed away is the input."""
    equation = use.node.args[0]
    if not isinstance(equation, str) or "->" not in equation:
        return None
    terms, _, result = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    place = int(use.argument.removeprefix("operand[").removesuffix("]"))
    mine = operands[place]
    others = "".join(operands[:place] + operands[place + 1 :])
    outputs = [axis for axis, letter in enumerate(mine) if letter in result and letter not in others]
    inputs = [axis for axis, letter in enumerate(mine) if letter in others and letter not in result]
    if "." in mine or len(mine) != rank or len(outputs) != 1 or len(inputs) != 1:
        return None
    return Layout(outputs[0], inputs[0])
