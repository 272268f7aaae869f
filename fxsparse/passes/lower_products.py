"""Products of matrices and attention, for matrices whose axes may lie either way."""

from __future__ import annotations

import math

from torch import fx

from fxsparse.passes.lower_elementwise import Lowering, aligned
from fxsparse.passes.lower_layouts import AxisOrder, Size, natural, permuted
from fxsparse.passes.lower_sites import arguments
from fxsparse.passes.lower_values import ATEN, Value, sizes_of


def product(lowering: Lowering, node: fx.Node) -> Value | None:
    """Products of matrices whose two axes may lie either way."""
    given = arguments(node)
    left = lowering.values[given["self"]]
    right = lowering.values[given.get("other") or given["mat2"]]
    sizes = sizes_of(node)
    if sizes is None or left.rank != right.rank or left.rank != len(sizes) or left.rank < 3:
        return None
    return matrix_product(lowering, left, right, sizes, lowering.wishes.get(node))


def matrix_product(
    lowering: Lowering, left: Value, right: Value, sizes: tuple[Size, ...], wish: AxisOrder | None
) -> Value:
    """The product, or the transpose of it where that is wished for."""
    rank = len(sizes)
    batch = next((b for b in (_batch_order(left), _batch_order(right)) if b is not None), natural(rank - 2))
    row, column = rank - 2, rank - 1

    def operand(value: Value, first: int, second: int) -> fx.Node:
        value = lowering.values.settled(value)
        if value.order == (*batch, second, first):
            return lowering.scribe.call(ATEN.transpose.int, value.node, -2, -1)
        return lowering.values.in_order(value, (*batch, first, second))

    if wish == (*batch, column, row):
        made = lowering.scribe.call(ATEN.matmul.default, operand(right, column, row), operand(left, column, row))
        return Value(made, (*batch, column, row), sizes)
    made = lowering.scribe.call(ATEN.matmul.default, operand(left, row, column), operand(right, row, column))
    return Value(made, (*batch, row, column), sizes)


def _batch_order(value: Value) -> AxisOrder | None:
    rank = value.rank
    if len(value.order) == rank and set(value.order[-2:]) == {rank - 2, rank - 1} and rank > 2:
        return value.order[:-2]
    return None


def attention(lowering: Lowering, node: fx.Node) -> Value | None:
    """Scaled dot-product attention, written out: softmax(q k^T / sqrt(d) + mask) v."""
    given = arguments(node)
    query, key, value = (lowering.values[given[name]] for name in ("query", "key", "value"))
    mask = given["attn_mask"]
    if (
        given["is_causal"]
        or given["enable_gqa"]
        or given["dropout_p"]
        or len({v.rank for v in (query, key, value)}) > 1
    ):
        return None
    if mask is not None and not mask.meta["val"].is_floating_point():
        return None  # rows without any alive entry have a meaning of their own
    rank = query.rank
    if (
        rank < 3
        or not query.sizes[-1].static
        or query.sizes[:-2] != key.sizes[:-2]
        or key.sizes[:-2] != value.sizes[:-2]
    ):
        return None
    scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(query.sizes[-1].hint)
    turned = [*range(rank - 2), rank - 1, rank - 2]
    settled = lowering.values.settled(key)
    keys = Value(settled.node, permuted(settled.order, turned), tuple(settled.sizes[i] for i in turned))
    sizes = (*query.sizes[:-1], key.sizes[-2])
    scores = matrix_product(lowering, query, keys, sizes, None)
    made = lowering.scribe.call(ATEN.mul.Tensor, scores.node, scale)
    if mask is not None:
        bias = aligned(lowering, lowering.values[mask], sizes)
        made = lowering.scribe.call(ATEN.add.Tensor, made, lowering.values.in_order(bias, scores.order))
    made = lowering.scribe.call(ATEN.softmax.int, made, len(scores.order) - 1)
    found = sizes_of(node)
    assert found is not None
    return matrix_product(lowering, Value(made, scores.order, sizes), value, found, lowering.wishes.get(node))
