"""Which axes of a parameter are outputs, inputs and independent parts, told by the product that uses it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fxsparse.graph.derivations import CONVS, FLIPS, MOVES, PICKS, TRANSPOSED
from fxsparse.nn import layout_of
from fxsparse.sparsity import Layout

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ON_THE_RIGHT = ("other", "mat2", "batch2", "b", "mat_b")
ON_THE_LEFT = ("input", "mat", "mat1", "batch1", "a", "mat_a")
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

_CUTS = frozenset("chunk split getitem narrow unbind".split())
_GATES = ((nn.LSTM, 4), (nn.LSTMCell, 4), (nn.GRU, 3), (nn.GRUCell, 3))


def module_layout(module: nn.Module, attribute: str) -> Layout | None:
    """The layout that the type of the owner tells: layers, attention, recurrent layers, embeddings; else None.

    q, k and v of an attention projection, and the gates of a recurrent weight, are blocks.
    """
    if isinstance(module, LAYERS):
        return layout_of(module) if attribute == "weight" else None
    if isinstance(module, nn.MultiheadAttention):
        return Layout(blocks=3) if attribute == "in_proj_weight" else Layout.linear()
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        gates = next((count for kind, count in _GATES if isinstance(module, kind)), 1)
        return Layout.linear() if attribute.startswith("weight_hr") else Layout(blocks=gates)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Layout.linear()
    return None


def use_layout(
    op: str, argument: str, derived: Sequence[str], shape: Sequence[int], seen: Sequence[int], groups: int = 1
) -> Layout | None:
    """The layout of a parameter that a product takes as a weight; None where the use does not tell.

    Args:
        op: The product.
        argument: The argument of it.
        derived: Parameter-only operations between the two.
        shape: Shape of the parameter.
        seen: Shape of what arrives at the product.
        groups: Groups of a convolution.
    """
    flips = sum(name in FLIPS for name in derived) % 2
    if any(name not in MOVES | FLIPS | PICKS for name in derived):
        return None
    layout = _seen_layout(op, argument, len(seen), groups)
    if layout is None:
        return None
    if op == "linear" and not flips and _CUTS & set(derived) and _is_cut(shape, seen):
        return Layout(blocks=shape[0] // seen[0])
    last = {layout.out_axis, layout.in_axis} == {len(seen) - 2, len(seen) - 1}
    if not any(name in FLIPS | PICKS for name in derived):
        return layout if tuple(shape) == tuple(seen) else None
    matrix = tuple(reversed(seen[-2:])) if flips else tuple(seen[-2:])
    if not last or len(shape) < 2 or tuple(shape[-2:]) != matrix or layout.blocks > 1:
        return None
    out_last = (layout.out_axis == len(seen) - 1) != bool(flips)
    rank = len(shape)
    axes = (rank - 1, rank - 2) if out_last else (rank - 2, rank - 1)
    return Layout(*axes, batch=tuple(range(rank - 2)))


def _is_cut(shape: Sequence[int], seen: Sequence[int]) -> bool:
    """Whether a matrix was cut into several blocks of as many rows."""
    return len(shape) == 2 and shape[1] == seen[1] and 0 < seen[0] < shape[0] and shape[0] % seen[0] == 0


def _seen_layout(op: str, argument: str, rank: int, groups: int) -> Layout | None:
    if op == "multi_head_attention_forward":
        return Layout(blocks=3) if argument == "in_proj_weight" else Layout.linear()
    if op == "linear":
        return Layout.linear()
    if op in CONVS:
        return Layout.conv(groups)
    if op in TRANSPOSED:
        return Layout.conv_transpose(groups)
    if op in ("einsum", "tensordot") or rank < 2:
        return None
    batch = tuple(range(rank - 2))
    if argument in ON_THE_RIGHT and op != "inner":
        return Layout(rank - 1, rank - 2, batch=batch)
    if argument in ON_THE_RIGHT or argument in ON_THE_LEFT:
        return Layout(rank - 2, rank - 1, batch=batch)
    return None


def einsum_layout(equation: object, place: int, rank: int) -> Layout | None:
    """Letters that only the weight brings are outputs, those summed away are inputs, those that stay are experts.

    Of several outputs all but the last are treated as parts; of several inputs all but the last as kernel offsets.
    """
    if not isinstance(equation, str) or "->" not in equation:
        return None
    terms, _, result = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    mine = operands[place]
    others = "".join(operands[:place] + operands[place + 1 :])
    if "." in mine or len(mine) != rank or len(set(mine)) != rank:
        return None
    outputs = [axis for axis, letter in enumerate(mine) if letter in result and letter not in others]
    inputs = [axis for axis, letter in enumerate(mine) if letter in others and letter not in result]
    shared = [axis for axis, letter in enumerate(mine) if letter in others and letter in result]
    if not outputs or not inputs or len(outputs) + len(inputs) + len(shared) != rank:
        return None
    return Layout(outputs[-1], inputs[-1], batch=tuple(sorted([*outputs[:-1], *shared])))


def flipped(layout: Layout) -> Layout:
    """Outputs and inputs exchanged."""
    return Layout(layout.in_axis, layout.out_axis, layout.groups, batch=layout.batch)
