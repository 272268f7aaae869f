"""What a plan was shown to do is not shown anew, unless anything has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsparse.passes import compact_channels as passes
from fxsparse.passes.compact_again import state_of
from fxsparse.planning.compaction import compact, compaction_report
from fxsparse.planning.prune_budgets import ChannelBudget
from fxsparse.planning.prune_channels import plan_channels
from tests.passes.compact_networks import CASES, Case, build


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)
        self.last, self.scale, self.steps = nn.Conv2d(8, 5, 1), 2.0, [1, {"by": 3}]
        self.extra = torch.full((), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.conv(x)))) * self.scale * self.steps[1]["by"] + self.extra


def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    nn.init.normal_(model.norm.weight)
    return model.eval(), x


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The runs for comparisons: whether in train mode."""
    seen: list[bool] = []
    real = passes.outputs

    def outputs(model: nn.Module, args: Any, kwargs: Any, training: bool, *rest: Any) -> list[Tensor]:
        seen.append(training)
        return real(model, args, kwargs, training, *rest)

    monkeypatch.setattr(passes, "outputs", outputs)
    return seen


def test_a_plan_compares_four_runs_and_its_application_none(runs: list[bool]) -> None:
    model, x = net()
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    assert runs == [False, True, False, True]  # the model and the smaller one, in both modes
    small = plan.apply()
    assert len(runs) == 4
    expected, found = plan.masked()(x), small(x)
    assert float((expected - found).detach().abs().max()) <= 1e-12 * float(expected.detach().abs().max())
    assert torch.equal(plan.apply()(x), found) and len(runs) == 4


def test_compaction_compares_four_runs(runs: list[bool]) -> None:
    model, x = net()
    with torch.no_grad():
        model.conv.weight[:4], model.norm.weight[:4] = 0.0, 0.0
    assert compact(model, (x,)).get_parameter("conv.weight").shape[0] == 4
    assert runs == [False, True, False, True]


def weights(model: Net, x: Tensor) -> None:
    model.conv.weight.data[3, 1, 1, 1] += 1e-3  # tells no version counter


def buffers(model: Net, x: Tensor) -> None:
    model.norm.running_mean.add_(1e-3)


def inputs(model: Net, x: Tensor) -> None:
    x[0, 0, 0, 0] = 7.0


def options(model: Net, x: Tensor) -> None:
    model.act.negative_slope = 0.2


def numbers(model: Net, x: Tensor) -> None:
    model.scale = 2.5


def nested(model: Net, x: Tensor) -> None:
    model.steps[1]["by"] = 4  # type: ignore[index]


def modules(model: Net, x: Tensor) -> None:
    model.act = nn.Tanh()  # type: ignore[assignment]


def plain_tensors(model: Net, x: Tensor) -> None:
    model.extra = torch.full((), 0.25)


CHANGES: tuple[Callable[[Net, Tensor], None], ...] = (
    weights, buffers, inputs, options, numbers, nested, modules, plain_tensors,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_has_changed_is_compared_anew(change: Callable[[Net, Tensor], None], runs: list[bool]) -> None:
    model, x = net()
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    before = state_of(model, (x,))
    change(model, x)
    assert state_of(model, (x,)) != before
    small = plan.apply()
    assert len(runs) == 8
    expected, found = plan.masked().eval()(x).detach(), small.eval()(x).detach()
    assert float((expected - found).abs().max()) <= 1e-12 * float(expected.abs().max())


def test_modes_gradients_and_other_plans_are_no_change(runs: list[bool]) -> None:
    model, x = net()
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    model.train()
    model(x).sum().backward(inputs=list(model.parameters()))
    model.norm.running_mean.copy_(model.norm.running_mean)
    state = state_of(model, (x,))
    other = plan_channels(model, (x,), budget=ChannelBudget(0.75))
    assert state == state_of(model, (x,)) and other.trial is not None
    assert plan.trial is not None and plan.trial.state != state  # the run in train mode moved the statistics
    count = len(runs)
    assert other.apply().training and len(runs) == count


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_ways_give_the_same_model_and_report(case: Case) -> None:
    torch.manual_seed(0)
    model, x = build(case)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    assert plan.trial is not None
    fast, slow = plan.apply(), dataclasses.replace(plan, trial=None).apply()
    states = fast.state_dict(), slow.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    reports = compaction_report(fast), compaction_report(slow)
    assert reports[0].rows == reports[1].rows and reports[0].parameters == reports[1].parameters
    assert reports[0].macs == reports[1].macs and reports[0].worst <= 1e-12
    own = {parameter.untyped_storage().data_ptr() for parameter in fast.parameters()}
    assert not own & {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def test_a_trial_holds_no_copy_of_the_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).double()
    plan = plan_channels(model, (torch.randn(4, 64).double(),), budget=ChannelBudget(0.5))
    assert plan.trial is not None and not list(plan.trial.found.module.parameters())
    assert not plan.trial.found.solution.sinks and not plan.trial.found.solution.folds


def test_a_model_that_draws_differently_each_time_has_a_state_and_one_that_cannot_be_read_has_none() -> None:
    model = nn.Linear(3, 2)
    assert state_of(model, (torch.zeros(1, 3),)) == state_of(model, (torch.zeros(1, 3),))
    assert state_of(model, (torch.zeros(1, 3),)) != state_of(model, (torch.zeros(3, 1),))
    assert state_of(model, (torch.zeros(1, 3),)) != state_of(model, (torch.zeros(1, 3, dtype=torch.int32),))
    assert state_of(model, ((), {"x": torch.zeros(1, 3)})) != state_of(model, ((), {"y": torch.zeros(1, 3)}))
    assert state_of(model, (1,)) != state_of(model, (2,))
    assert state_of(model, (torch.zeros(1, 3, device="meta"),)) is None
    model.register_buffer("own", torch.zeros(2).to_sparse())
    assert state_of(model, (torch.zeros(1, 3),)) is None
