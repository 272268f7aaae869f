"""The rules of an exchange, for every pattern, against a slow oracle."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import (
    Block,
    Channel,
    ConstantFanIn,
    Layout,
    NByM,
    SharedSupport,
    Unstructured,
    fraction_count,
    keep_count,
    random_scores,
    segment_top_k,
)
from fxsparse.training import exchange

PATTERNS = {
    "unstructured": (Unstructured(), Layout()),
    "channel": (Channel(0), Layout()),
    "block": (Block(2, 3), Layout()),
    "2:4": (NByM(2, 4), Layout()),
    "1:2 of outputs": (NByM(1, 2, axis=0), Layout()),
    "fan-in": (ConstantFanIn(), Layout()),
    "fan-in transposed": (ConstantFanIn(), Layout.conv_transpose(1)),
    "shared support": (SharedSupport(2), Layout()),
    "shared support elements": (SharedSupport(3, positions=SharedSupport(1).positions.__class__.ELEMENT), Layout()),
}
SHAPES = [(4, 8), (6, 4, 3), (4, 8, 2, 1), (8, 4)]


def unit_of(pattern, layout, shape, index) -> tuple[object, object]:
    """(segment, unit) of an element, from its coordinates alone."""
    match pattern:
        case Unstructured():
            return 0, index
        case Channel():
            return 0, index[pattern.axis]
        case Block():
            return 0, (index[0] // pattern.height, index[1] // pattern.width)
        case NByM():
            others = tuple(x for axis, x in enumerate(index) if axis != pattern.axis)
            return (others, index[pattern.axis] // pattern.m), index
        case ConstantFanIn():
            return index[layout.out_axis], index
        case SharedSupport():
            position = index[1] if pattern.positions.value == "channel" else index[1:]
            return index[0] // pattern.group, (index[0] // pattern.group, position)
    raise AssertionError(pattern)


def oracle(pattern, layout, alive, drop, grow, fraction, regrow):
    """One exchange with Python lists; scores are constant within a unit."""
    cells: dict[object, dict[object, list[tuple[int, ...]]]] = {}
    for index in itertools.product(*(range(size) for size in alive.shape)):
        segment, unit = unit_of(pattern, layout, alive.shape, index)
        cells.setdefault(segment, {}).setdefault(unit, []).append(index)
    lives = {unit: bool(alive[members[0]]) for units in cells.values() for unit, members in units.items()}
    first = {unit: members[0] for units in cells.values() for unit, members in units.items()}

    def ranked(units, scores):
        return sorted(units, key=lambda unit: (-float(scores[first[unit]]), first[unit]))

    def kept_of(units, k):
        members = [unit for unit in units if lives[unit]]
        return set(ranked(members, drop)[: len(members) - k])

    def count(units):
        return sum(lives[unit] for unit in units)

    if isinstance(pattern, SharedSupport):
        keep = set()
        for units in cells.values():
            k = fraction_count(fraction, count(units))
            keep |= kept_of(units, k if regrow else min(k, len(units) - count(units)))
    else:
        every = [unit for units in cells.values() for unit in units]
        k = fraction_count(fraction, count(every))
        keep = kept_of(every, k if regrow else min(k, len(every) - count(every)))
        if not regrow:  # a segment drops no more than it can grow elsewhere
            for units in cells.values():
                room, own = len(units) - count(units), [unit for unit in units if lives[unit]]
                if len(own) - len(keep & set(own)) > room:
                    keep |= set(ranked(own, drop)[: len(own) - room])
    result = torch.zeros_like(alive)
    for units in cells.values():
        kept = [unit for unit in units if unit in keep]
        free = [unit for unit in units if unit not in keep and (regrow or not lives[unit])]
        for unit in kept + ranked(free, grow)[: count(units) - len(kept)]:
            for index in units[unit]:
                result[index] = True
    return result


@st.composite
def cases(draw):
    pattern, layout = PATTERNS[draw(st.sampled_from(sorted(PATTERNS)))]
    shape = draw(st.sampled_from(SHAPES))
    units = pattern.units(shape, layout)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    sparsity = 1 - pattern.n / pattern.m if isinstance(pattern, NByM) else draw(st.sampled_from([0.3, 0.5, 0.75]))
    chosen = segment_top_k(random_scores((units.segments, units.width), generator), units.counts(sparsity))
    levels = draw(st.sampled_from([1, 2, 5, 10**6]))  # few levels make heavy ties

    def scores():
        drawn = torch.randint(-levels, levels + 1, (units.segments, units.width), generator=generator).double()
        drawn[drawn == levels] = math.inf if draw(st.booleans()) else levels
        zero = torch.where(torch.rand(drawn.shape, generator=generator) < 0.5, -0.0, 0.0).double()
        return torch.where(drawn == 0, zero, drawn)

    return pattern, layout, units, chosen, scores(), scores(), draw(st.sampled_from([0.0, 0.1, 0.3, 1 / 3, 0.5, 1.0]))


def spread(units, scores: Tensor) -> Tensor:
    """Element scores that are constant within a unit."""
    result = torch.zeros(units.shape, dtype=torch.float64)
    for segment, unit in itertools.product(range(units.segments), range(units.width)):
        one = torch.zeros(units.segments, units.width, dtype=torch.bool)
        one[segment, unit] = True
        result[units.spread(one)] = scores[segment, unit]
    return result


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_rules_and_oracle(case, regrow):
    pattern, layout, units, alive, drop, grow, fraction = case
    before = units.spread(alive)
    chosen = exchange(units, alive, drop, grow, fraction, regrow_dropped=regrow)
    after = units.spread(chosen)
    assert int(after.sum()) == int(before.sum()) or isinstance(pattern, Block)  # border blocks are smaller
    assert torch.equal(chosen.sum(1), alive.sum(1))  # U1, in every segment
    pattern.check(after, layout)  # U4
    k = fraction_count(fraction, int(alive.sum()))
    assert int((alive & ~chosen).sum()) <= k  # U2, U3: no more than k leave, as many come
    if fraction == 0.0:
        assert torch.equal(chosen, alive)  # U5
    if not regrow and not isinstance(pattern, (SharedSupport, NByM, ConstantFanIn)):
        assert int((alive & ~chosen).sum()) == min(k, int((~alive).sum()))
    expected = oracle(pattern, layout, before, spread(units, drop), spread(units, grow), fraction, regrow)
    assert torch.equal(after, expected)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_target_is_met_exactly(case):
    pattern, layout, units, alive, drop, grow, fraction = case
    if isinstance(pattern, NByM):
        return
    for sparsity in (0.0, 0.25, 0.6):
        try:
            target = units.counts(sparsity)
        except ConfigError:
            continue
        chosen = exchange(units, alive, drop, grow, fraction, target=target)
        assert torch.equal(chosen.sum(1), target)


@settings(max_examples=20, deadline=None)
@given(cases())
def test_memory_layout_and_threads_do_not_matter(case):
    _, _, units, alive, drop, grow, fraction = case
    plain = exchange(units, alive, drop, grow, fraction)
    other = exchange(units, alive.t().contiguous().t(), drop.t().contiguous().t(), grow.t().contiguous().t(), fraction)
    assert torch.equal(plain, other)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(plain, exchange(units, alive, drop, grow, fraction))
    finally:
        torch.set_num_threads(threads)


def test_nan_raises_and_inputs_stay():
    units = Unstructured().units((8,))
    alive = torch.tensor([[True, False] * 4])
    scores = torch.arange(8.0)[None]
    bad = scores.clone()
    bad[0, 2] = math.nan
    for drop, grow in ((bad, scores), (scores, bad)):
        with pytest.raises(DataError, match="NaN"):
            exchange(units, alive, drop, grow, 0.5)
    assert torch.equal(alive, torch.tensor([[True, False] * 4]))


def test_ties_over_the_weight_follow_its_flat_index():
    # a transposed convolution: unit rows are columns of the weight, ties must still follow the weight's own order
    pattern, layout = ConstantFanIn(), Layout.conv_transpose(1)
    units = pattern.units((4, 2), layout)
    alive = units.collect(torch.tensor([[1, 1], [1, 1], [0, 0], [0, 0]]).bool())
    grow = units.pool(torch.tensor([[0.0, 0], [0, 0], [1, 1], [1, 1]]))
    chosen = units.spread(exchange(units, alive, torch.zeros(2, 4), grow, 0.25))
    # of four ties the highest flat index (1, 1) leaves; its column grows its first best, (2, 1)
    assert torch.equal(chosen, torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]]).bool())


def test_a_group_drops_no_more_than_it_can_replace():
    # 3:4 has one dead place in each group; without regrowth a group cannot exchange the two that the weight would drop
    units = NByM(3, 4).units((1, 8))
    alive = units.collect(torch.tensor([[1, 1, 1, 0, 1, 1, 1, 0]]).bool())
    drop = units.pool(torch.tensor([[1.0, 2, 9, 0, 8, 8, 8, 0]]))
    chosen = units.spread(exchange(units, alive, drop, torch.ones(2, 4), 0.4, regrow_dropped=False))
    assert torch.equal(chosen, torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0]]).bool())


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_keep_count_of_the_units(sparsity):
    units = Unstructured().units((10, 10))
    assert int(units.counts(sparsity)) == keep_count(100, sparsity)
