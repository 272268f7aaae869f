"""Masks follow the saliencies that a method is given, for dropping and for growing, whatever the method."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature import CurvatureSource, FisherDiagonal, GivenScores, NewtonGain, with_saliencies
from fxsparse.errors import ConfigError
from fxsparse.sparsity.saliency import Gradient, Magnitude
from fxsparse.sparsity.schedule import CustomSparsity, DropKind, LinearSparsity
from fxsparse.training import ACDC, GMP, ITOP, MEST, RESU, SET, SNFS, Method, RigL, SRigL, WeightState
from fxsparse.training.resu_subset import AllDead, TopSaliency, trained_units

NAMES = ("0.weight", "2.weight")


def network(sparsity: float = 0.0, pattern: fxsparse.sparsity.Pattern | None = None) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)).double()
    x = torch.randn(8, 12, dtype=torch.float64)
    options = {} if pattern is None else {"pattern": pattern}
    return fxsparse.transform(model, (x,), sparsity=sparsity, **options), x


def generated(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Scores without ties that have nothing to do with the weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: model.get_parameter(name).shape for name in NAMES}
    return {n: torch.randperm(s.numel(), generator=generator).double().view(s) for n, s in shapes.items()}


def steps(model: nn.Module, x: Tensor, method: Method, count: int) -> Iterator[tuple[dict[str, Tensor], ...]]:
    """Masks before and after each step of a training that leaves the weights where they are."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    fxsparse.attach(model, optimizer, method, total_steps=count)
    for _ in range(count):
        before = {name: mask.clone() for name, mask in fxsparse.masks(model).items()}
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(8)).backward()
        optimizer.step()
        yield before, {name: mask.clone() for name, mask in fxsparse.masks(model).items()}


def best(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """The `count` best of some places, by sorting."""
    order = sorted((i for i in range(scores.numel()) if among.flatten()[i]), key=lambda i: -float(scores.flatten()[i]))
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.view(scores.shape)


EXCHANGES = {
    "set": SET(0.6, every=2, alpha=0.4, regrow_dropped=False),
    "rigl": RigL(0.6, every=2, alpha=0.4, regrow_dropped=False),
    "itop": ITOP(0.6, every=2, alpha=0.4, regrow_dropped=False),
    "snfs": SNFS(0.6, every=2, alpha=0.4, regrow_dropped=False),
    "mest": MEST(0.6, every=2, p=(0.2, 0.0), boundaries=(6,), regrow_dropped=False),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges_drop_the_lowest_and_grow_the_highest(name: str) -> None:
    model, x = network()
    source = CurvatureSource(model, "cross_entropy", [(x, torch.arange(8))])
    drop, grow = generated(model, 1), generated(model, 2)
    method = with_saliencies(EXCHANGES[name], GivenScores(source, drop), GivenScores(source, grow))
    changed = 0
    for before, after in steps(model, x, method, 8):
        for weight in NAMES if name != "snfs" else ():
            gone = int((before[weight] & ~after[weight]).sum())
            left = best(drop[weight], before[weight], int(before[weight].sum()) - gone)
            assert torch.equal(after[weight], left | best(grow[weight], ~before[weight], gone)), weight
            changed += gone
        if name == "snfs":  # the budget moves between the weights
            for weight in NAMES:
                gone, come = before[weight] & ~after[weight], after[weight] & ~before[weight]
                assert torch.equal(
                    after[weight] & before[weight],
                    best(drop[weight], before[weight], int((after[weight] & before[weight]).sum())),
                )
                assert torch.equal(come, best(grow[weight], ~before[weight], int(come.sum())))
                changed += int(gone.sum())
    assert changed > 20


def test_constant_fan_in_grows_the_highest_of_each_row() -> None:
    model, x = network()
    source = CurvatureSource(model, "cross_entropy", [(x, torch.arange(8))])
    drop, grow = generated(model, 3), generated(model, 4)
    plain = SRigL(0.75, every=2, alpha=0.3, ablation=False, regrow_dropped=False)
    method = with_saliencies(plain, GivenScores(source, drop), GivenScores(source, grow))
    changed = 0
    for before, after in steps(model, x, method, 8):
        for weight in NAMES:
            kept = before[weight] & after[weight]
            assert torch.equal(kept, best(drop[weight], before[weight], int(kept.sum())))
            assert after[weight].sum(1).unique().numel() == 1
            for row, was, now in zip(grow[weight], before[weight], after[weight], strict=True):
                assert torch.equal(now & ~was, best(row, ~was, int((now & ~was).sum())))
            changed += int((before[weight] & ~after[weight]).sum())
    assert changed > 10


def fraction_at(step: int, alpha: float, start: int, end: int, decay: DropKind) -> float:
    if step >= end:
        return 0.0
    u = max(0.0, (step - start) / (end - start))
    cosine = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * u, dtype=torch.float64))))
    return alpha * {DropKind.COSINE: cosine, DropKind.LINEAR: 1 - u, DropKind.CONSTANT: 1.0}[decay]


