"""Moments of many entries at once: small ones lie side by side, so that one operation serves them all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from fxsparse.curvature.collector_moments import Moments

K = TypeVar("K", bound=Hashable)

_ALONE = 1 << 14  # numbers from which an entry is work enough by itself
_BLOCK = 1 << 16  # most numbers of a block, which stay in a cache


@dataclass(frozen=True, eq=False)
class _Block(Generic[K]):
    """The moments of some entries, side by side."""

    keys: tuple[K, ...]
    sizes: tuple[int, ...]
    whole: Moments

    def parts(self) -> Iterator[tuple[K, Moments]]:
        if len(self.keys) == 1:
            yield self.keys[0], self.whole
            return

        def split(tensor: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * len(self.sizes) if tensor is None else torch.split(tensor, list(self.sizes))

        one = self.whole
        numbers = one.count, one.squares, one.mass, one.mass_spread
        for key, *tensors in zip(self.keys, split(one.total), split(one.spread), split(one.cross), strict=True):
            yield key, Moments(*numbers, *tensors)


class Pool(Mapping[K, Moments]):
    """Moments by entry, in blocks that are split when an entry is asked for."""

    def __init__(self, blocks: Iterable[_Block[K]], order: Sequence[K]) -> None:
        self._blocks, self._order = tuple(blocks), order
        self._found: dict[K, Moments] | None = None

    @classmethod
    def of(cls, moments: Mapping[K, Moments]) -> Pool[K]:
        """Entry by entry, but small ones of the same numbers side by side."""
        if isinstance(moments, Pool):
            return moments
        blocks = []
        for keys in _alike(moments, lambda key: _size(moments[key]), lambda key: _kind(moments[key])):
            sizes = tuple(_size(moments[key]) for key in keys)
            blocks.append(_Block(tuple(keys), sizes, _joined([moments[key] for key in keys])))
        return cls(blocks, tuple(moments))

    @override
    def __getitem__(self, key: K) -> Moments:
        return self._parts()[key]

    @override
    def __iter__(self) -> Iterator[K]:
        return iter(self._order)

    @override
    def __len__(self) -> int:
        return len(self._order)

    def _parts(self) -> dict[K, Moments]:
        if self._found is None:
            self._found = {key: each for block in self._blocks for key, each in block.parts()}
        return self._found

    def to(self, device: torch.device | str) -> Pool[K]:
        """The same on a device."""
        moved = [_Block(block.keys, block.sizes, block.whole.to(device)) for block in self._blocks]
        return Pool(moved, self._order)

    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        sums = [block.whole.total.sum() for block in self._blocks if block.whole.total is not None]
        return not sums or bool((sums[0] if len(sums) == 1 else torch.stack(sums)).isfinite().all())

    def merge(self, other: Pool[K]) -> Pool[K] | None:
        """The moments of both; None where their blocks hold other entries."""
        pairs = list(zip(self._blocks, other._blocks, strict=False))
        alike = all(one.keys == two.keys and one.sizes == two.sizes for one, two in pairs)
        if not alike or len(self._blocks) != len(other._blocks):
            return None
        return Pool([_Block(one.keys, one.sizes, one.whole.merge(two.whole)) for one, two in pairs], self._order)


def moments_of(values: Mapping[K, Tensor], masses: Tensor | None) -> Pool[K]:
    """`Moments.of` of each entry [n, size]."""
    found: dict[K, Moments] = {}
    for keys in _alike(values, lambda key: values[key].numel(), lambda key: (values[key].dtype, values[key].device)):
        given = [values[key] for key in keys]
        whole = Moments.of(given[0] if len(given) == 1 else torch.cat(given, 1), masses)
        found.update(_Block(tuple(keys), tuple(each.shape[1] for each in given), whole).parts())
    return Pool.of({key: found[key] for key in values})


def merged(mine: Mapping[K, Moments], theirs: Mapping[K, Moments]) -> Pool[K]:
    """Each entry's moments of both; an entry that one of them lacks is the other's."""
    if not mine:
        return Pool.of(theirs)
    if isinstance(mine, Pool) and isinstance(theirs, Pool):
        both = mine.merge(theirs)
        if both is not None:
            return both
    each = {key: mine[key].merge(theirs[key]) if key in theirs else mine[key] for key in mine}
    return Pool.of({**each, **{key: theirs[key] for key in theirs if key not in mine}})


def _alike(keys: Iterable[K], size: Callable[[K], int], kind: Callable[[K], Hashable]) -> Iterator[list[K]]:
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


def _joined(parts: Sequence[Moments]) -> Moments:
    def side_by_side(tensors: list[Tensor | None]) -> Tensor | None:
        given = [each for each in tensors if each is not None]
        return torch.cat(given) if given else None

    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Moments(
        *(first.count, first.squares, first.mass, first.mass_spread),
        side_by_side([each.total for each in parts]),
        side_by_side([each.spread for each in parts]),
        side_by_side([each.cross for each in parts]),
    )
