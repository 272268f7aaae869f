"""Moments of many entries at once: small ones lie side by side, so that one operation serves them all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fxsparse.curvature.collector_moments import Moments

K = TypeVar("K", bound=Hashable)

_ALONE = 1 << 12  # numbers from which an entry is work enough by itself
_BLOCK = 1 << 16  # most numbers of a block, which stay in a cache


def moments_of(values: Mapping[K, Tensor], masses: Tensor | None) -> dict[K, Moments]:
    """`Moments.of` of each entry [n, size]."""
    found: dict[K, Moments] = {}
    for block in _blocks(values, lambda key: values[key].numel(), lambda key: (values[key].dtype, values[key].device)):
        if len(block) == 1:
            found[block[0]] = Moments.of(values[block[0]], masses)
            continue
        side_by_side = Moments.of(torch.cat([values[key] for key in block], 1), masses)
        found |= zip(block, _apart(side_by_side, [values[key].shape[1] for key in block]), strict=True)
    return {key: found[key] for key in values}


def merged(mine: Mapping[K, Moments], theirs: Mapping[K, Moments]) -> dict[K, Moments]:
    """Each entry's moments of both; an entry that one of them lacks is the other's."""
    both = [key for key, each in theirs.items() if key in mine and each.total is not None]
    found = {**mine, **{key: each for key, each in theirs.items() if key not in mine}}
    for block in _blocks(both, lambda key: _size(theirs[key]), lambda key: (_kind(mine[key]), _kind(theirs[key]))):
        if len(block) == 1:
            found[block[0]] = mine[block[0]].merge(theirs[block[0]])
            continue
        one = _joined([mine[key] for key in block]).merge(_joined([theirs[key] for key in block]))
        found |= zip(block, _apart(one, [_size(theirs[key]) for key in block]), strict=True)
    return found


def _blocks(keys: Iterable[K], size: Callable[[K], int], kind: Callable[[K], Hashable]) -> Iterator[list[K]]:
    """The keys of one kind together, as many as a block holds."""
    open_: dict[Hashable, tuple[list[K], int]] = {}
    for key in keys:
        own, number = kind(key), size(key)
        if number >= _ALONE:
            yield [key]
            continue
        block, total = open_.get(own, ([], 0))
        if total + number > _BLOCK:
            yield block
            block, total = [], 0
        open_[own] = [*block, key], total + number
    yield from (block for block, _ in open_.values() if block)


def _kind(moments: Moments) -> Hashable:
    total = moments.total
    place = None if total is None else (total.dtype, total.device)
    return tuple(moments.numbers().values()), tuple(moments.tensors()), place


def _size(moments: Moments) -> int:
    return 0 if moments.total is None else moments.total.numel()


def _joined(parts: list[Moments]) -> Moments:
    def side_by_side(tensors: list[Tensor | None]) -> Tensor | None:
        given = [each for each in tensors if each is not None]
        return torch.cat(given) if given else None

    first = parts[0]
    return Moments(
        *(first.count, first.squares, first.mass, first.mass_spread),
        side_by_side([each.total for each in parts]),
        side_by_side([each.spread for each in parts]),
        side_by_side([each.cross for each in parts]),
    )


def _apart(moments: Moments, sizes: list[int]) -> list[Moments]:
    def split(tensor: Tensor | None) -> list[Tensor] | list[None]:
        return [None] * len(sizes) if tensor is None else list(torch.split(tensor, sizes))

    parts = zip(split(moments.total), split(moments.spread), split(moments.cross), strict=True)
    return [
        Moments(moments.count, moments.squares, moments.mass, moments.mass_spread, total, spread, cross)
        for total, spread, cross in parts
    ]
