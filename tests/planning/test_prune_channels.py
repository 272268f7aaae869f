"""Structured pruning: what a plan says is what happens, exactly, within its budget."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import ConfigError
from fxsparse.graph import count
from fxsparse.planning.compaction import compaction_report
from fxsparse.planning.prune_budgets import Budget, ChannelBudget, MacBudget, ParameterBudget
from fxsparse.planning.prune_channels import plan_channels
from fxsparse.planning.prune_choose import Scope
from fxsparse.planning.prune_groups import Knots, prunable_groups
from fxsparse.planning.prune_plan import ChannelPlan
from fxsparse.planning.prune_saliency import ChannelMagnitude, ChannelRandom
from fxsparse.testing import models
from tests.passes.compact_networks import CASES, Case, Residual, build

BUDGETS = (ParameterBudget(0.7), MacBudget(0.6), ChannelBudget(0.5))


def random_model(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = build(case)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, x


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def outputs_equal(expected: Tensor, found: Tensor) -> bool:
    return float((expected - found).abs().max()) <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.unit)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_pruned_model_is_the_masked_one_and_costs_what_the_plan_says(case: Case, budget: Budget) -> None:
    model, x = random_model(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_channels(model, (x,), budget=budget)
    masked, small = plan.masked().eval(), plan.apply().eval()
    with torch.no_grad():
        assert outputs_equal(masked(x), small(x))
        other = torch.cat((x, x.flip(0) + (0 if x.dtype == torch.int64 else 1.5)))[:3]
        assert outputs_equal(masked(other), small(other))
    assert sum(p.numel() for p in small.parameters()) == plan.parameters[1]
    assert sum(p.numel() for p in model.parameters()) == plan.parameters[0]
    assert (count(model, (x,)).macs_dense, count(small, (x,)).macs_dense) == plan.macs
    assert plan.cost[1] <= budget.density * plan.cost[0]
    for (name, dim), indices in plan.removed.items():
        old, new = model.state_dict()[name], small.state_dict()[name]
        assert old.shape[dim] - new.shape[dim] == len(indices)
        if name in dict(model.named_parameters()):
            gone = masked.state_dict()[name].index_select(dim, torch.tensor(indices))
            assert not gone.any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not compaction_report(small).refused


def test_what_stays_is_bit_equal() -> None:
    model, x = random_model(next(case for case in CASES if case.name == "residual"))
    plan = plan_channels(model, (x,), budget=ParameterBudget(0.6))
    small = plan.apply()
    for name, value in model.state_dict().items():
        for dim in range(value.ndim):
            gone = set(plan.removed.get((name, dim), ()))
            kept = [i for i in range(value.shape[dim]) if i not in gone]
            value = value.index_select(dim, torch.tensor(kept))
        assert torch.equal(value, small.state_dict()[name])


def brute_force(model: nn.Sequential, density: float) -> set[int]:
    """The hidden units of a one-hidden-layer network that go: the fewest of the lowest norms."""
    first, second = model[0], model[2]
    norms = ((first.weight.norm(dim=1) + first.bias.abs() + second.weight.norm(dim=0)) / 3).tolist()
    order = sorted(range(len(norms)), key=lambda i: norms[i])
    total = sum(p.numel() for p in model.parameters())
    each = first.weight.shape[1] + 1 + second.weight.shape[0]
    lost = next(k for k in range(len(norms)) if total - k * each <= density * total)
    return set(order[:lost])


@pytest.mark.parametrize("density", [0.9, 0.5, 0.35])
def test_the_lowest_norms_go_and_no_more_than_needed(density: float) -> None:
    model, x = mlp(6, 20, 3), torch.randn(4, 6).double()
    plan = plan_channels(model, (x,), budget=ParameterBudget(density))
    assert set(plan.removed["0.weight", 0]) == set(plan.removed["2.weight", 1]) == brute_force(model, density)


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("budget", [ParameterBudget, MacBudget, ChannelBudget])
@pytest.mark.parametrize("density", [0.8, 0.55])
def test_a_budget_is_met_and_not_overshot_by_more_than_one_step(
    scope: Scope, budget: type[Budget], density: float
) -> None:
    model, x = mlp(6, 24, 16, 40, 3), torch.randn(4, 6).double()
    plan = plan_channels(model, (x,), budget=budget(density), scope=scope, round_to=4)
    assert plan.cost[1] <= density * plan.cost[0]
    largest = 4 * max(24 + 40 + 2, 16 + 3 + 1, 6 + 16 + 1) if budget is ParameterBudget else 0
    if largest:
        assert plan.cost[1] + largest > density * plan.cost[0]
    for group in plan.groups:
        assert group.kept % 4 == 0 and group.kept >= 1
    for name in ("0.weight", "2.weight", "4.weight"):
        assert plan.apply().get_parameter(name).shape[0] % 4 == 0


def test_round_to_counts_indices_of_every_dimension() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 9, 2)).double()
    plan = plan_channels(model, (torch.randn(2, 2, 5, 5).double(),), budget=ChannelBudget(0.7), round_to=8)
    small = plan.apply()
    assert small[0].weight.shape[0] == 8 and small[3].weight.shape[1] == 72
    heads = next(case for case in CASES if case.name == "transformer block")
    model, x = random_model(heads)
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.6), round_to=4)
    for (name, dim), indices in plan.removed.items():
        assert (model.get_parameter(name).shape[dim] - len(indices)) % 4 == 0, (name, dim)


@pytest.mark.parametrize(("limits", "least"), [({"min_channels": 5}, 5), ({"min_density": 0.5}, 8), ({}, 1)])
def test_every_group_keeps_its_least(limits: dict[str, float], least: int) -> None:
    model, x = mlp(6, 16, 16, 3), torch.randn(4, 6).double()
    with torch.no_grad():
        model[0].weight *= 1e-3  # all of the first layer would go
    scores = {"0.weight": model[0].weight.abs(), "2.weight": model[2].weight.abs()}
    with torch.no_grad():
        floor = 1 - sum(16 - least for _ in range(2)) / 32
    plan = plan_channels(
        model, (x,), budget=ChannelBudget(max(floor, 0.2)), saliency=scores, scope=Scope.GLOBAL, **limits
    )
    assert min(group.kept for group in plan.groups) >= least


def test_scopes() -> None:
    model, x = mlp(6, 10, 20, 3), torch.randn(4, 6).double()
    with torch.no_grad():
        model[0].weight *= 1e-3
        model[0].bias *= 1e-3
        model[2].weight *= 0.1
    lost = {
        scope: [len(g.removed) for g in plan_channels(model, (x,), budget=ChannelBudget(0.7), scope=scope).groups]
        for scope in Scope
    }
    assert lost[Scope.GLOBAL] == [9, 0]  # all that may go of the small layer
    assert lost[Scope.LOCAL] == [3, 6]  # the same fraction of each
    assert lost[Scope.ISOMORPHIC] == lost[Scope.GLOBAL]  # two linear layers in a row are of one structure


class TwoKinds(nn.Module):
    """Convolutions whose numbers are a hundred times those of the linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 1)
        self.l1, self.l2 = nn.Linear(4, 8), nn.Linear(8, 2)
        with torch.no_grad():
            for layer in (self.c1, self.c2):
                layer.weight *= 100
                layer.bias *= 100

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(torch.tanh(self.l1(self.c2(torch.tanh(self.c1(x))).mean((2, 3)))))


