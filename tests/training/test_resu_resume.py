"""RESU saved at any step goes on as if nothing had happened, bit for bit; what does not fit is refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import Mode, masked_weights
from fxsparse.sparsity import Uniform
from fxsparse.sparsity.saliency import Taylor, Wanda
from fxsparse.training import RigL, attach, make_loadable
from fxsparse.training.densify import Densify
from fxsparse.training.dsnot import DSNoT
from fxsparse.training.handle import Handle
from fxsparse.training.resu import RESU
from fxsparse.training.resu_phases import Phase
from fxsparse.training.resu_subset import RandomDead, TopGradient
from fxsparse.training.resu_theta import Selective, ThetaMomentum, ThetaOptimizer
from fxsparse.training.snapshot import Snapshot
from tests.training.resu_run import TOTAL, Run, adamw, assert_zero_dead, net

pytestmark = pytest.mark.filterwarnings("ignore:theta hardly moved:UserWarning")

METHODS = {
    "default": RESU(sparsity=0.8, cycles=3, distribution=Uniform(), rise=2),
    "frozen": RESU.frozen(sparsity=0.8, cycles=3, distribution=Uniform()),
    "selective, random": RESU.frozen(sparsity=0.8, cycles=2, theta=Selective(lr=0.05), subset=RandomDead(0.5)),
    "momentum, by gradient": RESU.frozen(
        sparsity=0.8, cycles=2, theta=ThetaMomentum(lr=0.05), subset=TopGradient(0.5), score=Taylor(), prune=Taylor()
    ),
    "wanda, unfrozen": RESU.frozen(
        sparsity=0.7, cycles=2, prune=Wanda(), score=Wanda(), freeze_active=False, refine=DSNoT()
    ),
    "kept state, any optimizer": RESU.frozen(
        sparsity=0.7, cycles=2, keep_state=True, theta=ThetaOptimizer(kind=torch.optim.RMSprop, lr=1e-3)
    ),
    "densify": Densify(path=(0.7, 0.4, 0.1), sparsity=0.1),
}


def states(run: Run) -> bytes:
    stream = io.BytesIO()
    torch.save([run.model.state_dict(), run.optimizer.state_dict(), run.handle.state_dict()], stream)
    return stream.getvalue()


def resumed(run: Run, saved: bytes, order: tuple[int, ...] = (0, 1, 2)) -> Run:
    again = Run(run.method, model=net(seed=7))
    parts = torch.load(io.BytesIO(saved), weights_only=True)
    for index in order:
        (again.model, again.optimizer, again.handle)[index].load_state_dict(parts[index])
    again.step = run.step
    return again


def assert_same(one: Run, other: Run) -> None:
    for (name, value), (other_name, expected) in zip(
        one.model.state_dict().items(), other.model.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(value, expected), name
    ours, theirs = (Snapshot.of([run.optimizer.state_dict(), run.handle.state_dict()]) for run in (one, other))
    assert ours.values == theirs.values
    assert all(torch.equal(value, theirs.tensors[name]) for name, value in ours.tensors.items())


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(sorted(METHODS)), stop=st.integers(1, TOTAL - 1), order=st.permutations([0, 1, 2]))
def test_killed_and_resumed_at_any_step(name, stop, order):
    run = Run(METHODS[name]).go(stop)
    again = resumed(run, states(run), tuple(order))
    assert again.handle.phase is run.handle.phase
    run.go(TOTAL)
    again.go(TOTAL)
    assert_same(run, again)
    assert [row for row in map(str, run.handle.report())] == [row for row in map(str, again.handle.report())]
    assert str(run.handle.report()) == str(again.handle.report())


@pytest.mark.parametrize("name", METHODS)
def test_killed_and_resumed_in_every_phase_of_every_method(name):
    run = Run(METHODS[name])
    cycle = run.cycles[-1]
    for stop in (cycle.prune - 1, cycle.prune, cycle.enter, cycle.enter + 1, cycle.end - 1, cycle.end):
        run.go(stop)
        saved = states(run)
        again = resumed(run, saved).go(stop + 3)
        through = resumed(run, saved)  # from another fresh process
        assert_same(through.go(stop + 3), again)
        reference = Run(METHODS[name]).go(stop + 3)
        assert_same(reference, again)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
@pytest.mark.parametrize("name", ["momentum, by gradient", "wanda, unfrozen"])
def test_copies_go_on_alike(duplicate, name):
    run = Run(METHODS[name]).to_phase(1, 1)
    twin = Run.__new__(Run)
    twin.model, twin.optimizer, twin.handle = duplicate((run.model, run.optimizer, run.handle))
    twin.step, twin.method = run.step, run.method
    run.go(TOTAL)
    twin.go(TOTAL)
    assert_same(run, twin)


def test_a_snapshot_of_tensors_is_enough():
    """Loops that copy tensors back in place never call `load_state_dict` of the model."""
    run = Run(METHODS["default"]).to_phase(1, 1)
    tensors = {name: value.clone() for name, value in run.model.state_dict().items()}
    optimizer, handle = copy.deepcopy(run.optimizer.state_dict()), copy.deepcopy(run.handle.state_dict())
    again = Run(METHODS["default"], model=net(seed=7))
    with torch.no_grad():
        for name, value in again.model.state_dict().items():
            value.copy_(tensors[name])
    again.optimizer.load_state_dict(optimizer)
    again.handle.load_state_dict(handle)
    again.step = run.step
    assert_same(run.go(TOTAL), again.go(TOTAL))


def test_rewinding_out_of_a_phase_and_into_it():
    run = Run(METHODS["default"])
    before = states(run.go(run.cycles[1].prune))
    inside = states(run.to_phase(1, 2))
    end = states(run.go(TOTAL))

    def back(saved: bytes, step: int) -> None:
        parts = torch.load(io.BytesIO(saved), weights_only=True)
        for part, state in zip((run.model, run.optimizer, run.handle), parts, strict=True):
            part.load_state_dict(state)
        run.step = step

    for saved, step in ((inside, run.cycles[1].enter + 2), (before, run.cycles[1].prune)):
        back(saved, step)
        run.go(TOTAL)
        assert_zero_dead(run)
        parts, expected = (torch.load(io.BytesIO(each), weights_only=True) for each in (states(run), end))
        assert all(torch.equal(value, expected[0][name]) for name, value in parts[0].items())


# What does not fit


@pytest.mark.parametrize(
    "key",
    [
        *("phase", "cycle", "theta", "scales", "revived", "resurrections", "averages", "inputs"),
        *("step", "updates", "masks", "method", "targets"),
    ],
)
def test_a_missing_part_is_an_error(key):
    run = Run(METHODS["default"]).to_phase(1, 1)
    state = run.handle.state_dict()
    del state[key]
    with pytest.raises(ConfigError, match=key):
        run.handle.load_state_dict(state)


@pytest.mark.parametrize("key", ["0.weight_mask", "0.weight_alive_mask", "0.weight_trainable", "3.weight_resurrecting"])
def test_a_missing_mask_or_mode_is_an_error(key):
    run = Run(METHODS["default"]).to_phase(1, 1)
    state = run.model.state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match="lacks"):
        run.model.load_state_dict(state, strict=False)


def test_states_of_other_methods_are_refused():
    run = Run(METHODS["default"]).to_phase(1, 1)
    state = run.handle.state_dict()
    others = (
        Run(RESU.frozen(sparsity=0.8, cycles=3, distribution=Uniform(), budget=(0.2, 0.1))),
        Run(METHODS["default"], total=TOTAL + 60),
        Run(RigL(sparsity=0.8)),
    )
    for other in others:
        with pytest.raises(ConfigError, match="not of this handle|lacks"):
            other.handle.load_state_dict(state)
        with pytest.raises(ConfigError, match="not of this handle|lacks"):
            run.handle.load_state_dict(other.handle.state_dict())


def test_states_of_different_moments_are_refused():
    run = Run(METHODS["default"])
    early = Run(METHODS["default"])
    run.to_phase(1, 1)
    handle = run.handle.state_dict()
    early.handle.load_state_dict(handle)  # the model's state is forgotten
    with pytest.raises(DataError, match="load"):
        early.go(1)
    other = Run(METHODS["default"]).to_phase(1, 1)
    other.handle.load_state_dict(Run(METHODS["default"]).go(2).handle.state_dict())
    with pytest.raises(DataError, match="RESU phase"):
        other.go(other.step + 1)


# Bad input of attach


def test_a_model_in_a_phase_takes_no_second_method():
    run = Run(METHODS["default"]).to_phase(1, 1)
    with pytest.raises(ConfigError, match="detach"):
        attach(run.model, run.optimizer, RigL(sparsity=0.8), TOTAL)
    other = adamw(run.model.parameters())
    with pytest.raises(ConfigError):
        attach(run.model, other, RigL(sparsity=0.8), TOTAL)
    with pytest.raises(ConfigError, match="detach"):
        attach(run.model, run.optimizer, METHODS["default"], TOTAL)
    assert run.handle.phase is Phase.RESU and run.go(TOTAL).handle.step == TOTAL


def test_attaching_again_after_detaching():
    run = Run(METHODS["default"]).to_phase(1, 1)
    run.handle.detach()
    again = RESU.frozen(sparsity=0.9, cycles=1, distribution=Uniform())
    run.handle = attach(run.model, run.optimizer, again, TOTAL)
    run.step = 0
    run.go(TOTAL)
    assert_zero_dead(run)
    assert all(float(mask.float().mean()) < 0.11 for mask in run.masks().values())


def test_what_attach_refuses():
    model = net()
    with pytest.raises(ConfigError, match=r"3\.weight"):
        attach(model, adamw([model[0].weight]), METHODS["default"], TOTAL)
    with pytest.raises(ConfigError, match="total_steps"):
        attach(model, adamw(model.parameters()), METHODS["default"])
    with pytest.raises(ConfigError, match="too short"):
        attach(model, adamw(model.parameters()), METHODS["frozen"], 8)
    run = Run(RESU.frozen(sparsity=0.9, cycles=1, distribution=Uniform())).go(TOTAL)
    run.handle.detach()
    with pytest.raises(ConfigError, match="never grows"):
        attach(run.model, run.optimizer, RESU.frozen(sparsity=0.5), TOTAL)
    assert not any("trainable" in name for name in run.model.state_dict())


def test_replaced_parameters_are_named():
    run = Run(METHODS["default"]).to_phase(1, 1)
    run.model[0].weight = nn.Parameter(run.model[0].weight.detach().clone())
    with pytest.raises(ConfigError, match=r"0\.weight"):
        run.go(run.step + 1)


@pytest.mark.parametrize("alive", [0, 1])
def test_layers_that_are_dead_or_nearly_so(alive):
    from fxsparse.nn import set_masks

    model = net()
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask.view(-1)[:alive] = True
    set_masks(model, {"3.weight": mask})
    run = Run(RESU.frozen(sparsity=0.95, cycles=2, distribution=Uniform(), schedule=(0.3, 0.95)), model=model)
    run.go(run.cycles[0].enter)
    unit = run.units()["3.weight"]
    assert unit.mode is Mode.RESU and unit.theta.isfinite().all() and unit.theta.std() > 0
    run.go(TOTAL)
    weight = masked_weights(run.model)["3.weight"]
    assert int(weight.mask.sum()) == alive and weight.weight.isfinite().all()
    assert_zero_dead(run)


def test_zero_gradients_move_nothing_and_choose_by_index():
    run = Run(RESU.frozen(sparsity=0.5, cycles=1, subset=TopGradient(0.5), distribution=Uniform()))
    while run.step < TOTAL:
        run.optimizer.zero_grad()
        (run.model(torch.randn(4, 12)).sum() * 0.0).backward()
        if run.handle.phase is Phase.RESU:
            unit = run.units()["0.weight"]
            dead = (~unit.weight.mask).flatten().nonzero().flatten()
            assert torch.equal(unit.trainable.flatten().nonzero().flatten(), dead[: len(dead) // 2])
        run.optimizer.step()
        run.step += 1
    assert_zero_dead(run)
    assert all(row.movement == 0 for row in run.handle.report().resurrections)


# Attached with a state, as engines resume: model and optimizer are loaded before a handle exists


@pytest.mark.parametrize("name", METHODS)
def test_attached_with_a_state(name):
    run = Run(METHODS[name])
    for stop in (3, run.cycles[-1].enter + 1, run.cycles[-1].end):
        run.go(stop)
        parts = torch.load(io.BytesIO(states(run)), weights_only=True)
        again = Run.__new__(Run)
        again.model, again.method, again.step = net(seed=7), run.method, run.step
        make_loadable(again.model, again.method)
        again.model.load_state_dict(parts[0])
        again.optimizer = adamw(again.model.parameters())
        again.optimizer.load_state_dict(parts[1])
        again.handle = attach(again.model, again.optimizer, again.method, TOTAL, state=parts[2])
        assert_same(run, again)
        assert_same(Run(METHODS[name]).go(stop + 4), again.go(stop + 4))


def test_a_state_that_does_not_fit_changes_nothing():
    run = Run(METHODS["default"]).to_phase(1, 2)
    saved = states(run)
    state = run.handle.state_dict()
    Handle.detach(run.handle)
    before = states(run)
    cut = {key: value for key, value in state.items() if key != "theta"}
    for wrong, total in ((state, TOTAL + 60), (Run(METHODS["frozen"]).handle.state_dict(), TOTAL), (cut, TOTAL)):
        with pytest.raises(ConfigError, match="not of this handle|lacks theta"):
            attach(run.model, run.optimizer, METHODS["default"], total, state=wrong)
        assert states(run) == before == saved
    run.handle = attach(run.model, run.optimizer, METHODS["default"], TOTAL, state=state)
    assert_same(Run(METHODS["default"]).go(TOTAL), run.go(TOTAL))
