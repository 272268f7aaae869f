"""Constants through operators that make, pick, place and rank entries, and through products of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxsparse.graph.channels_flow import bound, op_of, shape_of
from fxsparse.graph.channels_gather import picks
from fxsparse.passes.compact_known import Known, broadcast, get, or_unknown

_FILLED = {"zeros": 0.0, "ones": 1.0, "new_zeros": 0.0, "new_ones": 1.0, "zeros_like": 0.0, "ones_like": 1.0}
CREATED = frozenset((*_FILLED, "full", "new_full", "full_like"))
"""Operators that make a tensor of one value."""


def created(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """One number everywhere."""
    number = _FILLED.get(op_of(node), bound(node).get("fill_value"))
    dtype = node.meta.get("dtype")
    if not isinstance(number, int | float) or dtype is None or dtype.is_complex:
        return None
    shape = (1,) * len(shape_of(node))
    value = torch.full(shape, number, dtype=torch.float64 if dtype.is_floating_point else dtype)
    return Known(value, torch.ones(shape, dtype=torch.bool))


def indexed(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """x[indices]: what does not vary along the indexed dimensions stays."""
    source, given = get(node.args[0], found), bound(node).get("indices")
    where = picks(given) if isinstance(given, list | tuple) else None
    if source is None or where is None:
        return None
    first, count, rank = where
    before = source.value.shape
    if any(n != 1 for n in before[first : first + count]):
        return None
    shape = (*before[:first], *(1 for _ in range(rank)), *before[first + count :])
    return Known(source.value.reshape(shape), source.known.broadcast_to(before).reshape(shape))


def selected(node: fx.Node, found: Mapping[fx.Node, Known]) -> Any:
    """index_select, gather, topk, sort: entries of one dimension, in another order or number."""
    source = get(node.args[0], found)
    dim = bound(node).get("dim")
    if source is None or dim is None or source.value.shape[int(dim) % source.value.ndim] != 1:
        return None
    if op_of(node) == "gather" and len(shape_of(node)) != source.value.ndim:
        return None
    result = Known(source.value, source.known)
    return result if node.meta.get("shape") is not None else [result, None]


def placed(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """Writing zeros into zeros, or adding them up: scatter, scatter_add, index_add, index_copy, index_put."""
    a = bound(node)
    values = a.get("src", a.get("source", a.get("values")))
    own, put = get(a["self"], found), get(values, found)
    if own is None or put is None:
        return None
    rank = own.value.ndim
    zero, other = own.zero.broadcast_to(own.value.shape), put.zero.broadcast_to(put.value.shape)
    if "indices" in a:
        where = picks(a["indices"])
        if where is None:
            return None
        first, count, width = where
        other = other.reshape([1] * (rank - count + width - other.ndim) + list(other.shape))
        other = _all(other, range(first, first + width)).reshape(
            *other.shape[:first], *(1 for _ in range(count)), *other.shape[first + width :]
        )
    else:
        first, count = int(a["dim"]) % max(rank, 1), 1
        if other.ndim != rank:
            return None
        other = _all(other, [first])
    zero = _all(zero, range(first, first + count))
    shape = broadcast(zero.shape, other.shape)
    return Known(torch.zeros(shape, dtype=torch.float64), zero.expand(shape) & other.expand(shape))


def _all(mask: Tensor, axes: Iterable[int]) -> Tensor:
    for axis in axes:
        mask = mask.all(axis, keepdim=True)
    return mask


def experts(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """Runs of rows times a matrix of their own each: zero where all matrices' columns are, or all inputs."""
    a = bound(node)
    weight = get(a["mat2"], found)
    if weight is None or weight.value.ndim != 3 or a.get("bias") is not None:
        return None
    x = or_unknown(a["self"], found)
    zero_in = x.zero.broadcast_to(x.value.shape).reshape(-1, x.value.shape[-1]).all(0).expand(shape_of(a["mat2"])[1])
    dead = weight.zero.broadcast_to(weight.value.shape).all(0) if weight.value.shape[0] > 1 else weight.zero[0]
    dead = dead.expand(*shape_of(a["mat2"])[1:])
    zero = (dead | zero_in[:, None]).all(0)[None]
    return Known(torch.zeros(zero.shape, dtype=torch.float64), zero)


def bilinear(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """Outputs without weights are their bias."""
    a = bound(node)
    weight, bias = get(a["weight"], found), get(a["bias"], found)
    if weight is None or not weight.static or (isinstance(a["bias"], fx.Node) and (bias is None or not bias.static)):
        return None
    dead = (weight.stored == 0).all(2).all(1)
    value = torch.zeros(dead.shape, dtype=torch.float64) if bias is None else bias.value
    shape = (*(1 for _ in shape_of(node)[:-1]), -1)
    return Known(value.reshape(shape), dead.reshape(shape))


def bags(node: fx.Node, found: Mapping[fx.Node, Known]) -> Any:
    """Columns of an embedding that are zero in all rows."""
    weight = get(bound(node)["weight"], found)
    if weight is None:
        return None
    zero = weight.zero.broadcast_to(weight.value.shape).all(0)[None]
    result = Known(torch.zeros(zero.shape, dtype=torch.float64), zero)
    return result if node.meta.get("shape") is not None else [result, None, None, None]


def packed(node: fx.Node, found: Mapping[fx.Node, Known]) -> list[Known | None] | None:
    """(batch, steps, features...) -> (entries, features...)."""
    source = get(bound(node)["input"], found)
    if source is None or source.value.shape[:2] != (1, 1):
        return None
    return [Known(source.value[0], source.known.broadcast_to(source.value.shape)[0]), None]


def unpacked(node: fx.Node, found: Mapping[fx.Node, Known]) -> list[Known | None] | None:
    """(entries, features...) -> (batch, steps, features...), with a filler behind the end."""
    a = bound(node)
    source = get(a["data"], found)
    if source is None or source.value.shape[0] != 1:
        return None
    same = source.known & (source.value == float(a["padding_value"]))
    return [Known(source.value[None], same[None]), None]


def regions(node: fx.Node, found: Mapping[fx.Node, Known]) -> Any:
    """Pooled regions of zeros; a region may reach beyond the image, where zeros are read."""
    source = get(node.args[0], found)
    if source is None or any(n != 1 for n in source.value.shape[2:]) or source.value.shape[0] != 1:
        return None
    result = Known(source.value, source.zero)
    return result if node.meta.get("shape") is not None else [result, None]


RULES: dict[str, Callable[[fx.Node, Mapping[fx.Node, Known]], Any]] = {
    **dict.fromkeys(("index", "_unsafe_index"), indexed),
    **dict.fromkeys(("index_select", "gather", "topk", "kthvalue", "sort"), selected),
    **dict.fromkeys(
        ("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_put", "_unsafe_index_put"),
        placed,
    ),
    **dict.fromkeys(("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"), bags),
    **dict.fromkeys(("roi_align", "roi_pool"), regions),
    "_grouped_mm": experts,
    "_pack_padded_sequence": packed,
    "_pad_packed_sequence": unpacked,
    "bilinear": bilinear,
}
"""Operator name -> its rule."""