def test_isomorphic_ranking_compares_like_with_like() -> None:
    torch.manual_seed(0)
    model, x = TwoKinds().double(), torch.randn(2, 2, 3, 3).double()
    options = {"budget": ChannelBudget(0.5), "exclude": "c2.bias"}
    plans = {scope: plan_channels(model, (x,), scope=scope, **options) for scope in Scope}  # type: ignore[arg-type]
    lost = {scope: sorted((g.places[0][0][:2], len(g.removed)) for g in plan.groups) for scope, plan in plans.items()}
    assert lost[Scope.GLOBAL] == [("c1", 1), ("l1", 7)]
    assert lost[Scope.ISOMORPHIC] == [("c1", 4), ("l1", 4)]


def test_plans_are_deterministic_and_equal_scores_go_in_order() -> None:
    model, x = mlp(6, 12, 3), torch.randn(4, 6).double()
    plans = [plan_channels(model, (x,), budget=ChannelBudget(0.5), saliency=ChannelRandom(3)) for _ in range(2)]
    assert plans[0].removed == plans[1].removed
    assert plan_channels(model, (x,), budget=ChannelBudget(0.5), saliency=ChannelRandom(4)).removed != plans[0].removed
    equal = plan_channels(model, (x,), budget=ChannelBudget(0.5), saliency=lambda g, p: torch.ones(g.channels))
    assert equal.removed["0.weight", 0] == tuple(range(6))


