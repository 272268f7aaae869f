"""RESU in a training loop: what trains in which phase, what stands still, what is reported."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import Mode, ThetaInit, masked_weights, masks
from fxsparse.sparsity import Block, ConstantFanIn, Gradient, NByM, SharedSupport, Target, Uniform, Unstructured
from fxsparse.sparsity.saliency import Taylor, Wanda
from fxsparse.training.densify import Densify
from fxsparse.training.dsnot import DSNoT
from fxsparse.training.resu import RESU
from fxsparse.training.resu_phases import Lengths, Phase
from fxsparse.training.resu_subset import CyclicDead, TopGradient
from fxsparse.training.resu_theta import Selective, ThetaAdamW, ThetaMomentum, ThetaOptimizer, ThetaSGD
from tests.training.resu_run import TOTAL, Run, adamw, assert_zero_dead, batch, net

pytestmark = pytest.mark.filterwarnings("ignore:theta hardly moved:UserWarning")
# The states of a training


def test_modes_and_counts_along_a_training():
    run, counts = Run(), []
    for step in range(TOTAL):
        assert run.handle.phase is run.handle.method.timeline.phase(step + 1)[0]
        run.go(step + 1)
        modes = {unit.mode for unit in run.units().values()}
        sparse = any(not mask.all() for mask in masks(run.model).values())
        assert modes == {Mode.RESU if run.handle.phase is Phase.RESU else Mode.SPARSE if sparse else Mode.DENSE}
        counts.append(sum(int(mask.sum()) for mask in masks(run.model).values()))
        if Mode.RESU not in modes:
            assert_zero_dead(run)
    assert counts == sorted(counts, reverse=True)  # no commit changes a count, no prune revives
    for name, mask in masks(run.model).items():
        assert int(mask.sum()) == fxsparse.sparsity.keep_count(mask.numel(), 0.8), name
    prune = {cycle.prune for cycle in run.cycles}
    commit = {cycle.end for cycle in run.cycles if cycle.phase is not None}
    assert {row.step for row in run.handle.report()} == (prune | commit) - {run.cycles[0].prune, run.cycles[0].end}
    assert run.handle.phase is Phase.FINAL and run.handle.cycle is None


@pytest.mark.parametrize(
    "make", [adamw, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)]
)
@pytest.mark.parametrize("keep_state", [False, True])
def test_frozen_weights_stand_still_bit_for_bit(make, keep_state):
    """Decay and stale momentum move W[M] unless the optimizer does not see the weight at all."""
    method = RESU.frozen(sparsity=0.8, cycles=2, schedule=(0.5, 0.8), distribution=Uniform(), keep_state=keep_state)
    run = Run(method, make).to_phase(0)
    before, kept = run.weights(), run.masks()
    previous = before
    for step in range(run.cycles[0].enter, run.cycles[0].end - 1):
        run.go(step + 1)
        now = run.weights()
        for name, mask in kept.items():
            assert torch.equal(now[name][mask], before[name][mask])
            assert torch.equal(masks(run.model)[name], mask)
            assert (now[name][~mask] != previous[name][~mask]).float().mean() > 0.5  # theta trains
        previous = now
    state = run.optimizer.state
    for weight in masked_weights(run.model).values():
        assert (weight.weight in state) is keep_state
    run.go(TOTAL)
    assert_zero_dead(run)


def test_kept_state_survives_a_phase_and_only_changed_entries_are_reset():
    method = RESU.frozen(sparsity=0.5, cycles=1, keep_state=True, distribution=Uniform(), budget=(0.3, 0.3))
    run = Run(method)
    run.to_phase(0)
    weight = masked_weights(run.model)["0.weight"].weight
    before, mask = run.optimizer.state[weight]["exp_avg"].clone(), run.masks()["0.weight"]
    run.go(run.cycles[0].end)
    changed = mask ^ run.masks()["0.weight"]
    assert changed.any() and torch.equal(run.optimizer.state[weight]["exp_avg"], torch.where(changed, 0.0, before))


def test_alive_weights_train_where_they_are_not_frozen():
    run = Run(RESU.frozen(sparsity=0.6, cycles=1, freeze_active=False, distribution=Uniform())).to_phase(0)
    reference = copy.deepcopy(run.model)  # the main optimizer alone on M * G
    weight = masked_weights(run.model)["0.weight"]
    mask, before = weight.mask.clone(), weight.weight.detach().clone()
    state = run.optimizer.state[weight.weight]
    first, second, steps = (state[key].clone() for key in ("exp_avg", "exp_avg_sq", "step"))
    x, y = batch(run.step)
    nn.functional.cross_entropy(reference(x), y).backward()
    gradient = torch.where(mask, masked_weights(reference)["0.weight"].weight.grad, 0.0)
    twin = nn.Parameter(before.clone())
    alone = adamw([twin])
    alone.state[twin] = {"exp_avg": first, "exp_avg_sq": second, "step": steps}
    twin.grad = gradient
    alone.step()
    run.go(run.step + 1)
    now = weight.weight.detach()
    assert torch.equal(now[mask], twin.detach()[mask]) and (now[mask] != before[mask]).any()
    dense = masked_weights(reference)["0.weight"].weight.grad
    expected = ThetaAdamW().step(before, torch.where(mask, 0.0, dense), ~mask, {}, 0.01)
    assert torch.equal(now[~mask], expected[~mask])
    assert not run.optimizer.state[weight.weight]["exp_avg"][~mask].any()


@pytest.mark.parametrize("train_rest", [True, False])
def test_the_rest_trains_where_it_should(train_rest):
    run = Run(RESU.frozen(sparsity=0.8, cycles=1, train_rest=train_rest, distribution=Uniform())).to_phase(0)
    names = ("0.bias", "1.weight", "1.bias", "3.bias")
    before = {name: run.model.get_parameter(name).detach().clone() for name in names}
    statistics = run.model[1].running_mean.clone()
    run.go(run.step + 3)
    for name, value in before.items():
        assert torch.equal(run.model.get_parameter(name), value) is not train_rest
    assert not torch.equal(run.model[1].running_mean, statistics)
    run.optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_losers_and_untrained_positions_hold_zeros():
    method = RESU.frozen(sparsity=0.6, cycles=2, schedule=(0.6, 0.6), subset=CyclicDead(3), distribution=Uniform())
    run = Run(method).to_phase(0)
    for step in range(run.cycles[0].enter, run.cycles[0].end):
        for name, unit in run.units().items():
            untrained = ~unit.weight.mask & ~unit.trainable
            assert untrained.any() and unit.trainable.any()
            assert not run.weights()[name][untrained].any()
        run.go(step + 1)
    assert_zero_dead(run)
    trained = {row.name: row.trained for row in run.handle.report().resurrections}
    assert trained == {
        name: len(range(0, int((~mask).sum()), 3)) for name, mask in run.masks().items()
    }  # cycle 0 of the period


def test_the_gradient_subset_is_that_of_the_batch_at_whose_end_the_phase_begins():
    method = RESU.frozen(sparsity=0.6, cycles=1, subset=TopGradient(0.25), distribution=Uniform())
    run = Run(method)
    run.go(run.cycles[0].enter - 1)
    dense = copy.deepcopy(run.model)
    dense[0].weight_mask.fill_(True)  # the dead stand at zero, so the forward is the same and the gradient is dense
    x, y = batch(run.step)
    nn.functional.cross_entropy(dense(x), y).backward()
    gradient = dense[0].weight.grad.abs()
    run.go(run.step + 1)
    unit = run.units()["0.weight"]
    dead = (~unit.weight.mask).flatten().nonzero().flatten().tolist()
    best = sorted(dead, key=lambda i: (-float(gradient.flatten()[i]), i))[: int(0.25 * len(dead) + 1e-6)]
    assert unit.trainable.flatten().nonzero().flatten().tolist() == sorted(best)


def test_an_alive_weight_at_zero_is_no_dead_one():
    run = Run(RESU.frozen(sparsity=0.5, cycles=1, distribution=Uniform()))
    run.go(run.cycles[0].prune)
    weight = masked_weights(run.model)["0.weight"]
    position = tuple(weight.mask.nonzero()[0].tolist())
    with torch.no_grad():
        weight.weight[position] = 0.0
    run.go(run.step + 1)
    assert weight.weight[position] != 0


# Settings have effects


def test_every_rule_moves_theta_by_its_own_steps():
    rules = (
        ThetaSGD(lr=0.05),
        ThetaSGD(lr=0.1),
        ThetaMomentum(lr=0.05),
        ThetaAdamW(),
        ThetaAdamW(weight_decay=0.5),
        Selective(lr=0.05),
        ThetaOptimizer(kind=torch.optim.RMSprop, lr=1e-3),
    )
    ends = []
    for rule in rules:
        run = Run(RESU.frozen(sparsity=0.7, cycles=1, theta=rule, distribution=Uniform())).to_phase(0)
        start = run.weights()["0.weight"]
        run.go(run.cycles[0].end - 1)
        ends.append(run.weights()["0.weight"])
        assert not torch.equal(ends[-1], start)
    assert all(not torch.equal(one, other) for i, one in enumerate(ends) for other in ends[:i])


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.5},
        {"init": fxsparse.nn.ThetaInit.UNIFORM},
        {"seed": 1},
        {"prune": Gradient()},
        {"prune": Wanda()},
        {"score": Taylor()},
        {"score": Wanda()},
        {"budget": (0.4, 0.4)},
        {"refine": DSNoT(tolerance=0.0)},
        {"lengths": Lengths(0.3, 0.1, 0.6)},
        {"freeze_active": False},
        {"calibration": 1, "prune": Gradient()},
    ],
    ids=str,
)
def test_every_setting_is_binding(change):
    base = {"sparsity": 0.7, "cycles": 2, "distribution": Uniform(), "schedule": (0.4, 0.7)}
    if "calibration" in change:
        base["prune"] = Gradient()
    plain, changed = Run(RESU.frozen(**base)).go(TOTAL), Run(RESU.frozen(**{**base, **change})).go(TOTAL)
    assert any(not torch.equal(one, changed.weights()[name]) for name, one in plain.weights().items())


@pytest.mark.parametrize(
    "pattern",
    [Unstructured(), SharedSupport(4), Block(2, 2), ConstantFanIn(), NByM(2, 4, exact=False)],
    ids=str,
)
@pytest.mark.parametrize("freeze", [True, False])
def test_every_pattern_through_a_whole_training(pattern, freeze):
    run = Run(
        RESU.frozen(
            sparsity=0.6, cycles=2, pattern=pattern, distribution=Uniform(), freeze_active=freeze, budget=(0.3, 0.2)
        )
    ).go(TOTAL)
    for name, weight in masked_weights(run.model).items():
        pattern.check(weight.mask)
        assert not weight.mask.all(), name
    report = run.handle.report()
    assert sum(row.won for row in report.resurrections) > 0
    assert all(row.won == row.displaced for row in report.resurrections)
    assert_zero_dead(run)


def test_an_exact_n_by_m_has_nothing_to_resurrect_and_says_so():
    run = Run(RESU.frozen(sparsity=0.5, cycles=2, pattern=NByM(2, 4), distribution=Uniform()))
    with pytest.warns(UserWarning, match="nothing to resurrect"):
        run.go(TOTAL)
    assert all(row.trained == row.won == 0 for row in run.handle.report().resurrections)
    for weight in masked_weights(run.model).values():
        NByM(2, 4).check(weight.mask)


def test_shared_positions_are_resurrected_for_their_group():
    run = Run(RESU.frozen(sparsity=0.5, cycles=1, pattern=SharedSupport(4), distribution=Uniform(), budget=(0.5, 0.5)))
    run.to_phase(0)
    before = run.masks()
    run.go(run.cycles[0].end)
    for name, mask in run.masks().items():
        new = mask & ~before[name]
        assert new.any()
        for group in new.split(4):
            assert torch.equal(group, group[:1].expand_as(group))


# Reports


def test_the_report_counts_what_happened():
    run = Run(RESU.frozen(sparsity=0.8, cycles=3, schedule=(0.4, 0.6, 0.8), distribution=Uniform(), budget=(0.3, 0.1)))
    revived: dict[str, torch.Tensor] = {}
    rows = iter([])
    for cycle in run.cycles:
        run.to_phase(cycle.index)
        start = run.weights()
        run.go(cycle.end - 1)
        before = run.masks()
        run.go(cycle.end)
        rows = [row for row in run.handle.report().resurrections if row.cycle == cycle.index]
        assert [row.name for row in rows] == list(before)
        for row in rows:
            mask, old = run.masks()[row.name], before[row.name]
            won = mask & ~old
            assert (row.step, row.alive, row.trained, row.won) == (
                cycle.end, int(mask.sum()), int((~old).sum()), int(won.sum()),
            )  # fmt: skip
            assert row.displaced == int((old & ~mask).sum()) and row.lost == row.trained - row.won
            earlier = revived.get(row.name, torch.zeros_like(mask))
            assert (row.earlier, row.survived) == (int(earlier.sum()), int((earlier & mask).sum()))
            assert row.won == int(run.handle.method.budget_at(cycle.phase) * row.alive + 1e-6) > 0
            revived[row.name] = won
            assert row.movement > 0 and start[row.name][~old].any()
    table = str(run.handle.report()).split("\n\n")[1].splitlines()
    assert table[0].split()[-2:] == ["survived", "mu"] and len(table) == 1 + 2 * 3


def test_movement_from_zero_is_measured_against_the_alive_weights(recwarn):
    method = RESU.frozen(sparsity=0.8, cycles=1, distribution=Uniform(), theta=ThetaSGD(lr=0.02), init=ThetaInit.ZERO)
    run = Run(method).to_phase(0)
    mask = run.masks()
    run.go(run.cycles[0].end - 1)
    held = run.weights()
    x, y = batch(run.step)
    run.optimizer.zero_grad()
    nn.functional.cross_entropy(run.model(x), y).backward()
    ends = {name: held[name] - 0.02 * masked_weights(run.model)[name].weight.grad for name in held}
    run.go(run.cycles[0].end)
    for row in run.handle.report().resurrections:
        alive = mask[row.name]
        ratio = ends[row.name][~alive].pow(2).mean().sqrt() / held[row.name][alive].pow(2).mean().sqrt()
        assert row.movement == pytest.approx(float(ratio), rel=1e-5) and row.movement < 0.1
    assert not [w for w in recwarn if "hardly moved" in str(w.message)]  # a small theta is no draw


def test_movement_is_measured_from_the_draw():
    run = Run(RESU.frozen(sparsity=0.8, cycles=1, distribution=Uniform(), theta=ThetaSGD(lr=0.3))).to_phase(0)
    start, mask = run.weights(), run.masks()
    run.go(run.cycles[0].end - 1)
    held = run.weights()
    x, y = batch(run.step)
    run.optimizer.zero_grad()
    nn.functional.cross_entropy(run.model(x), y).backward()
    ends = {name: held[name] - 0.3 * masked_weights(run.model)[name].weight.grad for name in held}
    run.go(run.cycles[0].end)
    for row in run.handle.report().resurrections:
        dead = ~mask[row.name]
        size, moved = start[row.name][dead].norm(), (ends[row.name] - start[row.name])[dead].norm()
        assert row.movement == pytest.approx(float(moved / size), rel=1e-5)


@pytest.mark.filterwarnings("default:theta hardly moved:UserWarning")
def test_theta_that_hardly_moves_is_reported():
    run = Run(RESU.frozen(sparsity=0.8, cycles=1, distribution=Uniform(), theta=ThetaSGD(lr=1e-6)))
    with pytest.warns(UserWarning, match=r"theta hardly moved in cycle 0 .*0\.weight, 3\.weight"):
        run.go(run.cycles[0].end)
    assert all(row.won > 0 and row.movement < 1e-3 for row in run.handle.report().resurrections)  # by quota alone
    control = Run(RESU.frozen(sparsity=0.8, cycles=1, distribution=Uniform(), theta=ThetaSGD(lr=0.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        control.go(control.cycles[0].end)  # the control arm asked for it
    assert all(row.movement == 0 for row in control.handle.report().resurrections)


# Densification and pauses


def test_densification_loses_nothing_and_ends_dense():
    run = Run(Densify(path=(0.7, 0.4, 0.0), distribution=Uniform()))
    previous = run.masks()
    assert all(int(mask.sum()) == fxsparse.sparsity.keep_count(mask.numel(), 0.7) for mask in previous.values())
    x = batch(99)[0]
    for cycle in run.cycles:
        run.go(cycle.end - 1)
        held = run.weights()
        run.go(cycle.end)
        for name, mask in run.masks().items():
            assert not (previous[name] & ~mask).any()
            assert torch.equal(run.weights()[name][previous[name]], held[name][previous[name]])
        previous = run.masks()
    assert all(unit.mode is Mode.DENSE for unit in run.units().values())
    run.model.eval()
    dense = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)).eval()
    dense.load_state_dict({k: v for k, v in run.model.state_dict().items() if k in dense.state_dict()})
    assert torch.equal(run.model(x), dense(x))  # every theta is in


@pytest.mark.parametrize(
    "pattern",
    [Unstructured(), SharedSupport(4), Block(2, 2), ConstantFanIn(), NByM(2, 4, exact=False), NByM(1, 4, exact=False)],
    ids=str,
)
def test_every_pattern_becomes_denser(pattern):
    least = 1 - pattern.n / pattern.m if isinstance(pattern, NByM) else 0.25
    method = Densify(path=(0.9, 0.8, least), sparsity=least, pattern=pattern, distribution=Uniform())
    run, before = Run(method), None
    for cycle, wanted in zip(run.cycles, (0.8, least), strict=True):
        run.go(cycle.end)
        now = run.masks()
        for name, weight in masked_weights(run.model).items():
            pattern.check(now[name])
            units = pattern.units(now[name].shape)
            assert int(now[name].sum()) == units.alive_elements(Target.of(now[name].numel(), wanted)), name
            assert before is None or not (before[name] & ~now[name]).any()
            assert bool(weight.weight[now[name]].all())  # what came alive carries its theta
        before = now
    assert_zero_dead(run)


@pytest.mark.parametrize(("pattern", "sparsity"), [(NByM(2, 4), 0.5), (NByM(1, 4, exact=False), 0.8)], ids=str)
def test_a_full_group_trains_all_of_its_dead_on_the_way_to_a_dense_weight(pattern, sparsity):
    run = Run(Densify(path=(sparsity, 0.0), pattern=pattern, distribution=Uniform())).go(TOTAL)
    rows = run.handle.report().resurrections
    assert all(row.trained == row.won > 0 and row.alive == row.numel for row in rows) and len(rows) == 2
    assert all(bool(weight.all()) for weight in run.weights().values())


def test_pauses_run_in_sparse_mode_under_the_masked_rule():
    seen = []

    def tune(model: nn.Module, cycle: int) -> None:
        before = run.masks()
        assert all(unit.mode is Mode.SPARSE for unit in run.units().values()) and torch.is_grad_enabled()
        state = copy.deepcopy(run.handle.state_dict())
        for step in range(3):
            run.optimizer.zero_grad()
            x, y = batch(1000 + step)
            nn.functional.cross_entropy(model(x), y).backward()
            run.optimizer.step()
            assert_zero_dead(run)
        assert all(torch.equal(mask, before[name]) for name, mask in run.masks().items())
        assert run.handle.step == state["step"]
        seen.append((cycle, run.handle.step))

    method = RESU.frozen(
        sparsity=0.8,
        cycles=3,
        schedule=(0.4, 0.6, 0.8),
        distribution=Uniform(),
        pauses=(0, 2),
        prune=Taylor(),
        calibration=50,  # the steps of a pause are no calibration, though every step of TRAIN is
    )
    run = Run(method)
    run.handle.on_pause(tune)
    run.go(TOTAL)
    assert seen == [(0, run.cycles[0].end), (2, run.cycles[2].end)] and run.handle.step == TOTAL


def test_a_pause_must_leave_masks_and_zeros_alone():
    def spoil_zeros(model: nn.Module, cycle: int) -> None:
        with torch.no_grad():
            model[0].weight.fill_(1.0)

    def spoil_masks(model: nn.Module, cycle: int) -> None:
        fxsparse.set_masks(model, {"0.weight": torch.ones(16, 12, dtype=torch.bool)})

    for spoil, message in ((spoil_zeros, "wrote dead entries of 0.weight"), (spoil_masks, "changed masks")):
        run = Run(RESU.frozen(sparsity=0.8, cycles=1, distribution=Uniform(), pauses=(0,)))
        run.handle.on_pause(spoil)
        with pytest.raises(DataError, match=message):
            run.go(TOTAL)
    run = Run(RESU.frozen(sparsity=0.8, cycles=1, distribution=Uniform(), pauses=(0,)))
    with pytest.warns(UserWarning, match="on_pause"):
        run.go(TOTAL)


# The end of a life


def test_detach_in_a_phase_discards_theta_and_leaves_nothing():
    run = Run().to_phase(1, 1)
    kept = run.masks()
    run.handle.detach()
    assert set(run.model.state_dict()) == {
        *net().state_dict(),
    } and all(torch.equal(mask, kept[name]) for name, mask in run.masks().items())
    assert_zero_dead(run)
    fxsparse.finalize(run.model)
    hooks = [weight.weight._post_accumulate_grad_hooks for weight in masked_weights(run.model).values()]
    assert not any(hooks)


def test_the_model_is_folded_while_the_handle_lives_but_not_in_a_phase():
    run = Run().go(TOTAL)
    assert list(fxsparse.finalize(run.model).state_dict()) == [k for k in net().state_dict() if "_mask" not in k]
    run = Run().to_phase(1)
    with pytest.raises(fxsparse.FxSparseError, match="resurrection phase"):
        fxsparse.finalize(run.model)
    with pytest.raises(ConfigError, match="resurrection phase"):
        fxsparse.set_masks(run.model, run.masks())


def test_nothing_keeps_a_model_alive():
    run = Run(RESU.frozen(sparsity=0.8, cycles=3, score=Wanda(), prune=Taylor(), distribution=Uniform())).to_phase(1, 1)
    reference = weakref.ref(run.model)
    del run
    gc.collect()
    assert reference() is None
