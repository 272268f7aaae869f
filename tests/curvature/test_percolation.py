"""Percolation: goldens, exact energies, restoring bit by bit, and the prediction against measured losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature.damage_compare import spearman
from fxsparse.curvature.operator import CurvatureOperator
from fxsparse.curvature.percolation import Percolation
from fxsparse.curvature.percolation_groups import GroupTable
from fxsparse.curvature.percolation_rules import Direction, Energy, Pick, concentrated, picked, sampling_probabilities
from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity.random import generator

FISHER = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)


def four() -> tuple[nn.Module, GroupTable]:
    model = nn.Linear(4, 1, bias=False).double()
    return model, GroupTable.by_ids({"weight": FISHER[None]}, {"weight": torch.arange(4)[None]})


def test_golden_curve() -> None:
    model, table = four()
    experiment = Percolation(1.0, 1.0)
    grid = (0.25, 0.5, 0.75, 1.0)
    assert [experiment.predicted(table, c)[0] for c in grid] == [0.25, 0.5, 0.25, 0.25]
    assert [experiment.predicted(table, c)[1] for c in grid] == pytest.approx([4, 3, 7 / 3, 1.875])
    curve = experiment.curve(model, table, None, grid)  # one entry a group: any direction has the expected risk
    assert curve.stressed == (0.25, 0.5, 0.25, 0.25)
    assert curve.predicted == pytest.approx((4, 3, 7 / 3, 1.875))
    assert curve.crossing == 0.25
    assert all(math.isnan(value) for value in curve.measured)


def test_a_loss_may_be_a_tensor_whose_graph_is_let_go() -> None:
    model, table = four()
    x = torch.randn(5, 4, dtype=torch.float64)
    experiment = Percolation(0.1, 1e-3)
    numbers = experiment.curve(model, table, lambda: model(x).square().mean().item(), (0.5, 1.0), repeats=2)
    tensors = experiment.curve(model, table, lambda: model(x).square().mean(), (0.5, 1.0), repeats=2)
    assert tensors.measured == numbers.measured and tensors.standard_errors == numbers.standard_errors
    for found in (*tensors.measured, *tensors.standard_errors, *(shock.measured for shock in tensors.shocks)):
        assert type(found) is float
    risks, changes, _ = experiment.single_groups(model, table, lambda: model(x).square().mean())
    assert not risks.requires_grad and not changes.requires_grad
    for bad in (None, "1", True, torch.ones(2), torch.ones((), dtype=torch.complex64)):
        with pytest.raises(ConfigError, match="`loss`"):
            experiment.shock(model, table, 0.5, lambda bad=bad: bad)


def test_sampling_probabilities() -> None:
    assert sampling_probabilities(FISHER, 1.0).tolist() == pytest.approx((FISHER / 15).tolist())
    assert sampling_probabilities(FISHER, 2.0).tolist() == pytest.approx(
        [0.390524, 0.276142, 0.195262, 0.138071], abs=1e-6
    )
    draws = torch.stack([picked(Pick.SAMPLE, FISHER, 1, 1.0, generator(0, i, 0, "x"))[0] for i in range(4000)])
    shares = torch.bincount(draws, minlength=4) / 4000
    assert float((shares - FISHER / 15).abs().max()) < 0.03
    cold = [picked(Pick.SAMPLE, FISHER, 2, 1e-3, generator(0, i, 0, "x")).tolist() for i in range(20)]
    assert all(each == [0, 1] for each in cold)  # T -> 0 is the top k
    hot = torch.cat([picked(Pick.SAMPLE, FISHER, 1, 1e6, generator(0, i, 0, "x")) for i in range(2000)])
    assert float((torch.bincount(hot, minlength=4) / 2000 - 0.25).abs().max()) < 0.04


def test_picks_and_counts() -> None:
    assert picked(Pick.TOPK, FISHER, 2, 1.0, torch.Generator()).tolist() == [0, 1]
    assert picked(Pick.BOTTOMK, FISHER, 2, 1.0, torch.Generator()).tolist() == [2, 3]
    assert len(set(picked(Pick.RANDOM, FISHER, 3, 1.0, generator(0, 0, 0, "x")).tolist())) == 3
    assert [concentrated(c, 100) for c in (0.001, 0.29, 0.57, 1.0)] == [1, 29, 57, 100]


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(20, 5), torch.randint(3, (20,))


def table_of(model: nn.Module, x: Tensor, y: Tensor, names: tuple[str, ...] = ("0.weight", "2.weight")) -> GroupTable:
    op = CurvatureOperator(model, list(names), "cross_entropy", (x, y))
    return GroupTable.of(op.space.split(op.diag()), model)


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("energy", list(Energy))
def test_the_energy_is_exact_and_where_it_belongs(direction: Direction, energy: Energy) -> None:
    model, x, y = mlp()
    table = table_of(model, x, y)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: list[dict[str, Tensor]] = []

    def loss() -> float:
        seen.append({name: (p.detach() - before[name]).double() for name, p in model.named_parameters()})
        return F.cross_entropy(model(x), y).item()

    op = CurvatureOperator(model, list(table.ids), "cross_entropy", (x, y))
    experiment = Percolation(0.3, 0.0, direction=direction, energy=energy)
    shock = experiment.shock(model, table, 0.4, loss, gradient=op.space.split(op.gradient()))
    assert shock.norm == pytest.approx(0.3, abs=1e-12)
    plus, minus = seen[1], seen[2]
    assert sum(float(each.square().sum()) for each in plus.values()) == pytest.approx(0.09, rel=1e-5)
    for name in plus:
        assert torch.allclose(plus[name], -minus[name], atol=1e-6)  # antithetic
    sizes = {0: 5, 1: 8}
    for name, ids in table.ids.items():
        for group in ids.unique().tolist():
            moved = float(plus[name][ids == group].square().sum())
            if group not in shock.groups:
                assert moved == 0.0
            elif energy is Energy.EQUAL:
                assert moved == pytest.approx(0.09 / len(shock.groups), rel=1e-4)
            else:
                total = sum(int(table.alive[g]) for g in shock.groups)
                assert moved == pytest.approx(0.09 * int(table.alive[group]) / total, rel=1e-4)
    assert sizes[0] == int(table.alive[0])
    assert plus["0.bias"].abs().max() == 0


def test_parameters_come_back_bit_by_bit_also_after_an_exception() -> None:
    model, x, y = mlp()
    table = table_of(model, x, y)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
        model[0].weight[0, 1] = 1e-30  # what subtracting delta would lose
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    versions = [id(p) for p in model.parameters()]

    def same() -> bool:
        return all(torch.equal(p.view(torch.int32), before[n].view(torch.int32)) for n, p in model.named_parameters())

    Percolation(10.0, 0.0).curve(model, table, lambda: F.cross_entropy(model(x), y).item(), (0.1, 1.0), 2)
    assert same()
    calls = []

    def fails() -> float:
        calls.append(1)
        if len(calls) == 2:
            assert not same()
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        Percolation(10.0, 0.0).shock(model, table, 0.5, fails)
    assert same()
    assert [id(p) for p in model.parameters()] == versions
    with pytest.raises(DataError, match="smaller"):
        Percolation(10.0, 0.0).shock(model, table, 0.5, iter([1.0, math.inf, 1.0]).__next__)
    assert same()


def test_buffers_that_the_loss_moves_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).train()
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    table = GroupTable.of({"0.weight": torch.rand(6, 4)})
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = lambda: F.cross_entropy(model(x), y).item()  # noqa: E731
    Percolation(0.5, 0.0).shock(model, table, 0.5, loss)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    Percolation(0.5, 0.0).single_groups(model, table, loss)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_antithetic_measurement_cancels_the_gradient() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    slope = torch.tensor([[5.0, -3.0, 2.0]], dtype=torch.float64)
    curve = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    loss = lambda: float((slope * model.weight.detach() + 0.5 * curve * model.weight.detach() ** 2).sum())  # noqa: E731
    with torch.no_grad():
        model.weight.zero_()
    table = GroupTable.by_ids({"weight": curve}, {"weight": torch.zeros(1, 3, dtype=torch.int64)})
    for seed in range(5):
        both = Percolation(0.1, 0.0, seed=seed).shock(model, table, 1.0, loss)
        assert both.measured == pytest.approx(both.predicted, abs=1e-14)
        one = Percolation(0.1, 0.0, seed=seed, antithetic=False).shock(model, table, 1.0, loss)
        assert abs(one.measured - one.predicted) > 1e-3


def test_masked_networks_are_perturbed_on_their_support() -> None:
    model, x, y = mlp()
    sparse = fxsparse.transform(model, (x,), sparsity=0.6)
    table = table_of(sparse, x, y)
    masks = fxsparse.masks(sparse)

    def loss() -> float:
        for name, mask in masks.items():
            assert bool((sparse.get_parameter(name)[~mask] == 0).all())
        return F.cross_entropy(sparse(x), y).item()

    alive = (table.alive > 0).sum()
    Percolation(0.5, 0.0).shock(sparse, table, float(alive) / table.count / 2, loss)
    assert int(table.alive.sum()) == sum(int(mask.sum()) for mask in masks.values())
    relative = Percolation(0.1, 0.0, relative=True).shock(sparse, table, 0.2)
    norm = math.sqrt(sum(float(sparse.get_parameter(n).detach()[m].double().square().sum()) for n, m in masks.items()))
    assert relative.norm == pytest.approx(0.1 * norm)


def test_draws_repeat_and_leave_the_global_generator_alone() -> None:
    model, x, y = mlp()
    table = table_of(model, x, y)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    loss = lambda: F.cross_entropy(model(x), y).item()  # noqa: E731
    first = Percolation(0.5, 0.1, Pick.SAMPLE, seed=4).curve(model, table, loss, (0.2, 0.5), 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    second = Percolation(0.5, 0.1, Pick.SAMPLE, seed=4).curve(model, table, loss, (0.2, 0.5), 3)
    assert first.measured == second.measured
    assert first.standard_errors[0] > 0
    assert (
        Percolation(0.5, 0.1, Pick.SAMPLE, seed=5).curve(model, table, loss, (0.2, 0.5), 3).measured != first.measured
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("budget", value) for value in ("a", math.nan, math.inf, 0, -1.0, True, None)),
        *(("threshold", value) for value in ("a", math.nan, math.inf, -1.0, True)),
        *(("temperature", value) for value in ("a", math.nan, 0.0)),
        *(("seed", value) for value in (1.5, "a", None, True)),
        *((name, "x") for name in ("pick", "energy", "direction", "mean_fisher", "antithetic", "relative")),
        ("relative", 1),
        ("pick", [1]),
    ],
)
def test_options_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` \\(="):
        Percolation(**{"budget": 1.0, "threshold": 1.0, name: value})


OK = Percolation(1.0, 1.0)
INDEX = {"weight": torch.arange(4)[None]}


@pytest.mark.parametrize(
    ("match", "call"),
    [
        *((r"`concentrations` \(=", lambda m, t, v=v: OK.curve(m, t, None, v)) for v in ("abc", 0.5, None, ["a"], ())),
        *((r"`concentration` \(=", lambda m, t, v=v: OK.curve(m, t, None, v)) for v in ((0.5, math.nan), (1.0, 2.0))),
        *((r"`concentration` \(=", lambda m, t, v=v: OK.shock(m, t, v)) for v in ("a", math.nan, None, True, -0.5)),
        *((r"`concentration` \(=", lambda m, t, v=v: OK.predicted(t, v)) for v in ("a", 0, 2)),
        *((r"`repeats` \(=", lambda m, t, v=v: OK.curve(m, t, None, (1.0,), v)) for v in ("a", 1.5, 0, True)),
        *((r"`repeats` \(=", lambda m, t, v=v: OK.single_groups(m, t, lambda: 0.0, v)) for v in ("a", 0)),
        *((r"`repeat` \(=", lambda m, t, v=v: OK.shock(m, t, 1.0, repeat=v)) for v in ("a", -1, 0.5)),
        *((r"`loss` \(=", lambda m, t, v=v: OK.shock(m, t, 1.0, v)) for v in ("a", 1.0)),
        (r"`loss` \(=None", lambda m, t: OK.single_groups(m, t, None)),
        (r"`loss` \(=str", lambda m, t: OK.shock(m, t, 1.0, lambda: "a")),
        (r"`model` \(='x'", lambda m, t: OK.shock("x", t, 1.0)),
        (r"`table` \(=\{", lambda m, t: OK.shock(m, {}, 1.0)),
        (r"`table` \(=None", lambda m, t: OK.predicted(None, 1.0)),
        (r"`gradient` \(=list", lambda m, t: OK.shock(m, t, 1.0, gradient=[1.0])),
        ("`gradient` has a float at 'weight'", lambda m, t: OK.curve(m, t, gradient={"weight": 1.0})),
        (r"`fisher` \(=list", lambda m, t: GroupTable.of([FISHER])),
        (r"`fisher` \(=NoneType", lambda m, t: GroupTable.by_ids(None, INDEX)),
        (r"`model` \(='x'", lambda m, t: GroupTable.of({"w": FISHER}, "x")),
        *((r"`axis` \(=", lambda m, t, v=v: GroupTable.of({"w": FISHER}, axis=v)) for v in ("a", 0.5, True, -2)),
        (r"`ids` \(=NoneType", lambda m, t: GroupTable.by_ids({"weight": FISHER[None]}, None)),
        ("`ids` of `w`.*float32", lambda m, t: GroupTable.by_ids({"w": FISHER}, {"w": torch.arange(4.0)})),
        ("`ids` of `w`.*-1", lambda m, t: GroupTable.by_ids({"w": FISHER}, {"w": torch.arange(-2, 2)})),
        (r"`alive` \(=\(3,\)", lambda m, t: GroupTable(INDEX, FISHER, torch.ones(3, dtype=torch.int64))),
        (r"`fisher` \(='x'", lambda m, t: GroupTable(INDEX, "x", torch.ones(4, dtype=torch.int64))),
    ],
)
def test_arguments_by_name_and_nothing_moves(match: str, call: Any) -> None:
    model, table = four()
    before, state = model.weight.detach().clone(), torch.get_rng_state()
    with pytest.raises(ConfigError, match=match):
        call(model, table)
    assert torch.equal(model.weight, before) and torch.equal(torch.get_rng_state(), state)


def test_a_bad_grid_is_refused_before_a_loss_is_asked_for() -> None:
    model, table = four()
    with pytest.raises(ConfigError, match=r"`concentration` \(=2.0\)"):
        OK.curve(model, table, lambda: pytest.fail("asked"), (0.5, 2.0))


def test_tables_of_masked_weights_have_their_shape() -> None:
    sparse = fxsparse.transform(nn.Linear(4, 3), (torch.ones(1, 4),), sparsity=0.5)
    with pytest.raises(ConfigError, match=r"`weight` \(=\(1, 4\)\) must be like its mask"):
        GroupTable.of({"weight": FISHER[None]}, sparse)


def test_bad_options_have_typed_errors() -> None:
    model, table = four()
    ok = Percolation(1.0, 1.0)
    for call in (
        lambda: Percolation(0.0, 1.0),
        lambda: Percolation(1.0, -1.0),
        lambda: Percolation(1.0, 1.0, temperature=0.0),
        lambda: Percolation(1.0, 1.0, "best"),
        lambda: Percolation(1.0, 1.0, direction="up"),
        lambda: ok.shock(model, table, 0.0),
        lambda: ok.shock(model, table, 1.1),
        lambda: ok.curve(model, table, None, ()),
        lambda: ok.curve(model, table, None, (0.5,), 0),
        lambda: Percolation(1.0, 1.0, direction="gradient").shock(model, table, 0.5),
        lambda: Percolation(1.0, 1.0, relative=True).predicted(table, 0.5),
        lambda: ok.shock(nn.Linear(3, 1), table, 0.5),
        lambda: GroupTable.by_ids({"w": FISHER}, {"w": torch.full((4,), -1)}),
        lambda: GroupTable.by_ids({"w": FISHER}, {"w": torch.zeros(3, dtype=torch.int64)}),
        lambda: GroupTable.of({"w": FISHER}, axis=1),
    ):
        with pytest.raises(ConfigError):
            call()
    nn.init.zeros_(model.weight)
    with pytest.raises(DataError, match="shrink"):
        Percolation(1.0, 1.0, direction="shrink").shock(model, table, 0.5)
    with pytest.raises(DataError):
        GroupTable.by_ids({"w": -FISHER}, {"w": torch.arange(4)})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.01, 1.0), st.sampled_from(list(Pick)), st.sampled_from(list(Energy)))
def test_budgets_are_kept_for_any_groups(seed: int, concentration: float, pick: Pick, energy: Energy) -> None:
    g = torch.Generator().manual_seed(seed)
    model = nn.Linear(6, 5, bias=False).double()
    ids = torch.randint(-1, 7, (5, 6), generator=g)
    present = torch.unique(ids[ids >= 0])
    ids = torch.where(ids >= 0, torch.searchsorted(present, ids.clamp_min(0)), -1)
    table = GroupTable.by_ids({"weight": torch.rand(5, 6, generator=g)}, {"weight": ids})
    shock = Percolation(0.7, 0.01, pick, energy=energy, seed=seed).shock(model, table, concentration)
    assert shock.norm == pytest.approx(0.7, rel=1e-12)
    assert len(shock.groups) == concentrated(concentration, table.count)
    assert 0 <= shock.stressed <= 1
    assert bool((shock.risks >= 0).all())
    assert float(shock.risks.sum()) == pytest.approx(shock.predicted)
    assert set(shock.risks.nonzero()[:, 0].tolist()) <= set(shock.groups)


def test_risks_rank_the_losses_of_digits() -> None:
    """An MLP 64-64-32-10 on digits: the Fisher of 400 samples predicts what perturbing single rows costs."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(300):
        rows = torch.arange(step * 64, step * 64 + 64) % 1200
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    table = table_of(model, x[:400], y[:400], ("0.weight", "2.weight", "4.weight"))
    held_x, held_y = x[1200:1500], y[1200:1500]

    def loss() -> float:
        with torch.no_grad():
            return F.cross_entropy(model(held_x).double(), held_y).item()

    risks, changes, rank = Percolation(0.2, 0.0).single_groups(model, table, loss, repeats=4)
    assert len(risks) == 106
    assert rank >= 0.75
    used = risks > 1e-9
    assert 0.7 <= float((changes[used] / risks[used]).median()) <= 1.4
    one_sided = Percolation(0.2, 0.0, antithetic=False).single_groups(model, table, loss)
    assert spearman(*one_sided[:2]) < rank