def test_planning_leaves_the_model_and_global_state_alone() -> None:
    model, x = random_model(next(case for case in CASES if case.name == "residual"))
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    plan = plan_channels(model, (x,), budget=ParameterBudget(0.6))
    plan.apply()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_plan_cannot_be_changed() -> None:
    model, x = mlp(6, 12, 3), torch.randn(4, 6).double()
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.budget = ChannelBudget(0.1)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.groups[0].removed = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.removed["0.weight", 0] = ()  # type: ignore[index]
    first, second = plan.apply(), plan.apply()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_the_plan_and_its_explanation_can_be_read() -> None:
    model, x = mlp(6, 12, 3), torch.randn(4, 6).double()
    plan = plan_channels(model, (x,), budget=ParameterBudget(0.5), saliency=lambda g, p: torch.arange(12.0))
    text = plan.explain()
    assert "12        5     6" in str(plan) and "0.bias[0], 0.weight[0], 2.weight[1]" in str(plan)
    assert "parameters: 123 -> 53 (43.1%)" in text and "at most 50.0% of the parameters stay" in text
    assert "0.weight[0] loses 0-6" in text
    assert "is an output of the model" in text and "stays whole" in text


def test_the_values_of_the_day_are_pruned() -> None:
    model, x = mlp(6, 12, 3), torch.randn(4, 6).double()
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    small = plan.apply()
    kept = [i for i in range(12) if i not in plan.removed["0.weight", 0]]
    assert torch.equal(small.get_parameter("0.weight"), model[0].weight[kept])


def test_a_model_that_has_changed_its_sizes_is_refused() -> None:
    model, x = mlp(6, 12, 3), torch.randn(4, 6).double()
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.25))
    model[0], model[2] = nn.Linear(6, 4).double(), nn.Linear(4, 3).double()
    with pytest.raises(ConfigError, match=r"is not what it was when the plan was made"):
        plan.apply()


def test_include_and_exclude() -> None:
    model, x = mlp(6, 12, 12, 3), torch.randn(4, 6).double()
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5), include="4")
    assert [group.places[-1] for group in plan.groups] == [("4.weight", 1)]
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5), exclude=("4",))
    assert [group.places[0] for group in plan.groups] == [("0.bias", 0)]
    assert any("in `exclude`" in str(each) for each in plan.excluded)


def test_what_a_norm_reads_together_stays_and_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    plan = plan_channels(model, (torch.randn(2, 4).double(),), budget=ChannelBudget(0.5))
    assert len(plan.groups) == 1 and ("2.weight", 0) in plan.removed and ("0.weight", 0) not in plan.removed
    assert any("read together by layer_norm" in str(each) for each in plan.excluded)


class Standardised(nn.Module):
    """Weights made zero-mean over their inputs by a norm: an input less changes all others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.second.weight.reshape(1, 6, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.second.weight)
        return self.third(torch.relu(F.conv2d(torch.relu(self.first(x)), weight, self.second.bias)))


def test_inputs_of_standardised_weights_stay_and_their_outputs_go() -> None:
    torch.manual_seed(0)
    model, x = Standardised().double(), torch.randn(2, 2, 3, 3).double()
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    assert ("first.weight", 0) not in plan.removed and len(plan.removed["second.weight", 0]) == 3
    assert any("read together by batch_norm" in str(each) for each in plan.excluded)
    with torch.no_grad():
        assert outputs_equal(plan.masked().eval()(x), plan.apply().eval()(x))


def test_normalised_directions_are_spared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[0])
    x = torch.randn(3, 4).double()
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    assert plan.spared == {("0.weight_v", 0)}
    masked, small = plan.masked().eval(), plan.apply().eval()
    with torch.no_grad():
        assert torch.isfinite(masked(x)).all() and outputs_equal(masked(x), small(x))
    assert small[0].weight_v.shape == (4, 4) and small[0].weight_g.shape == (4, 1)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(6, 4, 3)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bsd,dhk->bhsk", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bhsk,bhtk->bhst", q, k).softmax(-1)
        return torch.einsum("bhsk,dhk->bsd", torch.einsum("bhst,bhtk->bhsk", scores, v), self.o)


def test_heads_and_positions_of_einsum_attention_go() -> None:
    torch.manual_seed(0)
    model, x = Einsum().double(), torch.randn(2, 5, 6).double()
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    assert {dim for _, dim in plan.removed} == {1, 2} and ("k", 2) in plan.removed
    with torch.no_grad():
        assert outputs_equal(plan.masked()(x), plan.apply()(x))
    assert plan.macs[0] == count(model, (x,)).macs_dense


class HeadsOnly(nn.Module):
    """Python that nobody traces, and that states the size of a head but not their number."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 1e9):
            return x
        q, k, v = (each(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for each in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_whole_heads_go_where_the_code_states_the_size_of_a_head() -> None:
    torch.manual_seed(0)
    model, x = HeadsOnly().double().eval(), torch.randn(2, 3, 6).double()
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    assert [group.channels for group in plan.groups] == [4] and len(plan.removed["q.weight", 0]) == 8
    told = [each for each in plan.excluded if ("q.weight", 0) in each.places]
    assert [each.channels for each in told] == [4] and "needs it" not in told[0].reason
    with torch.no_grad():
        assert outputs_equal(plan.masked()(x), plan.apply()(x))


def test_of_a_knot_the_inner_ones_are_left_out_first_then_the_outer_ones_then_both() -> None:
    model, x = random_model(next(case for case in CASES if case.name == "transformer block"))
    groups = [
        group for group in prunable_groups(model, (x,)) if any(m.parameter == "qkv.weight" for m in group.members)
    ]
    knots = Knots(groups)
    (inner,) = (g.id for g in groups if g.members[0].indices[0] != tuple(range(4)))
    (outer,) = {g.id for g in groups} - {inner}
    knots.ban({inner: "a", outer: "b"})
    assert knots.banned == {inner: "a"}
    knots.ban({outer: "c"})
    assert knots.banned == {outer: "c"}
    knots.ban({inner: "d"})
    assert knots.banned == {inner: "d", outer: "c"}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "make", [partial(torch.optim.SGD, lr=0.05, momentum=0.9), partial(torch.optim.AdamW, lr=0.01, amsgrad=True)]
)
def test_the_optimizer_goes_on_with_its_state(make: partial[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model, x, y = mlp(6, 12, 3), torch.randn(8, 6).double(), torch.randn(8, 3).double()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    for _ in range(3):
        train_step(model, optimizer, x, y)
        scheduler.step()
    old = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    small = plan.apply(optimizer)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in small.parameters()}
    for name, parameter in small.named_parameters():
        for key, value in optimizer.state[parameter].items():
            expected = old[name][key]
            if isinstance(expected, Tensor) and expected.ndim:
                for dim in range(expected.ndim):
                    gone = set(plan.removed.get((name, dim), ()))
                    kept = [i for i in range(expected.shape[dim]) if i not in gone]
                    expected = expected.index_select(dim, torch.tensor(kept))
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected)), (name, key)
    rate = optimizer.param_groups[0]["lr"]
    for _ in range(3):
        train_step(small, optimizer, x, y)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == rate / 2


