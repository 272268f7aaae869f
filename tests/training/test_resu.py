"""RESU's arithmetic: phases, schedules, budgets, PRUNE, the tournament, against goldens and slow oracles."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import (
    Block,
    Channel,
    ConstantFanIn,
    CosineSparsity,
    CubicSparsity,
    Global,
    Gradient,
    LinearSparsity,
    Magnitude,
    NByM,
    QuadraticOutSparsity,
    SharedSupport,
    Uniform,
    Unstructured,
    keep_count,
)
from fxsparse.sparsity.saliency import Taylor, Wanda
from fxsparse.sparsity.units import ElementUnits
from fxsparse.training.densify import Densify
from fxsparse.training.dsnot import DSNoT
from fxsparse.training.resu import RESU
from fxsparse.training.resu_phases import Lengths, Phase
from fxsparse.training.resu_subset import CyclicDead, TopGradient
from fxsparse.training.resu_theta import Selective, ThetaAdamW, ThetaMomentum, ThetaOptimizer, ThetaSGD
from fxsparse.training.resu_tournament import candidates, reserved, tournament
from fxsparse.training.state import WeightState

DOUBLE = torch.float64


def indices(mask: torch.Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


def mask_of(n: int, alive: list[int] | range) -> torch.Tensor:
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[0, list(alive)] = True
    return mask


# Phases


def test_golden_cycle_of_1000_steps():
    timeline = RESU.source(0.7).timed(None).timeline
    assert len(timeline.cycles) == 5 and timeline.phases == 4
    first, second = timeline.cycles[:2]
    assert first.sparsity is None and first.phase is None and (first.start, first.end) == (0, 1000)
    assert (second.start, second.prune, second.enter, second.end, second.phase) == (1000, 1600, 1700, 2000, 0)
    phases = [timeline.phase(step)[0] for step in (1, 1000, 1001, 1600, 1601, 1700, 1701, 2000, 2001, 5000, 5001)]
    names = "train train train train stabilize stabilize resu resu train resu final".split()
    assert [phase.value for phase in phases] == names
    assert [(event.value, cycle.index) for event, cycle in timeline.events(1600)] == [("prune", 1)]
    assert [event.value for event, _ in timeline.events(1700)] == ["resu"] and not timeline.events(1601)
    assert [event.value for event, _ in timeline.events(2000)] == ["commit"]


def test_the_final_training_takes_its_share():
    timeline = RESU.frozen(sparsity=0.9).timed(2000).timeline
    assert timeline.cycles[-1].end == 1000 and [cycle.end for cycle in timeline.cycles] == [200, 400, 600, 800, 1000]
    assert timeline.phase(1001)[0] is Phase.FINAL


GOLDEN_SPARSITIES = {
    LinearSparsity: (0, 0.175, 0.35, 0.525, 0.7),
    QuadraticOutSparsity: (0, 0.30625, 0.525, 0.65625, 0.7),
    CosineSparsity: (0, 0.10251, 0.35, 0.59749, 0.7),
    CubicSparsity: (0, 0.40469, 0.6125, 0.68906, 0.7),
}


@pytest.mark.parametrize("schedule", GOLDEN_SPARSITIES)
def test_golden_sparsities(schedule):
    method = RESU.frozen(sparsity=0.7, schedule=schedule)
    assert method.sparsities == pytest.approx(GOLDEN_SPARSITIES[schedule], abs=5e-6) and method.sparsities[-1] == 0.7


def test_the_default_reaches_its_sparsity_in_the_third_cycle_and_exchanges_there():
    method = RESU(sparsity=0.8).timed(3200)
    rising = (0.8 * 19 / 27, 0.8 * 26 / 27, 0.8)  # cubic, u = 1/3, 2/3, 1
    assert method.sparsities == pytest.approx((*rising, 0.8, 0.8, 0.8, 0.8, 0.8), abs=1e-12)
    assert [cycle.end for cycle in method.timeline.cycles] == [300 * i for i in range(1, 9)]  # a quarter is left
    assert method.timeline.phases == 8
    third = method.timeline.cycles[3]
    assert (third.prune, third.enter, third.end) == (1140, 1140, 1200)  # no STABILIZE, a fifth for theta
    assert [round(method.budget_at(j), 12) for j in (0, 7)] == [0.2, 0.02]
    assert RESU(sparsity=0.8, cycles=2).sparsities == pytest.approx((0.7, 0.8), abs=1e-12)
    assert RESU(sparsity=0.8, cycles=1).sparsities == (0.8,) and RESU(sparsity=0.8, rise=None).sparsities[0] == 0.0
    assert RESU(sparsity=0.8, rise=99).sparsities == pytest.approx(RESU(sparsity=0.8, rise=8).sparsities, abs=0)
    assert RESU(sparsity=0.8, rise=1).sparsities == (0.8,) * 8


def test_one_cycle_reaches_the_sparsity_and_warms_up():
    """One cycle means u = 1, not a schedule that never leaves its start."""
    method = RESU.frozen(sparsity=0.8, cycles=1).timed(100)
    assert method.sparsities == (0.8,) and method.timeline.cycles[0].sparsity == 0.8
    assert method.sparsity_at(0) == 0.0 and method.sparsity_at(29) == 0.0 and method.sparsity_at(30) == 0.8


def test_a_list_drives_the_cycles_verbatim():
    method = RESU.frozen(sparsity=0.9, cycles=3, schedule=(0.0, 0.5, 0.9)).timed(60)
    assert [cycle.sparsity for cycle in method.timeline.cycles] == [None, 0.5, 0.9]
    with pytest.raises(ConfigError, match="must list"):
        RESU.frozen(sparsity=0.9, cycles=2, schedule=(0.0, 0.5, 0.9))
    with pytest.raises(ConfigError, match="must not fall"):
        RESU.frozen(sparsity=0.5, cycles=2, schedule=(0.6, 0.5))
    with pytest.raises(ConfigError, match="the schedule's last"):
        RESU.frozen(sparsity=0.8, cycles=2, schedule=(0.6, 0.9))


def test_golden_budget_over_phases_that_there_are():
    method = RESU.frozen(sparsity=0.9, cycles=6).timed(600)  # cycle 0 is dense: J = 5
    assert method.timeline.phases == 5
    assert [method.budget_at(j) for j in range(5)] == pytest.approx([0.10, 0.08, 0.06, 0.04, 0.02], abs=1e-12)
    assert RESU.frozen(sparsity=0.9, cycles=1).timed(100).budget_at(0) == 0.10


@settings(max_examples=40, deadline=None)
@given(
    cycles=st.integers(1, 7),
    total=st.integers(120, 3000),
    final=st.floats(0, 0.8),
    lengths=st.sampled_from([Lengths(), Lengths(0.5, 0.0, 0.5), Lengths(0.1, 0.2, 0.7), Lengths(0.7, 0.3, 0.0)]),
)
def test_phases_partition_the_steps(cycles, total, final, lengths):
    method = RESU.frozen(sparsity=0.9, cycles=cycles, final_fraction=final, lengths=lengths)
    try:
        timeline = method.timed(total).timeline
    except ConfigError as error:
        assert "too short" in str(error)
        return
    order = {Phase.TRAIN: 0, Phase.STABILIZE: 1, Phase.RESU: 2}
    previous = (0, 0)
    for step in range(1, total + 1):
        phase, cycle = timeline.phase(step)
        now = (cycles, 0) if cycle is None else (cycle.index, order[phase])
        assert now >= previous
        previous = now
    events = [event for step in range(total + 1) for event, _ in timeline.events(step)]
    assert events.count(Phase.COMMIT) == events.count(Phase.RESU) == timeline.phases
    assert events.count(Phase.PRUNE) == sum(value > 0 for value in method.sparsities)
    assert timeline.sparsity(total, 0.0) == 0.9
    values = [timeline.sparsity(step, 0.0) for step in range(total + 1)]
    assert values == sorted(values)


def test_densification_commits_at_the_next_sparsity():
    timeline = Densify().timed(80).timeline
    assert [cycle.committed for cycle in timeline.cycles] == [0.5, 0.3, 0.1, 0.0]
    assert all(cycle.sparsity is None for cycle in timeline.cycles)
    assert [timeline.sparsity(cycle.end, 0.7) for cycle in timeline.cycles] == [0.5, 0.3, 0.1, 0.0]
    assert Densify().timed(80).sparsity_at(0) == 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycles": 0}, "`cycles`"),
        ({"cycle_steps": 0}, "`cycle_steps`"),
        ({"final_fraction": 1.5}, "`final_fraction`"),
        ({"budget": (0.1, 1.2)}, "`budget`"),
        ({"epsilon": -1.0}, "`epsilon`"),
        ({"epsilon": math.nan}, "`epsilon`"),
        ({"theta": "adamw"}, "`theta`"),
        ({"subset": "all"}, "`subset`"),
        ({"prune": "magnitude"}, "`prune`"),
        ({"init": "normal"}, "`init`"),
        ({"refine": "dsnot"}, "`refine`"),
        ({"pauses": (8,)}, "`pauses`"),
        ({"rise": 0}, "`rise`"),
        ({"initial_sparsity": 0.95}, "must not fall"),
        ({"sparsity": 1.0}, "`sparsity`"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        RESU(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lengths(0.5, 0.5, 0.5), "must be 1"),
        (lambda: Lengths(0.0, 0.5, 0.5), "`train`"),
        (lambda: ThetaSGD(lr=-1.0), "`lr`"),
        (lambda: ThetaMomentum(beta=1.0), "`beta`"),
        (lambda: ThetaAdamW(betas=(0.9, 1.0)), "`betas`"),
        (lambda: Selective(subset=2.0), "`subset`"),
        (lambda: ThetaOptimizer(kind=torch.nn.Linear), "`kind`"),
        (lambda: ThetaOptimizer(kind=torch.optim.LBFGS), "closure"),
        (lambda: ThetaOptimizer(options=(("lr", 1.0),)), "leave out lr"),
        (lambda: TopGradient(1.5), "`fraction`"),
        (lambda: CyclicDead(0), "`period`"),
        (lambda: DSNoT(swaps=0), "`swaps`"),
        (lambda: Densify(path=(0.5, 0.7)), "falling"),
        (lambda: Densify(path=(0.7, 0.2)), "the path's last"),
        (lambda: RESU.frozen(sparsity=0.9).timed(None), "`total_steps`"),
        (lambda: RESU.frozen(sparsity=0.9).timed(9), "too short"),
        (lambda: RESU.source().timed(4999), "must be at least"),
    ],
)
def test_every_part_checks_its_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# The tournament

GOLDEN = [8, 7, 6, 5, 4, 3, 3, 3, 9, 2, 2, 1, 1, 1, 0, 0]


def held(scores: list[float], alive: range | list[int], k: int, budget: float) -> list[int]:
    n = len(scores)
    units, mask, counts = ElementUnits.of((n,)), mask_of(n, alive), torch.tensor([k])
    values = torch.tensor([scores], dtype=DOUBLE)
    quota = reserved(units, budget, counts, values, ~mask)
    return indices(tournament(units, values, mask, ~mask, counts, quota))


@pytest.mark.parametrize(
    ("k", "budget", "winners"),
    [
        (8, 0.25, [0, 1, 2, 3, 4, 5, 8, 9]),
        (8, 0.1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (4, 0.5, [0, 1, 8, 9]),
        (12, 0.25, list(range(12))),
    ],
)
def test_golden_amnesty(k, budget, winners):
    assert held(GOLDEN, range(8), k, budget) == winners


def test_golden_amnesty_with_few_dead():
    assert held([5, 4, 3, 2, 1, 6, 7, 0.5], range(7), 6, 0.5) == [0, 1, 2, 5, 6, 7]


def test_the_shortfall_does_not_depend_on_the_order_of_positions():
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).tolist()
    distinct = [value - 0.01 * i for i, value in enumerate(GOLDEN)]
    place = {original: new for new, original in enumerate(order)}
    permuted = held([distinct[i] for i in order], sorted(place[i] for i in range(8)), 12, 0.25)
    assert permuted == sorted(place[i] for i in held(distinct, range(8), 12, 0.25))


@st.composite
def contests(draw):
    n = draw(st.integers(1, 14))
    scores = draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, math.inf, 0.5]), min_size=n, max_size=n))
    kinds = draw(st.lists(st.sampled_from("ATD"), min_size=n, max_size=n))
    return scores, kinds, draw(st.integers(0, n)), draw(st.floats(0, 1))


@settings(max_examples=60, deadline=None)
@given(contests())
def test_the_tournament_against_a_slow_oracle(contest):
    scores, kinds, k, budget = contest
    n, units = len(scores), ElementUnits.of((len(scores),))
    sides = {kind: mask_of(n, [i for i in range(n) if kinds[i] == kind]) for kind in "ATD"}
    values, counts = torch.tensor([scores], dtype=DOUBLE), torch.tensor([k])
    quota = reserved(units, budget, counts, values, sides["T"])
    assert int(quota) == min(math.floor(budget * k + 1e-6), k)
    won = indices(tournament(units, values, sides["A"], sides["T"], counts, quota))
    order = {kind: sorted(indices(side), key=lambda i: (-(scores[i] + 0.0), i)) for kind, side in sides.items()}
    expected = order["A"][: k - int(quota)] + order["T"][: int(quota)]
    for rest in (order["T"][int(quota) :], order["A"][k - int(quota) :], sorted(order["D"])):
        expected += rest[: max(0, k - len(expected))]
    assert won == sorted(expected) and len(won) == k


def test_a_tournament_never_ranks_nan():
    values = torch.tensor([[1.0, math.nan, 3.0]])
    with pytest.raises(DataError, match="NaN"):
        alive = mask_of(3, [0])
        tournament(ElementUnits.of((3,)), values, alive, ~alive, torch.tensor([1]), torch.tensor([1]))


PATTERNS = (
    Unstructured(),
    SharedSupport(3),
    SharedSupport(64),
    Block(2, 2),
    Channel(0),
    Channel(1),
    ConstantFanIn(),
    NByM(2, 4),
    NByM(2, 4, exact=False),
)


def state_of(pattern, weight, mask, trained=None, step=0, gradient=None, memory=None) -> WeightState:
    extra = {} if trained is None else {"trained": trained}
    return WeightState("w", 0, step, 1, 0, weight, mask, pattern, gradient=gradient, memory={**extra, **(memory or {})})


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS),
    rows=st.integers(2, 9),
    columns=st.sampled_from([4, 8, 12]),
    kernel=st.sampled_from([(), (1,), (2, 3)]),
    budget=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, DOUBLE, torch.bfloat16]),
)
def test_a_commit_conserves_the_count_and_the_pattern(pattern, rows, columns, kernel, budget, seed, dtype):
    shape = (rows, columns, *kernel)
    weight = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    mask = pattern.mask(torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)), 0.5)
    exact = isinstance(pattern, NByM) and pattern.exact
    method = RESU.frozen(
        sparsity=0.5, cycles=1, pattern=pattern, budget=(budget, budget), distribution=Uniform()
    ).timed(40)
    commit = method.timeline.cycles[0].end
    free = candidates(pattern.units(shape), pattern.units(shape).collect(mask))
    trained = pattern.units(shape).spread(free) & ~mask
    assert not exact or not trained.any()  # a full N:M group has no free place
    if not bool(trained.any()):
        trained = torch.zeros_like(mask)
    masks = method.update([state_of(pattern, weight, mask, trained, commit)])
    won = masks["w"]
    view = pattern.units(shape)
    assert int(view.collect(won).sum()) == int(view.collect(mask).sum())  # blocks at the border are smaller
    pattern.check(won)
    assert not (won & ~mask & ~trained).any()
    if budget == 0.0:
        quiet = int((trained & won).sum())
        assert quiet == 0
    units = view
    if isinstance(pattern, SharedSupport):  # a position is resurrected for its whole group
        assert torch.equal(units.spread(units.collect(won)), won)
        k = units.collect(mask).sum(1)
        assert units.collect(won & trained).sum(1).tolist() == [
            min(math.floor(budget * int(each) + 1e-6), units.width - int(each)) for each in k
        ]


# PRUNE


def pruner(**options) -> tuple[RESU, int]:
    method = RESU.frozen(cycles=1, distribution=Uniform(), **options).timed(40)
    return method, method.timeline.cycles[0].prune


def test_prune_breaks_ties_exactly():
    """A threshold with `>` would prune all the ties: .75 instead of .5."""
    method, step = pruner(sparsity=0.5)
    weight = torch.tensor([[0.5, 0.5, 0.5, -0.5, 0.5, 0.5, 0.7, 0.8]])
    masks = method.update([state_of(Unstructured(), weight, torch.ones(1, 8, dtype=torch.bool), step=step)])
    assert indices(masks["w"]) == [0, 1, 6, 7]


@pytest.mark.parametrize(("n", "sparsity", "k"), [(10, 0.9, 1), (100, 0.29, 71), (7, 0.5, 4), (432, 0.9, 44)])
def test_prune_counts_by_the_one_rule(n, sparsity, k):
    method, step = pruner(sparsity=sparsity)
    masks = method.update([state_of(Unstructured(), torch.rand(1, n), torch.ones(1, n, dtype=torch.bool), step=step)])
    assert int(masks["w"].sum()) == k == keep_count(n, sparsity)


def test_prune_never_revives_and_reads_its_saliency():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0, 9.0]])
    gradient = torch.tensor([[0.1, 0.2, 0.3, 0.4, 9.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    kept = {}
    for saliency in (Magnitude(), Gradient(), Taylor(), Wanda()):
        method, step = pruner(sparsity=0.6, prune=saliency)
        state = state_of(Unstructured(), weight, mask, step=step, memory={"gradient": gradient})
        kept[type(saliency).__name__] = indices(method.update([_with_inputs(state, [5.0, 1.0, 9.0, 1.0, 9.0])])["w"])
    assert kept == {"Magnitude": [0, 1], "Gradient": [2, 3], "Taylor": [1, 2], "Wanda": [0, 2]}
    with pytest.raises(ConfigError, match="needs"):
        method, step = pruner(sparsity=0.6, prune=Gradient())
        method.update([state_of(Unstructured(), weight, mask, step=step)])


def _with_inputs(state: WeightState, norms: list[float]) -> WeightState:
    return replace(state, inputs=torch.tensor([norms], dtype=DOUBLE))


@pytest.mark.parametrize("score", [Magnitude(), Taylor(), Wanda()])
def test_the_tournament_reads_its_score(score):
    method = RESU.frozen(sparsity=0.5, cycles=1, score=score, budget=(0.5, 0.5), distribution=Uniform()).timed(40)
    weight, gradient = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[9.0, 1.0, 9.0, 1.0]])
    mask = torch.tensor([[True, True, False, False]])
    state = state_of(Unstructured(), weight, mask, ~mask, method.timeline.cycles[0].end, memory={"gradient": gradient})
    won = indices(method.update([_with_inputs(state, [1.0, 9.0, 9.0, 1.0])])["w"])
    assert won == {"Magnitude": [1, 3], "Taylor": [0, 2], "Wanda": [1, 2]}[type(score).__name__]


@pytest.mark.parametrize("distribution", [Uniform(), Global()])
def test_golden_densification(distribution):
    """N = 1000, path .7 .5 .3 .1 0: alive 300, 500, 700, 900, 1000; no alive weight is lost."""
    method = Densify(distribution=distribution).timed(80)
    weight = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    mask = Unstructured().mask(torch.rand(20, 50, generator=torch.Generator().manual_seed(1)), 0.7)
    counts = [int(mask.sum())]
    for cycle in method.timeline.cycles:
        won = method.update([state_of(Unstructured(), weight, mask, ~mask, cycle.end)])["w"]
        assert not (mask & ~won).any()
        best = weight.abs()[~mask].sort(descending=True).values[: int(won.sum()) - int(mask.sum())]
        assert torch.equal(weight.abs()[won & ~mask].sort(descending=True).values, best)
        mask = won
        counts.append(int(mask.sum()))
    assert counts == [300, 500, 700, 900, 1000]


def test_n_by_m_goes_straight_to_its_sparsity():
    method = RESU.frozen(sparsity=0.5, pattern=NByM(2, 4), cycles=4)
    assert method.sparsities == (0.0, 0.5, 0.5, 0.5)
    method.timed(100).check(NByM(2, 4))
    with pytest.raises(ConfigError, match="the method's own"):
        RESU.frozen(sparsity=0.5).timed(100).check(NByM(2, 4))