@settings(max_examples=20, deadline=None)
@given(
    st.floats(0.05, 1.0),
    st.floats(0.1, 0.9),
    st.integers(0, 3),
    st.sampled_from((DropKind.COSINE, DropKind.LINEAR, DropKind.CONSTANT)),
    st.integers(0, 2**16),
)
def test_gradual_pruning_with_regrowth(alpha: float, sparsity: float, start: int, decay: DropKind, seed: int) -> None:
    model, x = network()
    source = CurvatureSource(model, "cross_entropy", [(x, torch.arange(8))])
    drop, grow = generated(model, seed), generated(model, seed + 1)
    schedule = LinearSparsity(0.0, sparsity, start, 7)
    method = GMP(
        sparsity,
        every=1,
        start=start,
        schedule=schedule,
        alpha=alpha,
        decay=decay,
        drop=GivenScores(source, drop),
        grow=GivenScores(source, grow),
    )
    for step, (before, after) in enumerate(steps(model, x, method, 9), 1):
        for weight in NAMES:
            if not start <= step <= 7:
                assert torch.equal(before[weight], after[weight])
                continue
            size = before[weight].numel()
            wanted = size - int(schedule(step) * size + 1e-6)
            k = int(fraction_at(step, alpha, start, 7, decay) * wanted + 1e-6)
            kept = best(drop[weight], before[weight], wanted - k)
            grown = best(grow[weight], ~kept, wanted - int(kept.sum()))
            assert torch.equal(after[weight], kept | grown), (weight, step)
        grow.update(generated(model, seed + 1 + step))  # with scores that stand still, what died stays dead


@pytest.mark.parametrize("pattern", [fxsparse.SharedSupport(4), fxsparse.Channel(0), fxsparse.Block(2, 2)], ids=str)
def test_regrowth_keeps_the_pattern_and_the_schedule(pattern: fxsparse.sparsity.Pattern) -> None:
    model, x = network(pattern=pattern)
    source = CurvatureSource(model, "cross_entropy", [(x, torch.arange(8))])
    drop, grow = generated(model, 5), generated(model, 6)
    plain = GMP(0.5, pattern=pattern, every=1, end=6)
    method = with_saliencies(plain, GivenScores(source, drop), GivenScores(source, grow))
    assert isinstance(method, GMP) and method.alpha == 0.5
    revived = 0
    other, _ = network(pattern=pattern)
    source_of_other = CurvatureSource(other, "cross_entropy", [(x, torch.arange(8))])
    nested = GMP(0.5, pattern=pattern, every=1, end=6, drop=GivenScores(source_of_other, drop))
    for (before, after), (was, now) in zip(steps(model, x, method, 8), steps(other, x, nested, 8), strict=True):
        for weight in NAMES:
            assert int(after[weight].sum()) == int(now[weight].sum())  # the schedule's, as without regrowth
            assert not (now[weight] & ~was[weight]).any()
            revived += int((after[weight] & ~before[weight]).sum())
        fxsparse.set_masks(model, after)  # refuses what the pattern excludes
        grow.update(generated(model, 7 + revived))
    assert revived > 0


def test_gradual_pruning_without_alpha_stays_nested() -> None:
    model, x = network()
    for before, after in steps(model, x, GMP(0.8, every=1, end=6), 8):
        assert all(not (after[name] & ~before[name]).any() for name in NAMES)


def test_grown_weights_start_at_zero_and_by_gradient_by_default_of_granet() -> None:
    torch.manual_seed(0)
    model, x = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    handle = fxsparse.attach(model, optimizer, GMP(0.7, every=2, end=12, alpha=0.5, grow=Gradient()), total_steps=14)
    grew = 0
    for _ in range(14):
        before = {name: mask.clone() for name, mask in fxsparse.masks(model).items()}
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(8)).backward()
        optimizer.step()
        for name, mask in fxsparse.masks(model).items():
            come = mask & ~before[name]
            assert not model.get_parameter(name).detach()[come].any()
            assert not optimizer.state[model.get_parameter(name)]["momentum_buffer"][come].any()
            grew += int(come.sum())
    assert grew > 0 and handle.updates > 3
    assert abs(1 - sum(int(m.sum()) for m in fxsparse.masks(model).values()) / 384 - 0.7) < 0.01


def test_alternating_phases_that_are_not_dense_grow_the_highest() -> None:
    model, x = network()
    source = CurvatureSource(model, "cross_entropy", [(x, torch.arange(8))])
    drop, grow = generated(model, 7), generated(model, 8)
    schedule = CustomSparsity(((2, 0.8), (4, 0.4), (6, 0.8)))
    plain = ACDC(0.8, schedule=schedule, distribution=fxsparse.Uniform())
    method = with_saliencies(plain, GivenScores(source, drop), GivenScores(source, grow))
    for step, (before, after) in enumerate(steps(model, x, method, 7), 1):
        for weight in NAMES:
            size = before[weight].numel()
            wanted = size - int(schedule(step) * size + 1e-6)
            kept = best(drop[weight], before[weight], wanted)
            expected = kept | best(grow[weight], ~before[weight], wanted - int(kept.sum()))
            assert torch.equal(after[weight], expected if step in (2, 4, 6) else before[weight]), step