def test_a_sparse_model_keeps_its_masks() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6).double()
    sparse = fxsparse.transform(mlp(6, 16, 3), (x,), sparsity=0.5)
    plan = plan_channels(sparse, (x,), budget=ChannelBudget(0.5))
    small = plan.apply()
    masks = fxsparse.masks(small)
    assert set(masks) == {"0.weight", "2.weight"}
    kept = [i for i in range(16) if i not in plan.removed["0.weight", 0]]
    assert torch.equal(masks["0.weight"], fxsparse.masks(sparse)["0.weight"][kept])
    with torch.no_grad():
        assert outputs_equal(plan.masked()(x), small(x))


def test_dead_channels_that_were_not_chosen_stay() -> None:
    model, x = mlp(6, 16, 3), torch.randn(4, 6).double()
    with torch.no_grad():
        model[0].weight[:5] = 0.0
        model[2].weight[:, :5] = 0.0
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.75), saliency=lambda g, p: torch.arange(16.0).flip(0))
    assert plan.removed["0.weight", 0] == (12, 13, 14, 15)
    assert plan.apply().get_parameter("0.weight").shape == (12, 6)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(models(), st.integers(0, 2**16), st.sampled_from((0.8, 0.5)), st.sampled_from(list(Scope)))
def test_generated_models_are_pruned_exactly(drawn, seed, density, scope) -> None:  # type: ignore[no-untyped-def]
    model, inputs = drawn
    try:
        plan = plan_channels(model, inputs, budget=ChannelBudget(density), saliency=ChannelRandom(seed), scope=scope)
    except ConfigError as error:
        assert "nothing can be pruned" in str(error) or "cannot be met" in str(error)
        return
    assert isinstance(plan, ChannelPlan) and plan.cost[1] <= density * plan.cost[0]
    masked, small = plan.masked().eval(), plan.apply().eval()
    with torch.no_grad():
        expected, found = masked(*inputs), small(*inputs)
    assert expected.shape == found.shape
    assert float((expected - found).abs().max()) <= 1e-12 * max(float(expected.abs().max()), 1e-300)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters[1]
    if all(np.isfinite(p.detach().numpy()).all() for p in model.parameters()):
        again = plan_channels(model, inputs, budget=ChannelBudget(density), saliency=ChannelRandom(seed), scope=scope)
        assert again.removed == plan.removed


def test_the_default_saliency_is_the_l2_norm() -> None:
    model, x = Residual().double().eval(), torch.randn(2, 3, 6, 6).double()
    budget = ChannelBudget(0.5)
    expected = plan_channels(model, (x,), budget=budget, saliency=ChannelMagnitude(p=2)).removed
    assert plan_channels(model, (x,), budget=budget).removed == expected
