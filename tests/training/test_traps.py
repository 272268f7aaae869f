"""Known mistakes in sparse training, one test each; every test here fails when the mistake is made."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxsparse.errors import ConfigError
from fxsparse.nn import Linear, MaskSpec, Route, ThetaInit, install_mask, masked_weight, masked_weights
from fxsparse.sparsity import (
    ERK,
    ConstantFanIn,
    ConstantSparsity,
    CustomSparsity,
    DropKind,
    Global,
    LinearSparsity,
    NByM,
    SharedSupport,
    Target,
    Uniform,
    Unstructured,
    fraction_count,
)
from fxsparse.sparsity.saliency import Gradient, Taylor, Wanda
from fxsparse.training import ACDC, GMP, MEST, SET, SNIP, Initial, Regroup, RigL, SRigL, WeightState, attach
from fxsparse.training.calibration import Calibration
from fxsparse.training.densify import Densify
from fxsparse.training.resu import RESU
from fxsparse.training.resu_subset import RandomDead, TopGradient, trained_units
from fxsparse.training.resu_theta import Selective, ThetaAdamW, ThetaMomentum, ThetaOptimizer, ThetaSGD
from fxsparse.training.resu_tournament import candidates, reserved
from tests.training.resu_run import TOTAL, Run, assert_zero_dead, batch

quiet = pytest.mark.filterwarnings("ignore:theta hardly moved:UserWarning")


class Chosen(nn.Module):
    """Weights whose dense gradients the test sets before each step."""

    def __init__(self, *weights: Tensor, alive: Tensor | None = None) -> None:
        super().__init__()
        self.holders, self.gradients = nn.ModuleList(), [torch.zeros_like(weight) for weight in weights]
        for weight in weights:
            holder = nn.Module()
            holder.weight = nn.Parameter(weight.clone())
            mask = weight != 0 if alive is None else alive
            install_mask(holder, "weight", MaskSpec(Unstructured(), route=Route.MASK_NODE), mask)
            self.holders.append(holder)

    def forward(self) -> Tensor:
        pairs = zip(self.holders, self.gradients, strict=True)
        return sum((masked_weight(holder.weight, holder.weight_mask) * g).sum() for holder, g in pairs)

    def alive(self, index: int = 0) -> list[int]:
        return self.holders[index].weight_mask.flatten().nonzero().flatten().tolist()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model().backward()
    optimizer.step()


# Methods


def test_srigl_ablates_a_row_without_any_salient_weight_however_small_gamma_is():
    """gamma k rounds down to 0: a threshold without max(1, .) would never ablate."""
    w = torch.tensor([[9.0, 8, 0, 0], [0, 5, 4, 0], [1, 0, 0, 2]])
    g = torch.tensor([[0.0, 0, 7, 6], [0, 0, 1, 5], [0, 0, 0, 0]])
    state = WeightState("w", 0, 1, 1, 0, w, w != 0, ConstantFanIn(), gradient=g, target=Target(0.5, 6))
    method = SRigL(alpha=0.5, every=1, end=9, gamma=0.1, decay=DropKind.CONSTANT)
    assert fraction_count(method.gamma, 2) == 0
    # salient: 9, 8, 5 and the gradients 7, 6, 5: none in the third row
    assert method.exchanged(state).int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]


def test_gradual_pruning_never_takes_what_the_final_budget_gives_back():
    """ERK's integers are no monotone function of the sparsity, and dead weights stay dead."""
    shapes = ((4, 1), (2, 1), (2, 5))
    model = Chosen(*(1 + torch.arange(float(a * b)).reshape(a, b) for a, b in shapes))
    schedule = CustomSparsity(((1, 0.5), (2, 0.65)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(model, optimizer, GMP(0.65, distribution=ERK(), schedule=schedule, every=1, drop=Gradient()))
    weights = [
        WeightState(str(i), i, 0, 0, 0, h.weight.detach(), h.weight_mask, Unstructured()).spec
        for i, h in enumerate(model.holders)
    ]
    budgets = [[t.alive for t in ERK().targets(weights, s).values()] for s in (0.5, 0.65)]
    assert budgets == [[3, 1, 4], [2, 2, 3]]
    counts = []
    for _ in range(2):
        step(model, optimizer)
        counts.append([len(model.alive(i)) for i in range(3)])
    assert counts == [[3, 2, 4], [2, 2, 3]]


@pytest.mark.parametrize("soft", [False, True])
def test_mest_does_drop_and_draws_what_grows(soft):
    """An exchange that did nothing would conserve the count as well."""
    weight, alive = torch.tensor([5.0, -2, 0, 4, 0, 1, 0, 0, -3, 0]), torch.tensor([0, 1, 3, 5, 8])
    mask = torch.zeros(10, dtype=torch.bool)
    mask[alive] = True
    found = set()
    for seed in range(12):
        model = Chosen(weight, alive=mask)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        method = MEST(0.5, distribution=Uniform(), every=1, p=(0.2, 0.0), boundaries=(50,), soft=soft, seed=seed)
        attach(model, optimizer, method)
        step(model, optimizer)
        found.add(tuple(model.alive()))
    gone = [set(alive.tolist()) - set(each) for each in found]
    assert len(found) > 4 and set().union(*gone) == (set() if soft else {1, 5})  # EM prunes -2 and 1


def test_mest_prunes_to_the_sum_of_both_sparsities():
    weight = 1 + torch.arange(1000.0)
    mask = torch.arange(1000) % 10 == 0
    for extra, kept in ((0.02, 80), (0.01, 90), (0.0, 100)):
        model = Chosen(weight, alive=mask)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        p, boundaries = ((extra, 0.0), (50,)) if extra else ((0.0,), ())
        attach(model, optimizer, MEST(0.9, distribution=Uniform(), every=1, p=p, boundaries=boundaries))
        step(model, optimizer)
        old = mask.nonzero().flatten().tolist()
        after, lowest = set(model.alive()), old[: 100 - kept]
        assert set(old[100 - kept :]) <= after and len(after) == 100
        assert len(after & set(lowest)) <= len(lowest) // 4  # few of them come back by chance


def test_acdc_compresses_by_one_ranking_over_all_weights():
    model = Chosen(10.0 + torch.arange(8.0), 1 + torch.arange(8.0) / 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(model, optimizer, ACDC(0.5, every=2), 9)
    for _ in range(2):
        step(model, optimizer)
    assert model.alive(1) == [7] and model.alive(0) == list(range(1, 8))  # each keeps its best, the rest is by size


def test_an_exchange_reads_the_weights_after_the_step():
    model = Chosen(torch.tensor([1.0, 2, 3, 0, 0, 0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.gradients = [torch.tensor([-9.0, 1.5, 0, 0, 0, 0])]  # the smallest becomes the largest
    attach(
        model,
        optimizer,
        SET(0.5, every=1, alpha=0.4, regrow_dropped=False, initial=Initial.KEEP, distribution=Uniform()),
    )
    step(model, optimizer)
    assert 0 in model.alive() and 1 not in model.alive()


@pytest.mark.parametrize("replaces", [True, False])
def test_growth_reads_the_gradient_of_its_own_step(replaces):
    model = Chosen(torch.tensor([1.0, 2, 3, 4, 0, 0, 0, 0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = RigL(
        0.5, every=2, end=9, alpha=0.25, decay=DropKind.CONSTANT, initial=Initial.KEEP, replaces_step=replaces
    )
    attach(model, optimizer, method)
    for large in (5, 7):  # large first at 5, ten times as large as what comes at 7
        model.gradients = [torch.where(torch.arange(8) == large, 10.0 if large == 5 else 1.0, 0.0)]
        step(model, optimizer)
    assert model.alive() == [1, 2, 3, 7]


def test_saliencies_are_scored_in_eval_mode_unless_asked_otherwise():
    torch.manual_seed(0)
    model = nn.Sequential(Linear(6, 8, bias=False), nn.BatchNorm1d(8), Linear(8, 3, bias=False)).double().train()
    x, y = torch.randn(16, 6).double() + 2, torch.randint(0, 3, (16,))
    loss = nn.functional.cross_entropy
    weights = masked_weights(model)
    states = [
        WeightState(name, i, 0, 0, 0, each.weight.detach(), each.mask, Unstructured())
        for i, (name, each) in enumerate(weights.items())
    ]
    scores = {}
    for train in (False, True):
        method = SNIP(0.5, train=train)
        with Calibration(model, weights, [(x, y)], loss, train=method.train) as calibration:
            scores[train] = method.scores(calibration, states)["0.weight"]
        twin = copy.deepcopy(model).train(train)
        loss(twin(x), y).backward()
        parts = [(w.weight.detach() * w.weight.grad).abs() for w in masked_weights(twin).values()]
        torch.testing.assert_close(scores[train], parts[0] / sum(part.sum() for part in parts))
    assert not torch.allclose(scores[False], scores[True])


# RESU


@quiet
def test_both_ends_of_the_budget_are_observed_after_a_dense_first_cycle():
    """Counted over cycles, the first quota would be the second one's, and the last one never reached."""
    method = RESU.frozen(
        sparsity=0.5, cycles=5, schedule=(0.0, 0.1, 0.2, 0.3, 0.5), distribution=Uniform(), budget=(0.1, 0.02)
    )
    run = Run(method, total=200)
    run.go(200)
    rows = [row for row in run.handle.report().resurrections if row.name == "0.weight"]
    assert [row.cycle for row in rows] == [1, 2, 3, 4]
    quotas = (0.1, 0.1 - 0.08 / 3, 0.1 - 0.16 / 3, 0.02)
    assert [row.won for row in rows] == [fraction_count(r, row.alive) for r, row in zip(quotas, rows, strict=True)]
    assert rows[0].won == 17 and rows[-1].won == 1  # of 173 and of 96


def test_quotas_follow_the_exact_product():
    units, scores = Unstructured().units((200,)), torch.arange(200.0)[None]
    trained = torch.arange(200)[None] >= 100
    for budget, places in ((0.29, 29), (0.07, 7), (0.58, 58), (0.0, 0), (1.0, 100)):  # .29 * 100 is less than 29
        assert reserved(units, budget, torch.tensor([100]), scores, trained).tolist() == [places]
    method = RESU.frozen(sparsity=0.9, cycles=6).timed(600)
    assert [fraction_count(method.budget_at(j), 100) for j in range(5)] == [10, 8, 6, 4, 2]


@quiet
def test_the_smallest_rise_of_the_sparsity_prunes_and_none_does_not():
    method = RESU.frozen(
        sparsity=0.506, cycles=3, schedule=(0.5, 0.506, 0.506), distribution=Uniform(), budget=(0.0, 0.0)
    )
    run, counts = Run(method), []
    for cycle in run.cycles:
        before = run.go(cycle.prune - 1).masks()
        after = run.go(cycle.prune).masks()
        counts.append(int(after["0.weight"].sum()))
        assert torch.equal(before["0.weight"], after["0.weight"]) is (cycle.index == 2)
        assert not (after["0.weight"] & ~before["0.weight"]).any()
    assert counts == [96, 95, 95]  # of 192


def test_constant_and_linear_schedules_differ_in_the_first_cycle():
    for schedule, values in ((ConstantSparsity, (0.8, 0.8, 0.8)), (LinearSparsity, (0.0, 0.4, 0.8))):
        method = RESU.frozen(sparsity=0.8, cycles=3, schedule=schedule)
        assert method.sparsities == pytest.approx(values)
        assert (method.timed(60).timeline.cycles[0].sparsity is None) is (values[0] == 0.0)


@quiet
def test_every_phase_starts_its_own_optimizer_of_theta():
    method = RESU.frozen(
        sparsity=0.6, cycles=2, schedule=(0.6, 0.6), distribution=Uniform(), theta=ThetaMomentum(lr=0.05)
    )
    run = Run(method).to_phase(0, 2)
    assert run.handle.state_dict()["theta"][0]
    run.go(run.cycles[0].end)
    assert not run.handle.state_dict()["theta"][0]
    run.to_phase(1)
    before, mask, gradient = run.weights()["0.weight"], run.masks()["0.weight"], []
    run.go(run.step + 1, lambda run: gradient.append(run.model[0].weight.grad.clone()))
    expected = before - 0.05 * (1 - 0.9) * gradient[0]
    torch.testing.assert_close(run.weights()["0.weight"][~mask], expected[~mask], rtol=1e-5, atol=1e-8)


@quiet
def test_theta_follows_a_schedule_of_the_learning_rate_within_its_phase():
    run = Run(RESU.frozen(sparsity=0.6, cycles=1, distribution=Uniform(), theta=ThetaSGD(scale=3.0))).to_phase(0, 1)
    for rate in (0.02, 0.05):
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        before, mask, gradient = run.weights()["0.weight"], run.masks()["0.weight"], []
        run.go(run.step + 1, lambda run, kept=gradient: kept.append(run.model[0].weight.grad.clone()))
        expected = before - 3 * rate * gradient[0]
        torch.testing.assert_close(run.weights()["0.weight"][~mask], expected[~mask], rtol=1e-5, atol=1e-8)


def test_numbers_of_theta_rules_are_none_of_them_hard_coded():
    g, everywhere, theta = torch.tensor([1.0, -2.0]), torch.ones(2, dtype=torch.bool), torch.tensor([1.0, 1.0])

    def moved(rule) -> list[float]:
        return rule.step(theta, g, everywhere, {}, 0.1).tolist()

    assert moved(ThetaMomentum(beta=0.5)) == pytest.approx([0.95, 1.1])
    assert moved(ThetaAdamW(epsilon=1.0)) == pytest.approx([0.95, 1 + 0.2 / 3])
    decayed = ThetaOptimizer(kind=torch.optim.SGD, weight_decay=0.5)
    assert moved(decayed) == pytest.approx([0.95 - 0.1, 0.95 + 0.2])
    assert moved(ThetaOptimizer(kind=torch.optim.AdamW)) == pytest.approx([0.9, 1.1], abs=1e-6)  # its own decay is 0
    assert moved(Selective(threshold=1.0)) == pytest.approx([1.0, 1.2])  # no test of consistency while warming up


@pytest.mark.parametrize("score", [Gradient(), Taylor(), Wanda()])
def test_a_tournament_without_its_data_raises(score):
    method = RESU.frozen(sparsity=0.5, cycles=1, score=score, distribution=Uniform()).timed(40)
    mask = torch.tensor([[True, True, False, False]])
    state = WeightState("w", 0, 40 // 2, 1, 0, torch.rand(1, 4), mask, Unstructured(), memory={"trained": ~mask})
    assert method.timeline.cycles[0].end == state.step
    with pytest.raises(ConfigError, match="tournament of `w`.*needs"):
        method.update([state])


def test_densification_keeps_the_alive_whatever_the_budget():
    method = Densify(path=(0.5, 0.4), sparsity=0.4, budget=(0.9, 0.9), distribution=Uniform()).timed(40)
    mask = torch.arange(10)[None] < 5
    weight = torch.where(mask, 0.01, 1.0)  # theta is larger everywhere
    state = WeightState(
        "w", 0, method.timeline.cycles[0].end, 1, 0, weight, mask, Unstructured(), memory={"trained": ~mask}
    )
    assert method.update([state])["w"].flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_only_groups_with_a_free_place_are_trained():
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 1]]).bool()
    for pattern in (NByM(2, 4), NByM(2, 4, exact=False)):
        units = pattern.units((2, 8))
        free = units.spread(candidates(units, units.collect(mask)))
        assert free.int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]]


def test_random_subsets_are_drawn_anew_at_every_phase():
    mask = torch.zeros(1, 64, dtype=torch.bool)
    chosen = []
    for update in (1, 1, 2):
        state = WeightState("w", 0, 5, update, 0, torch.zeros(1, 64), mask, Unstructured())
        chosen.append(trained_units(RandomDead(0.5), state, 0))
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])


def test_the_default_recipe_enters_without_a_jump_and_trains_what_it_says():
    """Theta starts at 0, so that the outputs stay; the alive weights train beside it; the rest stays at 0."""
    run = Run(RESU(sparsity=0.8, cycles=4, rise=2, distribution=Uniform()), total=120)
    assert run.method.init is ThetaInit.ZERO
    x, entered = batch(999)[0], 0
    for cycle in run.cycles:
        if cycle.phase is None:
            continue
        run.go(cycle.enter)
        entered += 1
        kept = run.masks()
        zeroed = copy.deepcopy(run.model).eval()
        with torch.no_grad():
            for name, weight in masked_weights(zeroed).items():
                weight.weight.mul_(kept[name])
        assert torch.equal(copy.deepcopy(run.model).eval()(x), zeroed(x))
        before = run.weights()
        run.go(cycle.end - 1)
        for name, unit in run.units().items():
            dead, now = ~kept[name], run.weights()[name]
            assert int(unit.trainable.sum()) == max(1, fraction_count(0.2, int(dead.sum())))
            assert now[unit.trainable].all() and not now[dead & ~unit.trainable].any()
            assert not torch.equal(now[kept[name]], before[name][kept[name]])
        trained = {name: unit.trainable.clone() for name, unit in run.units().items()}
        run.go(cycle.end)
        for name, mask in run.masks().items():
            assert not (mask & ~kept[name] & ~trained[name]).any()
            assert int(mask.sum()) == int(kept[name].sum())
        assert_zero_dead(run)
    assert entered >= 3
    rows = run.go(120).handle.report().resurrections
    assert all(row.won > 0 for row in rows if row.cycle == 1) and all(row.movement > 0 for row in rows)


@quiet
def test_a_step_without_a_gradient_moves_no_theta_and_breaks_nothing():
    run = Run(RESU.frozen(sparsity=0.8, cycles=1, distribution=Uniform())).to_phase(0, 1)
    before = run.weights()
    run.optimizer.zero_grad()
    run.optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in run.weights().items())
    run.go(TOTAL)
    assert_zero_dead(run)


@quiet
@pytest.mark.parametrize("calibration", [50, 3])
def test_the_tournament_reads_the_last_batches_of_its_phase_alone(calibration):
    """Not what PRUNE read, nor STABILIZE, nor the batch that chose the subset as the phase began."""
    options = {"sparsity": 0.6, "cycles": 2, "schedule": (0.4, 0.6), "distribution": Uniform()}
    method = RESU.frozen(**options, subset=TopGradient(0.5), score=Taylor(), prune=Taylor(), calibration=calibration)
    run = Run(method, total=120)
    for cycle in run.cycles:
        seen = []
        run.to_phase(cycle.index).go(
            cycle.end - 1, lambda run, kept=seen: kept.append(run.model[0].weight.grad.clone())
        )
        assert len(seen) == cycle.end - 1 - cycle.enter > 5
        unit, total = run.units()["0.weight"], run.handle._memory["0.weight"]["gradient"]
        expected = sum(seen[1 - calibration :] if calibration < len(seen) else seen)
        torch.testing.assert_close(total[unit.trainable], expected[unit.trainable], rtol=1e-5, atol=1e-8)
    run = Run(RESU.frozen(**options, score=Wanda(), prune=Wanda(), calibration=calibration), total=120)
    for cycle in run.cycles:
        run.go(cycle.end - 1)
        norm = run.handle._inputs.statistics()["0.weight"]["norm"][0]
        inputs = torch.cat([batch(i)[0] for i in range(max(cycle.enter, cycle.end - calibration), cycle.end - 1)])
        torch.testing.assert_close(norm, inputs.double().norm(dim=0), rtol=1e-6, atol=0)


@quiet
def test_rows_change_their_groups_at_prune_only():
    method = RESU.frozen(
        sparsity=0.7, cycles=3, pattern=SharedSupport(4), distribution=Uniform(), regroup=Regroup(), budget=(0.3, 0.3)
    )
    run, moved = Run(method, total=120), False
    for cycle in run.cycles[1:]:
        orders = [
            masked_weights(run.go(at).model)["0.weight"].row_order for at in (cycle.prune, cycle.end - 1, cycle.end)
        ]
        assert orders[0] is not None and all(torch.equal(orders[0], order) for order in orders[1:])
        moved |= not torch.equal(orders[0], torch.arange(16))
    assert moved and sum(row.won for row in run.handle.report().resurrections) > 0


def test_densification_keeps_the_alive_of_a_weight_that_a_ranking_would_shrink():
    method = Densify(path=(0.5, 0.4), sparsity=0.4, distribution=Global()).timed(40)
    mask, step = torch.arange(10)[None] < 5, method.timeline.cycles[0].end
    small, large = torch.where(mask, 0.01, 0.001), torch.ones(1, 10)
    found = method.update(
        [
            WeightState(name, i, step, 1, 0, weight, mask, Unstructured(), memory={"trained": ~mask})
            for i, (name, weight) in enumerate((("small", small), ("large", large)))
        ]
    )
    assert torch.equal(found["small"], mask) and bool(found["large"].all())


@quiet
def test_an_average_goes_on_from_a_checkpoint_within_a_phase():
    def averaged(run: Run) -> AveragedModel:
        average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        run.handle.follow(average)
        return average

    def go(run: Run, average: AveragedModel, until: int) -> None:
        while run.step < until:
            run.go(run.step + 1)
            average.update_parameters(run.model)

    method = RESU.frozen(sparsity=0.6, cycles=1, distribution=Uniform(), budget=(0.3, 0.3))
    run, again = Run(method), Run(method)
    average, other = averaged(run), averaged(again)
    go(run, average, run.cycles[0].enter + 2)
    pairs = ((run.model, again.model), (average, other), (run.optimizer, again.optimizer), (run.handle, again.handle))
    for source, part in pairs:
        part.load_state_dict(copy.deepcopy(source.state_dict()))
    again.step = run.step
    go(run, average, TOTAL)
    go(again, other, TOTAL)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in average.state_dict().items())


@quiet
@pytest.mark.parametrize("densify", [False, True])
def test_a_checkpoint_of_a_pause_goes_on_bit_for_bit(densify):
    make = Densify(path=(0.7, 0.4, 0.1), sparsity=0.1, pauses=(0,), distribution=Uniform())
    method = (
        make if densify else RESU(sparsity=0.8, cycles=4, rise=2, pauses=(2,), distribution=Uniform(), prune=Taylor())
    )
    saved = []

    def save(model: nn.Module, cycle: int) -> None:
        parts = (model, run.optimizer, run.handle)
        saved.append((run.handle.step, copy.deepcopy([part.state_dict() for part in parts])))

    run = Run(method, total=120)
    run.handle.on_pause(save)
    run.go(120)
    [(step, states)] = saved
    again = Run(method, total=120)
    for part, state in zip((again.model, again.optimizer, again.handle), states, strict=True):
        part.load_state_dict(state)
    again.step = step
    again.go(120)
    assert all(torch.equal(v, again.model.state_dict()[name]) for name, v in run.model.state_dict().items())
    assert str(run.handle.report()) == str(again.handle.report())