def test_the_dead_weights_of_a_resu_phase_are_those_of_the_best_scores() -> None:
    model, _ = network(0.5)
    source = CurvatureSource(model, "cross_entropy", [])
    grow = generated(model, 9)
    for index, name in enumerate(NAMES):
        weight, mask = model.get_parameter(name).detach(), fxsparse.masks(model)[name]
        for pattern in (fxsparse.Unstructured(), fxsparse.Channel(0)):
            if isinstance(pattern, fxsparse.Channel):
                mask = torch.arange(len(weight)) % 2 == 0
                mask = mask[:, None].expand_as(weight).clone()
            state = WeightState(name, index, 1, 1, 0, weight, mask, pattern)
            found = trained_units(TopSaliency(GivenScores(source, grow), 0.3), state, 0)
            if isinstance(pattern, fxsparse.Channel):
                rows = best(grow[name].sum(1), ~mask[:, 0], int(0.3 * int((~mask[:, 0]).sum()) + 1e-6))
                assert torch.equal(found, rows[:, None].expand_as(weight))
            else:
                assert torch.equal(found, best(grow[name], ~mask, int(0.3 * int((~mask).sum()) + 1e-6)))


def test_resu_trains_and_revives_by_the_saliencies_that_it_is_given() -> None:
    model, x = network()
    source = CurvatureSource(model, "cross_entropy", [(x, torch.arange(8))])
    asked: list[str] = []

    class Spy(NewtonGain):
        def score(self, weight: Tensor, *args: object, **options: object) -> Tensor:
            asked.append(source.name_of(weight))
            return super().score(weight, *args, **options)

    method = with_saliencies(RESU(0.5), grow=Spy(source))
    assert method.subset == TopSaliency(Spy(source), 0.2) and method.prune == RESU(0.5).prune
    assert method.subset.needs_gradient and not TopSaliency(FisherDiagonal(source)).needs_gradient
    assert with_saliencies(RESU.frozen(0.5, subset=AllDead()), grow=Magnitude()).subset.fraction == 0.2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so short a training teaches theta little
        fxsparse.attach(model, optimizer, method, total_steps=32)
        for _ in range(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(8)).backward()
            optimizer.step()
    assert set(asked) == set(NAMES)


def test_resu_takes_the_fisher_diagonal_of_the_weights_that_it_trains() -> None:
    """In its phase the model reads what stands at dead entries; at other times masks are opened for the diagonal."""
    model, x = network()
    batch = (x, torch.arange(8))
    source = CurvatureSource(model, "cross_entropy", [batch], method="exact")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, seen = fxsparse.nn.masked_weights(model)[NAMES[0]], set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so short a training teaches theta little
        fxsparse.attach(model, optimizer, with_saliencies(RESU(0.5), drop=FisherDiagonal(source)), total_steps=32)
        for _ in range(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x), batch[1]).backward()
            optimizer.step()
            seen.add(first.open)
            plain = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)).double()
            plain.load_state_dict({name: value.detach() for name, value in model.named_parameters()})
            other = CurvatureSource(plain, "cross_entropy", [batch], method="exact")
            for name in NAMES:
                expected = other.diagonal(plain.get_parameter(name))
                torch.testing.assert_close(source.diagonal(model.get_parameter(name), dense=True), expected)
    assert seen == {True, False}


def test_growth_that_cannot_be_is_refused() -> None:
    source = CurvatureSource(network()[0], "cross_entropy", [])
    with pytest.raises(ConfigError, match="`alpha` .=0.0. must be positive with `grow`"):
        GMP(0.5, grow=NewtonGain(source))
    with pytest.raises(ConfigError, match="`alpha`"):
        GMP(0.5, alpha=1.5)
    with pytest.raises(ConfigError, match="`grow`.* give a `schedule`"):
        with_saliencies(ACDC(0.5), grow=NewtonGain(source))
    with pytest.raises(ConfigError, match="`by`"):
        TopSaliency("obd")
    with pytest.raises(ConfigError, match="`fraction`"):
        TopSaliency(NewtonGain(source), 2.0)
    model, _ = network(0.5, fxsparse.NByM(2, 4, exact=False))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for method in (
        GMP(0.5, end=6, alpha=0.5),
        ACDC(0.5, schedule=CustomSparsity(((3, 0.5),), 0.5), grow=Magnitude()),
    ):
        with pytest.raises(ConfigError, match="no count per group"):
            fxsparse.attach(model, sgd, method, total_steps=9)
