"""Dead weights and state are zero after every step, whoever writes them; nobody writes, nothing is written."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.nn import MaskedWeight
from fxsparse.training.upkeep import KEEP_ZEROS

STEPS = 4


class Run:
    """A small masked training."""

    def __init__(self, make, method=None) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 5))
        self.model = fxsparse.transform(model, (torch.randn(2, 30),))
        self.optimizer = make(self.model.parameters())
        self.handle = fxsparse.attach(self.model, self.optimizer, method or fxsparse.Static(sparsity=0.8), 100)

    def step(self, seed: int = 0, after_backward=None, **kwargs) -> None:
        self.optimizer.zero_grad()
        x = torch.randn(8, 30, generator=torch.Generator().manual_seed(seed))
        self.model(x).square().mean().backward()
        if after_backward is not None:
            after_backward()
        self.optimizer.step(**kwargs)

    def weights(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        masks = fxsparse.masks(self.model)
        return [(self.model.get_parameter(name), mask) for name, mask in masks.items()]

    def check(self) -> None:
        for weight, mask in self.weights():
            for each in (weight, *self.optimizer.state[weight].values()):
                if isinstance(each, torch.Tensor) and each.shape == weight.shape:
                    assert not bool(each[~mask].any())


MAKERS = (
    partial(torch.optim.SGD, lr=0.1),
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    partial(torch.optim.AdamW, lr=0.1, amsgrad=True),
    partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.1),
    partial(torch.optim.Adadelta, lr=0.1),
    partial(torch.optim.NAdam, lr=0.1),
    partial(torch.optim.RAdam, lr=0.1),
    partial(torch.optim.Adam, lr=0.1, eps=0.0),
    partial(torch.optim.Adamax, lr=0.1),
    partial(torch.optim.Rprop, lr=0.1),
)
NAMES = [f"{make.func.__name__}{i}" for i, make in enumerate(MAKERS)]


def noise(run: Run) -> None:
    for weight, _ in run.weights():
        weight.grad.add_(1.0)


def hidden_noise(run: Run) -> None:
    for weight, _ in run.weights():
        weight.grad.data.add_(1.0)


def overwrite(run: Run) -> None:
    with torch.no_grad():
        for weight, mask in run.weights():
            weight[tuple((~mask).nonzero()[0])] = 1.0


def overwrite_data(run: Run) -> None:
    for weight, _ in run.weights():
        weight.data.normal_()


def replace_data(run: Run) -> None:
    for weight, _ in run.weights():
        weight.data = torch.randn_like(weight)


def foreign_state(run: Run) -> None:
    state = copy.deepcopy(run.optimizer.state_dict())
    for each in state["state"].values():
        for key, value in each.items():
            if isinstance(value, torch.Tensor) and value.ndim > 0:
                each[key] = torch.ones_like(value)
    run.optimizer.load_state_dict(state)


def written_state(run: Run) -> None:
    with torch.no_grad():
        for weight, _ in run.weights():
            for value in run.optimizer.state[weight].values():
                if isinstance(value, torch.Tensor) and value.ndim > 0:
                    value.add_(1.0)


def other_masks(run: Run) -> None:
    masks = {name: torch.roll(mask, 1, 0) for name, mask in fxsparse.masks(run.model).items()}
    fxsparse.set_masks(run.model, masks)


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
@pytest.mark.parametrize(
    "write", [noise, hidden_noise, overwrite, overwrite_data, replace_data, foreign_state, written_state, other_masks]
)
@pytest.mark.parametrize("moment", ["before the step", "after backward"])
def test_whoever_writes_dead_entries_are_zero_after_the_step(make, write, moment: str) -> None:
    run = Run(make)
    for seed in range(STEPS):
        run.step(seed)
        run.check()
    if moment == "after backward":
        run.step(STEPS, lambda: write(run))
    elif write not in (noise, hidden_noise):
        write(run)
        run.step(STEPS)
    for seed in range(2):
        run.check()
        run.step(seed)
    run.check()


def test_nothing_is_written_where_nobody_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list = []
    original = MaskedWeight.apply_
    monkeypatch.setattr(MaskedWeight, "apply_", lambda self: written.append(self.name) or original(self))
    run = Run(MAKERS[1])
    counts = []
    for seed in range(5):
        written.clear()
        run.step(seed)
        counts.append(len(written))
    assert counts == [2, 0, 0, 0, 0]
    written.clear()
    run.step(0, closure=lambda: torch.zeros(()))
    assert len(written) == 2


def test_only_optimizers_that_keep_zeros_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for each in group["params"]:
                        each.add_(0.1)

    assert Noisy not in KEEP_ZEROS
    run = Run(partial(Noisy, lr=0.1))
    for seed in range(STEPS):
        run.step(seed)
        run.check()


def test_updates_go_on_as_ever() -> None:
    run = Run(MAKERS[2], fxsparse.RigL(sparsity=0.8, every=2))
    for seed in range(9):
        run.step(seed)
        run.check()
    assert run.handle.updates == 4
