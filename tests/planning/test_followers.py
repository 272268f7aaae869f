"""Averages of a model lose the channels that the model loses, and average on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxsparse
from fxsparse.errors import ConfigError
from fxsparse.planning.compaction import compact
from fxsparse.planning.prune_budgets import ChannelBudget
from fxsparse.planning.prune_channels import plan_channels

ALIVE = [0, 2, 5, 6, 7]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)


def trained(sparse: bool) -> tuple[nn.Module, AveragedModel, torch.optim.Optimizer, tuple[Tensor]]:
    torch.manual_seed(0)
    model, x = Net().double(), (torch.randn(8, 5).double(),)
    if sparse:
        model = fxsparse.transform(model, x, include="first")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    train(model, optimizer, average, 3)
    if sparse:
        mask = torch.ones(8, 5, dtype=torch.bool)
        mask[[1, 3, 4]] = False
        fxsparse.set_masks(model, {"first.weight": mask})
    return model, average, optimizer, x


def test_an_average_is_compacted_with_its_model() -> None:
    model, average, optimizer, x = trained(sparse=True)
    model.eval()
    weights = average.module.get_parameter("first.weight").detach().clone()
    second = average.module.get_parameter("second.weight").detach().clone()
    count = average.n_averaged.clone()
    small = compact(model, x, optimizer, followers=average)
    inner = average.module
    assert torch.equal(inner.get_parameter("first.weight"), weights[ALIVE])
    assert torch.equal(inner.get_parameter("second.weight"), second[:, ALIVE])
    assert torch.equal(average.n_averaged, count) and torch.equal(
        fxsparse.masks(inner)["first.weight"], torch.ones(5, 5).bool()
    )
    before = inner.get_parameter("second.weight").detach().clone()
    train(small.train(), optimizer, average, 2)
    assert average.n_averaged == count + 2 and not torch.equal(inner.get_parameter("second.weight"), before)
    assert torch.isfinite(average(x[0])).all()


def test_an_average_computes_what_its_masked_self_computes() -> None:
    model, average, _, x = trained(sparse=True)
    model.eval(), average.eval()
    twin = fxsparse.transform(Net().double(), x, include="first")
    twin.load_state_dict(average.module.state_dict())
    fxsparse.set_masks(twin, {"first.weight": fxsparse.masks(model)["first.weight"]})
    compact(model, x, followers=[average])
    with torch.no_grad():
        expected, found = twin.eval()(x[0]), average(x[0])
    assert float((expected - found).abs().max()) <= 1e-12 * float(expected.abs().max())


def test_an_average_is_pruned_with_its_model() -> None:
    model, average, optimizer, x = trained(sparse=False)
    plan = plan_channels(model, x, budget=ChannelBudget(0.5))
    weights = average.module.first.weight.detach().clone()
    small = plan.apply(optimizer, followers=average)
    kept = [i for i in range(8) if i not in plan.removed["first.weight", 0]]
    assert torch.equal(average.module.get_parameter("first.weight"), weights[kept])
    train(small.train(), optimizer, average, 2)


@pytest.mark.parametrize("follower", [nn.Linear(2, 2), AveragedModel(nn.Linear(5, 8))], ids=["no wrapper", "another"])
def test_what_is_no_average_of_the_model_is_refused_and_nothing_changes(follower: nn.Module) -> None:
    model, average, optimizer, x = trained(sparse=True)
    with pytest.raises(
        ConfigError, match=r"`followers` \(=\w+\) must be wrappers whose `module` is a copy of the model"
    ):
        compact(model.eval(), x, optimizer, followers=(average, follower))
    assert average.module.get_parameter("first.weight").shape == (8, 5)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
