"""RESU on real data: theta trains, the loss falls, and what was learnt beats what was drawn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fxsparse.data import digits
from fxsparse.errors import ConfigError
from fxsparse.models import lenet_300_100
from fxsparse.nn import Linear, masked_weights, masks
from fxsparse.planning import transform
from fxsparse.training import RigL
from fxsparse.training.loop import TrainState, evaluate
from fxsparse.training.resu import RESU
from fxsparse.training.resu_phases import Phase
from fxsparse.training.resu_theta import ThetaAdamW
from fxsparse.training.resu_trainer import RESUTrainer
from fxsparse.training.task import Task

DATA = digits(0)
SEEDS = range(6)
T_95 = 2.571  # Student, 5 degrees of freedom, two-sided


def lenet() -> nn.Module:
    return transform(lenet_300_100(64, 10), (DATA.train.inputs[:2],))


def task_of(build=lenet, epochs: int = 12) -> Task:
    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=2e-3)

    return Task(build, DATA.train, DATA.validation, epochs=epochs, batch_size=64, optimizer=adamw)


class Losses:
    """The training loss of every step and, around each event, of the whole training set."""

    def __init__(self, method: RESU, seed: int, build=lenet, epochs: int = 12) -> None:
        self.trainer = RESUTrainer(task_of(build, epochs), method, seed)
        self.at: dict[tuple[str, int], float] = {}
        timeline = self.trainer.handle.method.timeline
        self.wanted = {}
        for cycle in timeline.cycles:
            if cycle.phase is not None:
                names = {"enter": cycle.enter, "last": cycle.end - 1, "commit": cycle.end}
                self.wanted |= {step: (name, cycle.index) for name, step in names.items()}
        self.report = self.trainer.run(on_step=self._note)
        self.final = evaluate(self.trainer.model, DATA.train).loss

    def _note(self, state: TrainState, loss: torch.Tensor) -> None:
        if state.step in self.wanted:
            self.at[self.wanted[state.step]] = evaluate(state.model, DATA.train).loss


def lower_bound(differences: list[float]) -> float:
    values = torch.tensor(differences, dtype=torch.float64)
    return float(values.mean() - T_95 * values.std() / math.sqrt(len(values)))


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), Linear(64, 64), nn.ReLU(), Linear(64, 32), nn.ReLU(), Linear(32, 10))


@pytest.mark.filterwarnings("ignore:theta hardly moved:UserWarning")
def test_learnt_theta_beats_drawn_theta():
    """One cycle at 90 % in which nothing but theta trains, against the same with a learning rate of 0, paired."""
    at_end, after_commit, fell = [], [], []
    for seed in SEEDS:
        runs = []
        for theta in (ThetaAdamW(), ThetaAdamW(lr=0.0)):
            method = RESU.frozen(sparsity=0.9, cycles=1, theta=theta, train_rest=False, budget=(0.1, 0.1), seed=seed)
            runs.append(Losses(method, seed, small, 16))
        trained, drawn = runs
        assert trained.at["enter", 0] == drawn.at["enter", 0]  # the same until theta moves
        assert drawn.at["last", 0] == drawn.at["enter", 0]  # nothing else trains
        fell.append(trained.at["enter", 0] - trained.at["last", 0])
        at_end.append(drawn.at["last", 0] - trained.at["last", 0])
        after_commit.append(drawn.at["commit", 0] - trained.at["commit", 0])
        assert all(row.movement > 0.1 and row.won > 0 for row in trained.report.resurrections)
        assert all(row.movement == 0 and row.won > 0 for row in drawn.report.resurrections)
    assert lower_bound(fell) > 0.1 and lower_bound(at_end) > 0.1
    assert lower_bound(after_commit) > 0.0


def test_a_training_on_digits_heals_after_its_last_commit():
    run = Losses(RESU.frozen(sparsity=0.95), 0)
    falls = [run.at["enter", cycle] - run.at["last", cycle] for cycle in range(1, 5)]
    assert min(falls[1:]) > 0.1  # at the first phase's 48 % there is no loss left to fall
    assert run.final < run.at["commit", 4]
    total = sum(mask.numel() for mask in masks(run.trainer.model).values())
    alive = sum(int(mask.sum()) for mask in masks(run.trainer.model).values())
    assert (
        alive == sum(n - math.floor(0.95 * n + 1e-6) for n in (64 * 300, 300 * 100, 100 * 10)) and alive / total < 0.051
    )
    for weight in masked_weights(run.trainer.model).values():
        assert not weight.weight[~weight.mask].any()
    assert run.trainer.evaluate().accuracy > 0.9


def test_the_trainer_stops_and_goes_on_bit_for_bit():
    task, method = task_of(epochs=4), RESU.frozen(sparsity=0.9, cycles=2)
    whole = RESUTrainer(task, method, 3)
    whole.run()
    first = RESUTrainer(task, method, 3)
    first.run(until=first.handle.method.timeline.cycles[1].enter + 2)
    assert first.phase is Phase.RESU
    second = RESUTrainer(task, method, 4)
    second.restore(first.snapshot())
    report = second.run()
    for (name, value), expected in zip(
        second.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name
    assert str(report) == str(whole.handle.report()) and second.phase is Phase.FINAL


def test_what_the_trainer_refuses():
    with pytest.raises(ConfigError, match="must be a RESU"):
        RESUTrainer(task_of(), RigL(sparsity=0.9))
    with pytest.raises(ConfigError, match="no masks"):
        RESUTrainer(task_of(lambda: lenet_300_100(64, 10)), RESU.frozen(sparsity=0.9))
    task = Task(lenet, DATA.train, None, epochs=2)
    with pytest.raises(ConfigError, match="`validation`"):
        RESUTrainer(task, RESU.frozen(sparsity=0.9, cycles=1)).evaluate()
