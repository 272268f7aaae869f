"""Rules of theta, subsets and swaps, against goldens and slow oracles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import ConfigError
from fxsparse.sparsity import (
    Block,
    Channel,
    NByM,
    SharedSupport,
    Unstructured,
)
from fxsparse.sparsity.units import ElementUnits
from fxsparse.training.dsnot import DSNoT
from fxsparse.training.resu import RESU
from fxsparse.training.resu_subset import AboveQuantile, AllDead, CyclicDead, RandomDead, Subject, TopGradient
from fxsparse.training.resu_theta import Selective, ThetaAdamW, ThetaSGD
from fxsparse.training.state import WeightState

DOUBLE = torch.float64


def indices(mask: torch.Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


def mask_of(n: int, alive: list[int] | range) -> torch.Tensor:
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[0, list(alive)] = True
    return mask


# Rules


def test_golden_selective_step():
    rule = Selective(lr=0.1)
    state = {
        "steps": 10,
        "m": torch.tensor([0.8, -0.6, 0.1, 0.05, -0.4, 0.2, 0, 0.3, -0.3, 0.02], dtype=DOUBLE),
        "v": torch.tensor([0.9, 1, 0.1, 1, 0.5, 0.5, 0.4, 0.3, 0.9, 0.1], dtype=DOUBLE),
    }
    g = torch.tensor([1, -1, 0.5, 2, -0.5, 0.25, 0.1, 0.1, 1, 0.05], dtype=DOUBLE)
    theta = torch.linspace(1, 2, 10, dtype=DOUBLE)
    moved = rule.step(theta, g, torch.ones(10, dtype=torch.bool), state, 0.1) - theta
    consistency = state["m"].abs() / (state["v"] + 1e-8)
    golden = [0.901099, 0.64, 1, 0.222727, 0.82, 0.431579, 0.027027, 1, 0.186813, 0.242105]
    assert consistency.tolist() == pytest.approx(golden, abs=1e-6)
    assert moved.tolist() == pytest.approx([-0.0901099, 0.064] + [0.0] * 8, abs=1e-7)


def test_the_consistency_test_is_off_while_it_is_noise():
    """At tau = 1 the consistency of any gradient is 1: the test must not pass for that reason."""
    g = torch.tensor([1.0, -0.9, 0.8, -0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    rule, state = Selective(lr=1.0), {}
    everywhere, sign = torch.ones(10, dtype=torch.bool), 1.0
    for step in range(1, 41):
        theta = torch.zeros(10)
        moved = rule.step(theta, sign * g, everywhere, state, 1.0)
        if step <= 10:
            assert torch.equal(moved, torch.where(torch.arange(10) < 2, -sign * g, 0.0))  # C := 1, top 20% of |g|
        else:
            assert not moved.any()  # the sign alternates: nothing is consistent
        sign = -sign


def test_selection_stays_within_the_trainable_set_and_may_be_empty():
    rule, g = Selective(lr=1.0, warm_up=0), torch.arange(1.0, 11.0)
    trainable = torch.arange(10) < 4
    moved = rule.step(torch.zeros(10), torch.where(trainable, g, 0.0), trainable, {}, 1.0)
    assert indices(moved != 0) == [3]  # max(1, n(.2, 4)) of the top half {2, 3}
    nothing = torch.zeros(10, dtype=torch.bool)
    assert not rule.step(torch.zeros(10), torch.zeros(10), nothing, {}, 1.0).any()


def test_the_rate_follows_the_optimizer_unless_it_is_given():
    assert ThetaAdamW().rate({"lr": torch.tensor(0.5)}) == 0.5 and ThetaAdamW(scale=3.0).rate({"lr": 0.5}) == 1.5
    assert ThetaSGD(lr=0.2).rate({"lr": 0.5}) == 0.2 and Selective().rate({"lr": 0.5}) == 1e-4


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), decay=st.sampled_from([0.0, 0.3]), betas=st.sampled_from([(0.9, 0.999), (0.5, 0.7)]))
def test_adamw_is_torchs(seed, decay, betas):
    generator = torch.Generator().manual_seed(seed)
    ours = torch.randn(7, dtype=DOUBLE, generator=generator)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.05, betas=betas, weight_decay=decay)
    rule, state = ThetaAdamW(lr=0.05, betas=betas, weight_decay=decay), {}
    for _ in range(5):
        theirs.grad = torch.randn(7, dtype=DOUBLE, generator=generator)
        ours = rule.step(ours, theirs.grad, torch.ones(7, dtype=torch.bool), state, 0.05)
        optimizer.step()
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)


# Subsets


def subject(n: int, dead: list[int], scores: list[float] | None = None, phase: int = 0) -> Subject:
    draws = torch.rand(1, n, dtype=DOUBLE, generator=torch.Generator().manual_seed(n))
    values = torch.zeros(1, n, dtype=DOUBLE) if scores is None else torch.tensor([scores], dtype=DOUBLE)
    return Subject(ElementUnits.of((n,)), mask_of(n, dead), values, draws, phase)


def test_golden_subsets():
    dead = [0, 2, 3, 5, 6, 7, 8, 9, 11, 12]
    ties = [1.0 if i in (2, 5, 8) else 0.5 for i in range(13)]
    ties[1] = 9.0  # alive: no candidate
    assert indices(AllDead().chosen(subject(13, dead))) == dead
    assert indices(TopGradient(0.2).chosen(subject(13, dead, ties))) == [2, 5]
    assert indices(AboveQuantile(0.8).chosen(subject(13, dead, ties))) == [2, 5]  # exact, no surplus of ties
    assert indices(AboveQuantile(0.5).chosen(subject(13, dead, ties))) == [0, 2, 3, 5, 8]
    assert indices(TopGradient(0.0).chosen(subject(13, dead, ties))) == [2]
    assert indices(CyclicDead(5).chosen(subject(13, dead, phase=0))) == [0, 7]
    assert indices(CyclicDead(5).chosen(subject(13, dead, phase=6))) == [2, 8]


def test_cyclic_subsets_reach_every_dead_position_once_in_a_period():
    dead = [1, 3, 4, 6, 8, 9, 10]
    seen = [i for phase in range(3) for i in indices(CyclicDead(3).chosen(subject(12, dead, phase=phase)))]
    assert sorted(seen) == dead


def test_random_subsets_have_an_exact_size_and_follow_their_draws():
    dead = list(range(0, 20, 2))
    chosen = RandomDead(0.3).chosen(subject(20, dead))
    assert int(chosen.sum()) == 3 and set(indices(chosen)) <= set(dead)
    draws = subject(20, dead).draws[0].tolist()
    assert indices(chosen) == sorted(sorted(dead, key=lambda i: -draws[i])[:3])


# DSNoT


def state_of(pattern, weight, mask, trained=None, step=0, gradient=None, memory=None) -> WeightState:
    extra = {} if trained is None else {"trained": trained}
    return WeightState("w", 0, step, 1, 0, weight, mask, pattern, gradient=gradient, memory={**extra, **(memory or {})})


def dsnot_oracle(weight, mask, kept, norm, mean, variance, swaps, tolerance):
    """Row by row, element by element."""
    rows, width = len(weight), len(weight[0])
    alive = [list(row) for row in kept]
    for r in range(rows):
        taken = [mask[r][i] and not kept[r][i] for i in range(width)]
        error = -sum(weight[r][i] * mean[r][i] for i in range(width) if taken[i])
        for _ in range(swaps):
            sign = (error > 0) - (error < 0)
            effect = [weight[r][i] * mean[r][i] for i in range(width)]
            back = [(-sign * effect[i] / (variance[r][i] + 1e-12), -i) for i in range(width)]
            back = [pair for pair in back if taken[-pair[1]] and pair[0] > 0]
            out = [(abs(weight[r][i]) * norm[r][i], i) for i in range(width) if alive[r][i] and sign * effect[i] > 0]
            if abs(error) <= tolerance or not back or not out:
                break
            b, o = -max(back)[1], min(out)[1]
            after = error + effect[b] - effect[o]
            if abs(after) >= abs(error):
                break
            alive[r][b], alive[r][o], taken[b], taken[o], error = True, False, False, True, after
    return alive


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), swaps=st.integers(1, 6))
def test_swaps_against_a_slow_oracle(seed, swaps):
    generator = torch.Generator().manual_seed(seed)
    weight, mean = (torch.randn(3, 8, dtype=DOUBLE, generator=generator) for _ in range(2))
    norm, variance = (torch.rand(3, 8, dtype=DOUBLE, generator=generator) + 0.1 for _ in range(2))
    mask = torch.rand(3, 8, generator=generator) < 0.9
    kept = mask & (torch.rand(3, 8, generator=generator) < 0.6)
    rule = DSNoT(swaps=swaps, tolerance=0.01)
    state = state_of(Unstructured(), weight, mask, memory={"norm": norm, "mean": mean, "variance": variance})
    refined = rule.refined(state, kept)
    lists = [each.tolist() for each in (weight, mask, kept, norm, mean, variance)]
    assert refined.tolist() == dsnot_oracle(*lists, swaps, 0.01)
    assert torch.equal(refined.sum(1), kept.sum(1)) and not (refined & ~mask).any()
    before, after = (((weight * mean) * (mask & ~each)).sum(1).abs() for each in (kept, refined))
    assert (after <= before + 1e-12).all()


def test_swaps_stay_in_their_n_by_m_group_and_need_single_weights():
    generator = torch.Generator().manual_seed(0)
    weight, mean = (torch.randn(6, 16, dtype=DOUBLE, generator=generator) for _ in range(2))
    kept = NByM(2, 4).mask(weight.abs(), 0.5)
    memory = {"norm": torch.ones_like(weight), "mean": mean, "variance": torch.ones_like(weight)}
    state = state_of(NByM(2, 4), weight, torch.ones_like(kept), memory=memory)
    refined = DSNoT(tolerance=0.0).refined(state, kept)
    NByM(2, 4).check(refined)
    assert not torch.equal(refined, kept)
    for pattern in (SharedSupport(2), Block(2, 2), Channel(0), NByM(2, 4, exact=False)):
        with pytest.raises(ConfigError, match="DSNoT"):
            RESU.frozen(sparsity=0.5, refine=DSNoT(), cycles=1).timed(40).check(pattern)
    with pytest.raises(ConfigError, match="lacks norm, mean, variance"):
        DSNoT().refined(state_of(Unstructured(), weight, torch.ones_like(kept)), kept)
