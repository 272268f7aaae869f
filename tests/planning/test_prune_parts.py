"""Budgets, saliencies, latency tables, limits and bad input of structured pruning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError, DataError, FxSparseError
from fxsparse.graph.channels_groups import ChannelGroup, Member
from fxsparse.graph.channels_products import ProductKey
from fxsparse.planning.latency_table import LatencyGrid, LatencyTable
from fxsparse.planning.prune_budgets import Budget, ChannelBudget, LatencyBudget, MacBudget, ParameterBudget
from fxsparse.planning.prune_channels import plan_channels
from fxsparse.planning.prune_choose import Limits, Scope, allowed_losses
from fxsparse.planning.prune_fisher import group_fisher
from fxsparse.planning.prune_groups import prunable_groups
from fxsparse.planning.prune_saliency import (
    ChannelMagnitude,
    ChannelRandom,
    ChannelScores,
    ChannelTaylor,
    ElementScores,
    NormScale,
    Pooled,
    scored,
)
from fxsparse.sparsity import Magnitude
from fxsparse.sparsity.saliency import Gradient


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture
def net() -> tuple[Net, tuple[Tensor], ChannelGroup, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, x = Net().double().eval(), (torch.randn(2, 2, 5, 5).double(),)
    with torch.no_grad():
        model.norm.weight.normal_()
        model.norm.bias.normal_()
    (group,) = prunable_groups(model, x)
    return model, x, group, {name: p.detach() for name, p in model.named_parameters()}


def test_members_say_how_they_are_read(net: Any) -> None:
    roles = {(m.parameter, m.dim): m.role for m in net[2].members}
    assert roles["conv.weight", 0] == "conv2d.weight" and roles["head.weight", 1] == "linear.weight"
    assert roles["norm.weight", 0] == "batch_norm.weight" and roles["norm.running_mean", 0] == "batch_norm.running_mean"


def slices_of(channel: int) -> list[tuple[str, Any]]:
    return [(name, channel) for name in ("conv.weight", "norm.weight", "norm.bias")] + [
        ("head.weight", (slice(None), channel))
    ]


@pytest.mark.parametrize("pooled", list(Pooled))
@pytest.mark.parametrize("p", [1, 2])
def test_magnitudes(net: Any, p: int, pooled: Pooled) -> None:
    _, _, group, parameters = net
    expected = []
    for i in range(5):
        parts = [parameters[n][k] for n, k in slices_of(i)]
        norms = [float((part.abs() ** p).sum() ** (1 / p)) for part in parts]
        expected.append(sum(norms) / (len(norms) if pooled is Pooled.MEAN else 1))
    found = ChannelMagnitude(p, pooled)(group, parameters)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_taylor_adds_up_before_it_takes_the_absolute_value(net: Any) -> None:
    _, _, group, parameters = net
    gradients = {name: torch.randn_like(value) for name, value in parameters.items()}
    expected = []
    for i in range(5):
        expected.append(sum(abs(float((gradients[n][k] * parameters[n][k]).sum())) for n, k in slices_of(i)) / 4)
    found = ChannelTaylor(gradients)(group, parameters)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_element_scores_are_added_up(net: Any) -> None:
    model, x, group, parameters = net
    scores = {"conv.weight": torch.rand(5, 2, 3, 3), "head.weight": torch.rand(3, 5)}
    expected = (scores["conv.weight"].double().sum((1, 2, 3)) + scores["head.weight"].double().sum(0)) / 2
    torch.testing.assert_close(ElementScores(scores)(group, parameters), expected, rtol=1e-12, atol=0)
    sums = ChannelMagnitude(1)(group, parameters)
    torch.testing.assert_close(ElementScores(Magnitude())(group, parameters), sums, rtol=1e-12, atol=0)
    by_mapping = plan_channels(model, x, budget=ChannelBudget(0.6), saliency=scores).removed
    assert by_mapping["conv.weight", 0] == tuple(sorted(expected.argsort()[:2].tolist()))


def test_norm_scales(net: Any) -> None:
    _, _, group, parameters = net
    assert torch.equal(NormScale()(group, parameters), parameters["norm.weight"].abs())


def test_random_scores_depend_on_seed_and_group(net: Any) -> None:
    group, parameters = net[2], net[3]
    other = ChannelGroup(group.id + 1, group.channels, group.members, True)
    first = ChannelRandom(1)(group, parameters)
    assert torch.equal(first, ChannelRandom(1)(group, parameters))
    assert not torch.equal(first, ChannelRandom(2)(group, parameters))
    assert not torch.equal(first, ChannelRandom(1)(other, parameters))


def test_group_fisher_is_the_squared_gradient_of_a_channel_mask(net: Any) -> None:
    model, x, group, parameters = net
    samples = [(torch.randn(1, 2, 5, 5).double(), torch.randn(1, 3).double()) for _ in range(4)]

    def loss(net: nn.Module, sample: tuple[Tensor, Tensor]) -> Tensor:
        return (net(sample[0]) - sample[1]).square().sum()

    expected = torch.zeros(5, dtype=torch.float64)
    for data, target in samples:
        mask = torch.ones(5, dtype=torch.float64, requires_grad=True)
        hidden = torch.relu(model.norm(model.conv(data))).mean((2, 3)) * mask
        (gradient,) = torch.autograd.grad((model.head(hidden) - target).square().sum(), mask)
        expected += gradient.detach().square() / len(samples)
    scores = group_fisher(model, x, samples, loss)
    torch.testing.assert_close(scores[group.id], expected, rtol=1e-10, atol=0)
    plan = plan_channels(model, x, budget=ChannelBudget(0.6), saliency=scores)
    assert plan.removed["conv.weight", 0] == tuple(sorted(expected.argsort()[:2].tolist()))
    assert all(p.grad is None for p in model.parameters())


def group_of(channels: int, *widths: int) -> ChannelGroup:
    members = tuple(
        Member(f"p{n}", 0, tuple(tuple(range(i * width, (i + 1) * width)) for i in range(channels)))
        for n, width in enumerate(widths)
    )
    return ChannelGroup(0, channels, members, True)


@pytest.mark.parametrize(
    ("group", "limits", "losses"),
    [
        (group_of(5, 1), Limits(), (0, 1, 2, 3, 4)),
        (group_of(20, 1), Limits(round_to=8), (0, 4, 12)),
        (group_of(16, 1), Limits(round_to=8, min_channels=9), (0,)),
        (group_of(16, 1, 4), Limits(round_to=8), (0, 8)),
        (group_of(6, 4), Limits(round_to=8), (0, 2, 4)),
        (group_of(12, 2, 3), Limits(round_to=6), (0, 6)),
        (group_of(6, 64), Limits(round_to=8), (0, 1, 2, 3, 4, 5)),
        (group_of(10, 1), Limits(min_density=0.65), (0, 1, 2, 3)),
        (group_of(4, 1), Limits(round_to=8), (0,)),
    ],
)
def test_what_a_group_may_lose(group: ChannelGroup, limits: Limits, losses: tuple[int, ...]) -> None:
    assert allowed_losses(group, limits) == losses


def test_a_grid_is_interpolated_and_never_falls() -> None:
    grid = LatencyGrid((4, 8), (10, 20), ((1.0, 3.0), (2.0, 2.5)))
    assert grid.at(4, 10) == 1.0 and grid.at(8, 20) == 3.0  # not less than with fewer channels
    assert grid.at(4, 15) == 2.0 and grid.at(6, 10) == 1.5
    assert grid.at(1, 1) == 1.0  # as at the smallest
    assert LatencyGrid((), (2, 4), ((1.0, 2.0),)).at(99, 3) == 1.5


KEY = ProductKey("linear", (2, 6), (20, 6))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LatencyGrid((1,), (1, 2), ((1.0,),)), "`seconds` of shape"),
        (lambda: LatencyGrid((1,), (1,), ((0.0,),)), "must be positive and finite"),
        (lambda: LatencyGrid((2, 1), (1,), ((1.0,), (1.0,))), r"`inputs` \(=\(2, 1\)\) must ascend"),
        (lambda: LatencyTable({}).seconds(KEY, 1, 1), "`table` has no entry for"),
        (lambda: LatencyBudget(0.5, {}), r"`table` \(=dict\) must be a LatencyTable"),  # type: ignore[arg-type]
    ],
)
def test_tables_that_cannot_be(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_latency_budget_counts_what_the_table_says() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)).double(), (torch.randn(2, 6).double(),)
    first, second = ProductKey("linear", (2, 6), (20, 6)), ProductKey("linear", (2, 20), (3, 20))
    table = LatencyTable(
        {first: LatencyGrid((6,), (5, 20), ((1.0, 4.0),)), second: LatencyGrid((5, 20), (3,), ((1.0,), (1.0,)))}
    )
    plan = plan_channels(model, x, budget=LatencyBudget(0.6, table))
    assert plan.cost[0] == 5.0 and plan.apply()[0].weight.shape == (10, 6)  # 1 + 2 seconds
    assert plan.cost[1] == pytest.approx(3.0)
    assert "seconds: 5 -> 3 (60.0%)" in str(plan)
    with pytest.raises(ConfigError, match="has no entry for"):
        plan_channels(model, x, budget=LatencyBudget(0.6, LatencyTable({first: table.grids[first]})))


def test_latencies_are_measured_in_onnxruntime() -> None:
    from fxsparse.exporters.latency_table import measure_latency_table

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, groups=4, padding="same"),
        nn.Conv2d(16, 16, 3, groups=16), nn.ConvTranspose2d(16, 8, 3, 2, output_padding=1), nn.Flatten(),
        nn.Linear(8 * 14 * 14, 4),
    )  # fmt: skip
    x = (torch.randn(1, 3, 16, 16),)
    table = measure_latency_table(model, x, widths=(0.5, 1.0), seconds=0.01)
    shapes = {key.weight: grid for key, grid in table.grids.items()}
    assert set(shapes) == {(8, 3, 3, 3), (16, 2, 3, 3), (16, 1, 3, 3), (16, 8, 3, 3), (4, 1568)}
    assert (shapes[8, 3, 3, 3].inputs, shapes[8, 3, 3, 3].outputs) == ((3,), (4, 8))
    assert (shapes[16, 2, 3, 3].inputs, shapes[16, 2, 3, 3].outputs) == ((), (8, 16))
    assert (shapes[4, 1568].inputs, shapes[4, 1568].outputs) == ((784, 1568), (4,))
    assert "onnxruntime" in table.runtime
    plan = plan_channels(model, x, budget=LatencyBudget(1.0, table))
    assert plan.cost[0] == pytest.approx(sum(grid.seconds[-1][-1] for grid in table.grids.values()), rel=0.5)
    for options in ({"widths": (0.5,)}, {"widths": ()}, {"threads": 0}, {"seconds": 0.0}):
        with pytest.raises(ConfigError):
            measure_latency_table(model, x, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [ParameterBudget, MacBudget, ChannelBudget])
@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan"), float("inf"), True, "half"])
def test_budgets_out_of_range(kind: type[Budget], density: Any) -> None:
    with pytest.raises(ConfigError, match=r"`density` \(=.*\) of \w+Budget must be in \(0, 1\]"):
        kind(density)


def plan(net: Any, **options: Any) -> object:
    return plan_channels(net[0], net[1], **{"budget": ChannelBudget(0.6), **options})


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"budget": 0.5}, ConfigError, r"`budget` \(=0.5\) must be a budget"),
        ({"scope": "global"}, ConfigError, r"`scope` \(='global'\) must be Scope.GLOBAL"),
        ({"round_to": 0}, ConfigError, r"`round_to` \(=0\) must be an int of at least 1"),
        ({"min_channels": 1.5}, ConfigError, r"`min_channels` \(=1.5\)"),
        ({"min_density": 1.5}, ConfigError, r"`min_density` \(=1.5\) must be in \[0, 1\]"),
        ({"budget": ParameterBudget(0.01)}, ConfigError, r"cannot be met: .*% of the parameters stay"),
        ({"min_channels": 5}, ConfigError, r"ChannelBudget cannot be met: 100.0% of the channels stay"),
        ({"exclude": "conv"}, ConfigError, r"nothing can be pruned(.|\n)*in `exclude`"),
        ({"include": "nowhere"}, ConfigError, r"`include` \(='nowhere'\) names no parameter"),
        ({"saliency": 3}, ConfigError, r"`saliency` \(=3\) must be a channel saliency"),
        ({"saliency": {1: "x"}}, ConfigError, r"must be parameter name -> tensor"),
        ({"saliency": Gradient()}, ConfigError, r"needs gradients or inputs"),
        ({"saliency": lambda g, p: torch.zeros(4)}, ConfigError, r"returned \(4,\) for channel group 0 \(conv.weight"),
        ({"saliency": lambda g, p: 1.0}, ConfigError, r"returned float for channel group 0"),
        ({"saliency": lambda g, p: torch.full((5,), torch.nan)}, DataError, r"5 of 5 scores of channel group 0"),
        ({"saliency": {0: torch.tensor([1.0, torch.inf, 1, 1, 1])}}, DataError, r"1 of 5 scores of channel group 0"),
        ({"saliency": {0: torch.zeros(5, 2)}}, ConfigError, r"returned \(5, 2\)"),
        ({"saliency": {7: torch.zeros(5)}}, ConfigError, r"`scores` has no entry for channel group 0"),
        ({"saliency": {"conv.weight": torch.zeros(5, 2)}}, ConfigError, r"`scores` of `conv.weight` \(=\(5, 2\)\)"),
        (
            {"saliency": {"no.weight": torch.zeros(5, 2)}},
            ConfigError,
            r"ElementScores has no score for channel group 0",
        ),
        ({"saliency": ChannelTaylor({})}, ConfigError, r"ChannelTaylor has no score for channel group 0"),
    ],
)
def test_bad_input_is_named(net: Any, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        plan(net, **options)


def test_other_bad_input(net: Any) -> None:
    model, x, group, parameters = net
    with pytest.raises(ConfigError, match=r"`p` \(=3\) must be 1 or 2"):
        ChannelMagnitude(3)
    with pytest.raises(ConfigError, match="NormScale.* has no score for channel group"):
        plan_channels(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4),),
            budget=ChannelBudget(0.5), saliency=NormScale(),
        )  # fmt: skip
    with torch.no_grad():
        model.conv.weight[2, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="1 of 5 scores"):
        plan(net)
    with pytest.raises(ConfigError, match="must be a torch.nn.Module"):
        plan_channels(3, x, budget=ChannelBudget(0.5))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`example_inputs`"):
        plan_channels(Net(), x[0].float(), budget=ChannelBudget(0.5))
    with pytest.raises(FxSparseError):
        plan_channels(Net(), (torch.randn(2, 3),), budget=ChannelBudget(0.5))


def test_a_saliency_is_asked_once_per_group_and_its_scores_are_checked_in_double(net: Any) -> None:
    group, parameters = net[2], net[3]
    asked: list[int] = []

    def saliency(group: ChannelGroup, given: Any) -> Tensor:
        asked.append(group.id)
        assert set(given) == set(parameters) and not any(value.requires_grad for value in given.values())
        return torch.arange(5, dtype=torch.float16)

    found = scored(saliency, group, parameters)
    assert found.dtype == torch.float64 and np.array_equal(found.numpy(), np.arange(5.0))
    plan(net, saliency=saliency)
    assert asked == [group.id, group.id]
    assert isinstance(ChannelScores({0: found})(group, parameters), Tensor)
    assert Scope("local") is Scope.LOCAL
