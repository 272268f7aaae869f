"""Saving at any step and going on equals the uninterrupted run, bit for bit."""

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
from fxsparse.nn import Conv2d, Linear
from fxsparse.sparsity import DropKind, SharedSupport
from fxsparse.training import GMP, SET, Normal, RigL, Static, attach
from fxsparse.training.snapshot import Snapshot

# a scheduler's copy warns when no step was taken before it was copied, with or without a handle
pytestmark = pytest.mark.filterwarnings("ignore:Seems like `optimizer.step:UserWarning")

METHODS = {
    "static": Static(sparsity=0.8),
    "set": SET(sparsity=0.8, every=3, grown=Normal(0.05)),
    "set, positions": SET(sparsity=0.5, every=2, alpha=0.5, pattern=SharedSupport(2)),
    "rigl": RigL(sparsity=0.8, every=3),
    "rigl, every step": RigL(sparsity=0.8, every=1, decay=DropKind.LINEAR, replaces_step=False),
    "gmp": GMP(sparsity=0.8, every=2),
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
}
TOTAL = 16


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


class Run:
    """A user's loop: model, optimizer, handle, scheduler, scaler."""

    def __init__(self, method, optimizer, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = nn.Sequential(
                Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), Linear(64, 10), nn.ReLU(), Linear(10, 4)
            )
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.handle = attach(self.model, self.optimizer, METHODS[method], TOTAL)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, TOTAL)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=5)

    def go(self, start: int, end: int) -> None:
        for step in range(start, end):
            self.optimizer.zero_grad()
            x, y = data(step)
            for part in range(2):
                loss = nn.functional.cross_entropy(self.model(x[part::2]), y[part::2]) / 2
                self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()

    def parts(self):
        return (self.model, self.optimizer, self.handle, self.scheduler, self.scaler)

    def __deepcopy__(self, memo):
        new = Run.__new__(Run)
        names = ("model", "optimizer", "handle", "scheduler", "scaler")
        for name, part in zip(names, copy.deepcopy(self.parts(), memo), strict=True):
            setattr(new, name, part)
        return new


def assert_equal(one: Run, other: Run) -> None:
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    for key, state in one.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            found = other.optimizer.state_dict()["state"][key][name]
            assert value is found is None or torch.equal(value, found), (key, name)
    assert Snapshot.of(one.handle.state_dict()).values == Snapshot.of(other.handle.state_dict()).values
    kept, found = (Snapshot.of(run.handle.state_dict()).tensors for run in (one, other))
    assert kept.keys() == found.keys() and all(torch.equal(kept[key], found[key]) for key in kept)
    assert one.handle.report() == other.handle.report()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.sampled_from(sorted(OPTIMIZERS)), st.integers(0, TOTAL), st.booleans())
def test_states_saved_and_loaded(method, optimizer, stop, handle_first):
    straight = Run(method, optimizer)
    straight.go(0, TOTAL)
    first = Run(method, optimizer)
    first.go(0, stop)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first.parts()], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    second = Run(method, optimizer, seed=99)  # another start: everything must come from the states
    order = [2, 0, 1, 3, 4] if handle_first else [0, 1, 2, 3, 4]
    for i in order:
        second.parts()[i].load_state_dict(states[i])
    second.go(stop, TOTAL)
    assert_equal(straight, second)
    assert straight.handle.step == TOTAL


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("stop", [0, 2, 3, 5])
def test_copies_and_pickles_of_the_loop(method, stop):
    straight, original = Run(method, "adamw"), Run(method, "adamw")
    straight.go(0, TOTAL)
    original.go(0, stop)
    copied = copy.deepcopy(original)
    unpickled = Run.__new__(Run)
    names = ("model", "optimizer", "handle", "scheduler", "scaler")
    for name, part in zip(names, pickle.loads(pickle.dumps(original.parts())), strict=True):
        setattr(unpickled, name, part)
    assert copied.handle.model is copied.model and copied.handle.optimizer is copied.optimizer
    before = {name: value.clone() for name, value in original.model.state_dict().items()}
    for run in (copied, unpickled):
        run.go(stop, TOTAL)
        assert_equal(straight, run)
    assert all(torch.equal(value, before[name]) for name, value in original.model.state_dict().items())
    assert original.handle.step == stop
    original.go(stop, TOTAL)
    assert_equal(straight, original)


def test_a_detached_handle_stays_detached_in_copies():
    run = Run("set", "sgd")
    run.handle.detach()
    twin = copy.deepcopy(run)
    twin.go(0, 3)
    assert not twin.handle.attached and twin.handle.step == 0


def test_a_copy_of_the_handle_brings_its_own_model():
    run = Run("rigl", "sgd")
    run.go(0, 2)
    twin = copy.deepcopy(run.handle)
    assert twin.model is not run.model and twin.step == 2 and repr(twin) == repr(run.handle)


def test_followers_are_copied_along():
    run = Run("set", "sgd")
    average = torch.optim.swa_utils.AveragedModel(run.model)
    run.handle.follow(average)
    other_average, other = copy.deepcopy((average, run))
    other.go(0, 4)
    assert torch.equal(other_average.module[4].weight_mask, other.model[4].weight_mask)
    assert not torch.equal(other.model[4].weight_mask, run.model[4].weight_mask)


def test_a_state_of_another_method_is_refused_and_changes_nothing():
    state = Run("rigl", "sgd").handle.state_dict()
    run = Run("set", "sgd")
    run.go(0, 2)
    before = run.handle.state_dict()
    with pytest.raises(ConfigError, match="not of this handle .*SET"):
        run.handle.load_state_dict(state)
    with pytest.raises(ConfigError, match="lacks masks"):
        run.handle.load_state_dict({key: value for key, value in before.items() if key != "masks"})
    assert Snapshot.of(run.handle.state_dict()).values == Snapshot.of(before).values


def test_a_state_without_its_masks_raises_at_the_next_step():
    first = Run("set", "sgd")
    first.go(0, 4)
    second = Run("set", "sgd")
    second.handle.load_state_dict(first.handle.state_dict())
    with pytest.raises(DataError, match="load the model's state_dict"):
        second.go(4, 5)


@pytest.mark.parametrize("name", METHODS)
def test_attached_with_a_state(name):
    run = Run(name, "adamw")
    run.go(0, 7)
    again = Run.__new__(Run)
    again.model = copy.deepcopy(run.model)
    again.optimizer = OPTIMIZERS["adamw"](again.model.parameters())
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    again.handle = attach(again.model, again.optimizer, METHODS[name], TOTAL, state=run.handle.state_dict())
    again.scheduler, again.scaler = copy.deepcopy(run.scheduler), copy.deepcopy(run.scaler)
    again.scheduler.optimizer = again.optimizer
    run.go(7, TOTAL)
    again.go(7, TOTAL)
    assert str(run.handle.report()) == str(again.handle.report())
    for one, other in zip(run.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ConfigError, match="drives"):
        attach(again.model, again.optimizer, METHODS[name], TOTAL, state=run.handle.state_dict())
