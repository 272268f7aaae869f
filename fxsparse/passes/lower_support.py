"""Which rows of a weight read the same positions, and the small dense blocks that they make together.

Everything here is about plain tensors: a weight as rows and positions, whatever the layer or file it stands in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

GATHER = 48.0
"""Cost of gathering one element, in multiply-accumulates."""
GROUP = 4000.0
"""Cost of one more group in a batch, in multiply-accumulates."""
BATCH = 60000.0
"""Cost of one more batch (its own gather, product and part of a concatenation), in multiply-accumulates."""

_SMALL = 4  # rows that share a support and are too few for a group of their own
_CONTIGUOUS = (256, 128, 64, 32, 16, 8)
_BUCKETS = 3
_LOOSE = 1.25  # by how much the union of supports may exceed them


@dataclass(frozen=True, eq=False)
class Batch:
    """Groups of equally many rows and positions: one gather and one batched product.

    Attributes:
        rows: [groups, group] the row of the weight; -1 where a row is only padding.
        positions: [groups, k] the positions that a group reads; a padded one repeats the group's first.
        used: [groups, k] False where a position is only padding.
    """

    rows: Int64[Tensor, "groups group"]
    positions: Int64[Tensor, "groups k"]
    used: Bool[Tensor, "groups k"]

    @property
    def groups(self) -> int:
        """How many groups."""
        return self.rows.shape[0]

    @property
    def group(self) -> int:
        """Rows of a group."""
        return self.rows.shape[1]

    @property
    def k(self) -> int:
        """Positions of a group."""
        return self.positions.shape[1]

    def blocks(self, weight: Shaped[Tensor, "rows positions *kernel"]) -> Shaped[Tensor, "groups group k *kernel"]:
        """The dense blocks of a weight; padding is exactly zero."""
        extra = (1,) * (weight.ndim - 2)
        found = weight[self.rows.clamp(min=0)[:, :, None], self.positions[:, None, :]]
        keep = ((self.rows >= 0)[:, :, None] & self.used[:, None, :]).to(weight.device)
        return torch.where(keep.reshape(*keep.shape, *extra), found, torch.zeros((), dtype=weight.dtype))

    def bias(self, bias: Shaped[Tensor, " rows"]) -> Shaped[Tensor, "groups group"]:
        """The bias of the computed rows; 0 at padding."""
        computed = (self.rows >= 0).to(bias.device)
        return torch.where(computed, bias[self.rows.clamp(min=0)], torch.zeros((), dtype=bias.dtype))


@dataclass(frozen=True, eq=False)
class Support:
    """All rows of a weight as batches of groups.

    Attributes:
        batches: They compute each row once; those of the largest groups first.
        rows: Rows of the weight.
        positions: Positions of the weight.
    """

    batches: tuple[Batch, ...]
    rows: int
    positions: int

    @property
    def computed(self) -> Int64[Tensor, " computed"]:
        """The rows in the order in which the batches compute them; -1 at padding."""
        return torch.cat([batch.rows.flatten() for batch in self.batches])

    @property
    def index(self) -> Int64[Tensor, " rows"] | None:
        """Where each row is among those computed; None where that is its own number and nothing else is computed."""
        order = self.computed
        if torch.equal(order, torch.arange(self.rows)):
            return None
        place = torch.empty(self.rows, dtype=torch.int64)
        place[order[order >= 0]] = (order >= 0).nonzero().flatten()
        return place

    @property
    def macs(self) -> int:
        """Multiply-accumulates per column and kernel offset, padding included."""
        return sum(batch.groups * batch.group * batch.k for batch in self.batches)

    @property
    def gathered(self) -> int:
        """Elements gathered per column, padding included."""
        return sum(batch.groups * batch.k for batch in self.batches)

    @property
    def cost(self) -> float:
        """Cost per column and kernel offset, in multiply-accumulates, without what a batch costs once."""
        return self.macs + GATHER * self.gathered

    def aligned(self, multiple: int) -> Support:
        """The same with k of every batch padded to a multiple."""
        return Support(tuple(_padded(batch, multiple) for batch in self.batches), self.rows, self.positions)

    def __str__(self) -> str:
        parts = [f"{batch.groups} groups of {batch.group} rows on {batch.k} positions" for batch in self.batches]
        return " and ".join(parts)


def find_support(
    alive: Bool[Tensor, "rows positions"],
    row_order: Int64[Tensor, " rows"] | None = None,
    work: int | None = None,
) -> Support | None:
    """Group the rows that read the same positions.

    Rows alike form groups wherever they stand. A row that reads only part of what a group reads joins the group whose
    support is smallest, so that single zeros among alive values do no harm. The rest, where it is not too much, forms
    groups of consecutive rows on the union of their supports. Groups are then cut to one size; those whose supports
    differ much in size become batches of their own.

    Args:
        alive: Where the weight may differ from zero.
        row_order: The order in which consecutive rows are likely to share a support; natural by default.

        work: Multiply-accumulates per column that the groups must undercut; those of the whole matrix by default.

    Returns:
        The groups; None where they compute no less than the product with the whole weight.
    """
    rows, positions = alive.shape
    if rows == 0 or positions == 0 or bool(alive.all()):
        return None
    alive = alive.cpu()
    order = torch.arange(rows) if row_order is None else row_order.cpu()
    grouped = [_classes(alive)]
    grouped += [_consecutive(alive, order, size) for size in _CONTIGUOUS if size < 2 * rows]
    plans = [_cut(classes) for classes in grouped if classes is not None]
    _, batches = min(plans, key=lambda plan: plan[0], default=(math.inf, ()))
    found = Support(batches, rows, positions)
    return found if batches and found.macs < (rows * positions if work is None else work) else None


_Class = tuple[Tensor, Tensor]  # rows; support as bool [positions]


def _classes(alive: Tensor) -> list[_Class] | None:
    """Rows that are alike, the few others joined to them."""
    inverse = _alike(alive)
    counts = torch.bincount(inverse)
    if int((counts > _SMALL).sum()) == 0:
        return None
    by_class = torch.split(inverse.argsort(stable=True), counts.tolist())
    large = [members for members in by_class if len(members) > _SMALL]
    small = [members for members in by_class if len(members) <= _SMALL]
    if not small:
        return [(members, alive[members[0]]) for members in large]
    supports = torch.stack([alive[members[0]] for members in large])
    return _joined(alive, large, supports, torch.cat(small))


def _joined(alive: Tensor, large: Sequence[Tensor], supports: Tensor, rest: Tensor) -> list[_Class]:
    """Rows of `rest` join the smallest class that holds their support; what cannot is one class of its own."""
    outside = alive[rest].float() @ (~supports).float().T
    size = torch.where(outside == 0, supports.sum(1).double(), math.inf)
    best = size.min(1)
    fits = best.values.isfinite()
    home = torch.where(fits, best.indices, -1)
    classes = [(torch.cat([m, rest[home == i]]).sort().values, supports[i]) for i, m in enumerate(large)]
    left = rest[home == -1].sort().values
    if len(left):
        classes.append((left, alive[left].any(0)))
    return classes


def _alike(alive: Tensor) -> Tensor:
    """The class of every row; two rows have one class exactly when they are equal."""
    generator = torch.Generator().manual_seed(0)
    bits = 52 - math.ceil(math.log2(alive.shape[1] + 1))  # sums below 2^53 are exact, so that equal rows have one key
    keys = alive.double() @ torch.randint(1 << bits, (alive.shape[1],), generator=generator).double()
    inverse: Tensor = torch.unique(keys, return_inverse=True)[1]
    first = torch.full((int(inverse.max()) + 1,), alive.shape[0])
    first.scatter_reduce_(0, inverse, torch.arange(alive.shape[0]), "amin")
    if torch.equal(alive, alive[first[inverse]]):
        return inverse
    exact: Tensor = torch.unique(alive, dim=0, return_inverse=True)[1]
    return exact


def _consecutive(alive: Tensor, order: Tensor, size: int) -> list[_Class] | None:
    """Groups of consecutive rows in an order, on the union of their supports."""
    chunks = torch.split(order, size)
    classes = [(chunk, alive[chunk].any(0)) for chunk in chunks]
    union = sum(len(chunk) * int(support.sum()) for chunk, support in classes)
    return classes if union < _LOOSE * int(alive.sum()) else None


def _cut(classes: list[_Class]) -> tuple[float, tuple[Batch, ...]]:
    """Groups of one size, the size that costs least."""
    sizes = {len(rows) for rows, _ in classes}
    sizes = {s for s in sizes if s > _SMALL} | {s for s in _CONTIGUOUS if s < max(sizes)} | {max(sizes)}
    ks = [int(support.sum()) for _, support in classes]
    counts = [len(rows) for rows, _ in classes]

    def cost(size: int) -> float:
        chunks = [math.ceil(count / size) for count in counts]
        return sum(n * (max(1, k) * (size + GATHER) + GROUP / 64) for n, k in zip(chunks, ks, strict=True))

    size = min(sorted(sizes), key=cost)
    groups = [(chunk, support) for rows, support in classes for chunk in torch.split(rows, size)]
    groups.sort(key=lambda group: int(group[0][0]))
    buckets = _buckets([int(support.sum()) for _, support in groups], size)
    batches = tuple(_batch([groups[i] for i in bucket], size) for bucket in buckets)
    total = sum(b.groups * b.k * (b.group + GATHER) for b in batches)
    return total, batches


def _buckets(ks: list[int], size: int) -> list[list[int]]:
    """Indices of groups, cut into few batches so that little is padded; each in the order given."""
    order = sorted(range(len(ks)), key=lambda i: ks[i])
    levels = sorted(set(ks))
    best = [list(range(len(ks)))]
    lowest = _padded_cost(ks, best, size)
    starts = [level for level in levels[1:]]
    if len(starts) > 24:
        starts = [starts[i * len(starts) // 24] for i in range(24)]
    for count in range(1, _BUCKETS):
        for cuts in itertools.combinations(starts, count):
            bounds = [0, *cuts, max(ks) + 1]
            parts = [[i for i in order if low <= ks[i] < high] for low, high in itertools.pairwise(bounds)]
            found = _padded_cost(ks, parts, size) + count * BATCH / 64
            if found < lowest:
                best, lowest = [sorted(part) for part in parts], found
    return best


def _padded_cost(ks: list[int], parts: list[list[int]], size: int) -> float:
    return sum(len(part) * max(ks[i] for i in part) * (size + GATHER) for part in parts)


def _batch(groups: list[_Class], size: int) -> Batch:
    k = max(1, max(int(support.sum()) for _, support in groups))
    rows = torch.full((len(groups), size), -1)
    positions = torch.zeros((len(groups), k), dtype=torch.int64)
    used = torch.zeros((len(groups), k), dtype=torch.bool)
    for i, (members, support) in enumerate(groups):
        rows[i, : len(members)] = members
        where = support.nonzero().flatten()
        if len(where):
            positions[i] = where[0]
        positions[i, : len(where)] = where
        used[i, : len(where)] = True
    return Batch(rows, positions, used)


def _padded(batch: Batch, multiple: int) -> Batch:
    missing = -batch.k % multiple
    if not missing:
        return batch
    first = batch.positions[:, :1].expand(-1, missing)
    unused = torch.zeros((batch.groups, missing), dtype=torch.bool)
    return Batch(batch.rows, torch.cat([batch.positions, first], 1), torch.cat([batch.used, unused], 1))
