"""Groups of similar rows: a row order in which each group loses as little as possible to its shared support."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float64, Int64, Shaped
from torch import Tensor

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity.counts import check_count
from fxsparse.sparsity.layout import LINEAR, Layout

_EXACT = 52  # bits of a float64 sum that no order of summation rounds
_ROUNDS = 50


def group_rows(
    scores: Shaped[Tensor, "rows positions"],
    group: int,
    k: int,
    row_order: Int64[Tensor, " rows"] | None = None,
) -> Int64[Tensor, " rows"]:
    """A row order whose groups of consecutive rows keep much of the squared scores on their k best shared positions.

    Balanced clustering: the supports of the groups (their k best positions) and the rows of the groups (swapped between
    two groups while both together gain) are improved in turn, from the given order and from groups grown around rows
    that no support covers yet; the better result wins. Each step adds to the kept sum, so it is never less than the
    given order's. Sums are exact, so neither threads, device nor the order of rows decide; ties go to the lower index.
    A round costs one product of [rows, positions] with [positions, groups].

    Args:
        scores: How much each row wants each position, at least 0 or any sign: squares count.
        group: Rows of a group G; the last group of R rows has R - (ceil(R / G) - 1) G.
        k: Positions that a group shares.
        row_order: The present order; natural by default.

    Returns:
        The rows, group after group; the given order itself where nothing is gained. Else rows ascend in their group,
        and groups follow their first row, a smaller one last.

    Raises:
        ConfigError: `group` or `k` is out of range.
        DataError: a score is NaN or infinite.
    """
    rows, width = scores.shape
    if not 1 <= group or not 1 <= k <= width:
        raise ConfigError(f"`group` (={group}) must be at least 1, `k` (={k}) from 1 to the {width} positions")
    start = torch.arange(rows, device=scores.device) if row_order is None else row_order.to(scores.device)
    wanted = _exact_squares(scores)
    sizes = _sizes(rows, group, scores.device)
    if len(sizes) == 1 or k == width or not bool(wanted.any()):
        return start
    given = torch.empty_like(start).scatter_(
        0, start, torch.arange(len(sizes), device=start.device).repeat_interleave(sizes)
    )
    best = max(
        (_improved(wanted, given, k), _improved(wanted, _seeded(wanted, sizes, k), k)), key=lambda found: found[1]
    )
    if best[1] <= _kept(wanted, given, len(sizes), k):
        return start
    return _order(best[0], len(sizes))


def kept_mass(scores: Shaped[Tensor, "rows positions"], group: int, k: int, row_order: Tensor | None = None) -> float:
    """Part of the squared scores in [0, 1] that stays alive when every group keeps its k best positions."""
    rows = scores.shape[0]
    order = torch.arange(rows, device=scores.device) if row_order is None else row_order.to(scores.device)
    sizes = _sizes(rows, group, scores.device)
    wanted = _exact_squares(scores)
    of = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(sizes), device=order.device).repeat_interleave(sizes)
    )
    total = float(wanted.sum())
    return _kept(wanted, of, len(sizes), k) / total if total else 1.0


def support_order(mask: Bool[Tensor, "*shape"], group: int, layout: Layout = LINEAR) -> Int64[Tensor, " rows"] | None:
    """The row order in which a mask holds `SharedSupport(group)`: rows of equal support brought together.

    Rows keep to their part of the weight (an expert; q, k or v). Ascending in a group, groups by their first row, a
    smaller one last, as `group_rows` orders them; the natural order where that holds the pattern.

    Args:
        mask: True = alive.
        group: Rows of a group.
        layout: The weight's output and input axes.

    Returns:
        The rows, group after group, or None where no order holds the pattern.

    Raises:
        ConfigError: `group` is less than 1.
    """
    check_count(group, "group", 1)
    parts = layout.parts(mask.shape)
    rows = layout.to_rows(mask).flatten(1)
    count = len(rows) // parts
    found = [_support_groups(part, min(group, count)) for part in rows.reshape(parts, count, -1)]
    orders = [order for order in found if order is not None]
    if len(orders) < parts:
        return None
    return torch.cat([order + i * count for i, order in enumerate(orders)])


def _support_groups(rows: Bool[Tensor, "rows positions"], group: int) -> Int64[Tensor, " rows"] | None:
    """As `support_order`, of one part."""
    count = len(rows)
    natural = torch.arange(count, device=rows.device)
    first_of_group = natural // group * group
    if torch.equal(rows, rows[first_of_group]):
        return natural
    support = torch.unique(rows, dim=0, return_inverse=True)[1]
    sizes = support.bincount()
    left = count % group
    if int((sizes % group != 0).sum()) != (left > 0):  # at most one support holds the smaller group
        return None
    by_support = support.sort(stable=True).indices
    rank = torch.empty_like(natural)
    rank[by_support] = natural - (sizes.cumsum(0) - sizes)[support[by_support]]  # the how-manieth row of its support
    slot = support * math.ceil(count / group) + rank // group
    _, of, members = torch.unique(slot, return_inverse=True, return_counts=True)
    return _order(of, len(members))


def _exact_squares(scores: Tensor) -> Float64[Tensor, "rows positions"]:
    """Squares as whole numbers in float64, so small that all of their sums are exact."""
    wide = scores.detach().double()
    if not bool(wide.isfinite().all()):
        raise DataError(
            f"{int((~wide.isfinite()).sum())} of {wide.numel()} scores are NaN or Inf; rows cannot be grouped"
        )
    squares = (wide / wide.abs().max().clamp(min=torch.finfo(torch.float64).tiny)).square()
    return (squares * 2.0 ** (_EXACT - math.ceil(math.log2(max(2, wide.numel()))))).round()


def _sizes(rows: int, group: int, device: torch.device) -> Int64[Tensor, " groups"]:
    count = math.ceil(rows / group)
    sizes = torch.full((count,), group, device=device)
    sizes[-1] = rows - (count - 1) * group
    return sizes


def _supports(wanted: Tensor, of: Tensor, groups: int, k: int) -> Float64[Tensor, "groups positions"]:
    """1 where a group shares a position, else 0."""
    sums = torch.zeros(groups, wanted.shape[1], dtype=torch.float64, device=wanted.device).index_add_(0, of, wanted)
    best = sums.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(sums).scatter_(1, best, 1.0)


def _kept(wanted: Tensor, of: Tensor, groups: int, k: int) -> float:
    return float((_supports(wanted, of, groups, k)[of] * wanted).sum())


def _improved(wanted: Tensor, of: Tensor, k: int) -> tuple[Int64[Tensor, " rows"], float]:
    """Supports and swaps in turn until nothing is gained: the group of every row, and the sum kept."""
    groups = int(of.max()) + 1
    kept = _kept(wanted, of, groups, k)
    for _ in range(_ROUNDS):
        swapped = _swapped(wanted @ _supports(wanted, of, groups, k).T, of)
        now = _kept(wanted, swapped, groups, k)
        if now <= kept:
            break
        of, kept = swapped, now
    return of, kept


def _swapped(gain: Float64[Tensor, "rows groups"], of: Tensor) -> Int64[Tensor, " rows"]:
    """Rows change places between two groups as long as a pair gains; `gain` is what a row keeps in a group."""
    rows, groups = gain.shape
    of, every = of.clone(), torch.arange(rows, device=of.device)
    for _ in range(_ROUNDS * groups):
        delta = gain - gain[every, of][:, None]  # what a row wins by going there
        out = torch.full((groups, groups), -math.inf, dtype=torch.float64, device=of.device)
        out.scatter_reduce_(0, of[:, None].expand_as(delta), delta, "amax")  # the best of each group for each other
        pairs = (out + out.T).fill_diagonal_(-math.inf)
        partner = pairs.argmax(1)
        mutual = (partner[partner] == every[:groups]) & (every[:groups] < partner) & (pairs.amax(1) > 0)
        if not bool(mutual.any()):
            return of
        for one in mutual.nonzero().flatten().tolist():
            other = int(partner[one])
            leaving = [_by_gain(delta, of, a, b) for a, b in ((one, other), (other, one))]
            size = min(len(each) for each in leaving)
            sums = delta[leaving[0][:size], other] + delta[leaving[1][:size], one]
            moved = int((sums > 0).sum())
            of[leaving[0][:moved]], of[leaving[1][:moved]] = other, one
    return of


def _by_gain(delta: Tensor, of: Tensor, here: int, there: int) -> Int64[Tensor, " members"]:
    members = (of == here).nonzero().flatten()
    return members[delta[members, there].sort(descending=True, stable=True).indices]


def _seeded(wanted: Tensor, sizes: Tensor, k: int) -> Int64[Tensor, " rows"]:
    """Groups grown around seeds: each seed is the row that loses most on the supports so far."""
    best = wanted.topk(k, dim=1).values.sum(1)  # what a row would keep alone
    covered, free = torch.zeros_like(best), torch.ones_like(best, dtype=torch.bool)
    of = torch.full_like(best, -1, dtype=torch.int64)
    for index, size in enumerate(sizes.tolist()):
        seed = int(torch.where(free, best - covered, -1.0).argmax())
        support = torch.zeros(wanted.shape[1], dtype=torch.float64, device=wanted.device)
        members = torch.tensor([seed], device=wanted.device)
        for _ in range(3):  # the support of the seed, of its neighbours, of theirs
            support.zero_()[wanted[members].sum(0).sort(descending=True, stable=True).indices[:k]] = 1.0
            kept = wanted @ support
            members = (
                torch.where(free, kept / best.clamp(min=1.0), -1.0).sort(descending=True, stable=True).indices[:size]
            )
        of[members], free[members] = index, False
        covered = torch.maximum(covered, kept)
    return of


def _order(of: Int64[Tensor, " rows"], groups: int) -> Int64[Tensor, " rows"]:
    """Rows, group after group; full groups by their first row, the smaller one last."""
    sizes = of.bincount(minlength=groups)
    first = torch.full((groups,), len(of), device=of.device)
    first.scatter_reduce_(0, of, torch.arange(len(of), device=of.device), "amin")
    place = torch.empty_like(first)
    place[(first + (sizes < sizes.max()) * len(of)).argsort(stable=True)] = torch.arange(groups, device=of.device)
    return place[of].sort(stable=True).indices
