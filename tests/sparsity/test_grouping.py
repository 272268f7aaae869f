"""Groups of similar rows: planted groups come back, nothing is lost against the order there was."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import Layout, SharedSupport
from fxsparse.sparsity.grouping import group_rows, kept_mass, support_order


def planted(rows: int, group: int, width: int, k: int, seed: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Scores with a hidden grouping, and the group of every row."""
    generator = torch.Generator().manual_seed(seed)
    of = (torch.arange(rows) // group)[torch.randperm(rows, generator=generator)]
    supports = torch.stack([torch.randperm(width, generator=generator)[:k] for _ in range(math.ceil(rows / group))])
    scores = noise * torch.rand(rows, width, generator=generator, dtype=torch.float64)
    scores.scatter_add_(1, supports[of], torch.ones(rows, k, dtype=torch.float64))
    return scores, of


def oracle(scores: Tensor, order: Tensor, group: int, k: int) -> float:
    """The part of the squares that stays, with loops."""
    kept = 0.0
    for first in range(0, len(order), group):
        squares = [
            math.fsum(float(scores[r, j]) ** 2 for r in order[first : first + group]) for j in range(scores.shape[1])
        ]
        kept += math.fsum(sorted(squares)[-k:])
    return kept / math.fsum(float(x) ** 2 for x in scores.flatten())


def partition(order: Tensor, group: int) -> set[frozenset[int]]:
    return {frozenset(part.tolist()) for part in order.split(group)}


@pytest.mark.parametrize(("rows", "group"), [(24, 4), (64, 8), (128, 16), (96, 32), (60, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_recovered(rows, group, seed):
    scores, of = planted(rows, group, 50, 6, seed)
    order = group_rows(scores, group, 6)
    assert partition(order, group) == {frozenset((of == g).nonzero().flatten().tolist()) for g in range(rows // group)}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 12), st.integers(0, 10**6), st.data())
def test_never_worse_than_the_order_there_was(rows, group, width, seed, data):
    k = data.draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(seed)
    levels = data.draw(st.sampled_from([1, 3, 1000]))  # few levels make ties
    scores = torch.randint(-levels, levels + 1, (rows, width), generator=generator).double()
    given_order = torch.randperm(rows, generator=generator) if data.draw(st.booleans()) else None
    order = group_rows(scores, group, k, given_order)
    assert sorted(order.tolist()) == list(range(rows))
    before = torch.arange(rows) if given_order is None else given_order
    if not bool(scores.any()):
        assert torch.equal(order, before)
        return
    kept = kept_mass(scores, group, k, order)
    assert kept >= kept_mass(scores, group, k, given_order) - 1e-12
    assert kept == pytest.approx(oracle(scores, order, group, k), abs=1e-9)


def test_small_cases_reach_the_best_grouping():
    best_found = 0
    for seed in range(20):
        scores, _ = planted(6, 2, 8, 2, seed, noise=0.3)
        masses = {
            oracle(scores, torch.tensor(order), 2, 2)
            for order in itertools.permutations(range(6))
            if order[0] < order[1] and order[2] < order[3] and order[4] < order[5] and order[0] < order[2] < order[4]
        }
        best_found += kept_mass(scores, 2, 2, group_rows(scores, 2, 2)) >= max(masses) - 1e-9
    assert best_found >= 18  # a local search: nearly always


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_permutation_equivariance(seed, group):
    generator = torch.Generator().manual_seed(seed)
    rows = 4 * group
    scores = torch.rand(rows, 15, generator=generator, dtype=torch.float64)
    start, moved = torch.randperm(rows, generator=generator), torch.randperm(rows, generator=generator)
    place = moved.argsort()  # row r of the scores is row place[r] of the moved ones
    found = partition(group_rows(scores, group, 3, start), group)
    other = partition(group_rows(scores[moved], group, 3, place[start]), group)
    assert {frozenset(place[list(part)].tolist()) for part in found} == other


def test_threads_and_layout_do_not_matter():
    scores, _ = planted(64, 8, 40, 5, 0, noise=1.0)
    order = group_rows(scores, 8, 5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(order, group_rows(scores.t().contiguous().t(), 8, 5))
    finally:
        torch.set_num_threads(threads)


def test_what_cannot_gain_stays():
    natural = torch.arange(6)
    assert torch.equal(group_rows(torch.rand(6, 4), 6, 2), natural)  # one group
    assert torch.equal(group_rows(torch.rand(6, 4), 2, 4), natural)  # all positions
    assert torch.equal(group_rows(torch.zeros(6, 4), 2, 2), natural)
    assert torch.equal(group_rows(torch.ones(6, 4), 2, 2, natural.flip(0)), natural.flip(0))


def test_a_smaller_last_group_stays_last():
    scores, _ = planted(10, 4, 30, 4, 1)
    order = group_rows(scores, 4, 4)
    assert sorted(order.tolist()) == list(range(10))
    assert kept_mass(scores, 4, 4, order) >= kept_mass(scores, 4, 4)


def test_bad_input_is_refused():
    for bad in (math.nan, math.inf):
        scores = torch.ones(4, 4)
        scores[1, 2] = bad
        with pytest.raises(DataError, match="1 of 16 scores are NaN or Inf"):
            group_rows(scores, 2, 2)
    with pytest.raises(ConfigError, match="`k` \\(=5\\)"):
        group_rows(torch.ones(4, 4), 2, 5)
    with pytest.raises(ConfigError, match="`group` \\(=0\\)"):
        group_rows(torch.ones(4, 4), 0, 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 8), st.integers(0, 10_000))
def test_supports_tell_their_row_order(parts: int, rows: int, group: int, seed: int) -> None:
    draw, layout = torch.Generator().manual_seed(seed), Layout(blocks=parts)
    hidden = torch.cat([torch.randperm(rows, generator=draw) + i * rows for i in range(parts)])
    pattern = SharedSupport(group)
    mask = pattern.mask(torch.rand(parts * rows, 9, generator=draw), 0.6, layout, row_order=hidden)
    order = support_order(mask, group, layout)
    assert order is not None
    pattern.check(mask, layout, order)
    assert torch.equal(order, support_order(mask, group, layout)), "one answer"
    natural = pattern.mask(torch.rand(parts * rows, 9, generator=draw), 0.6, layout)
    assert torch.equal(support_order(natural, group, layout), torch.arange(parts * rows))


def test_masks_without_shared_supports_have_no_order() -> None:
    mask = torch.eye(6, dtype=torch.bool)
    assert support_order(mask, 2) is None and support_order(mask, 1) is not None
    of = torch.tensor([0, 1, 0, 1, 0, 2])  # three, two, one: no way to make pairs
    assert support_order(mask[of], 2) is None
    assert support_order(mask[torch.tensor([0, 1, 0, 1, 0])], 2).tolist() == [0, 2, 1, 3, 4]
    with pytest.raises(ConfigError, match="`group`"):
        support_order(mask, 0)
