"""Structured pruning through operators that pick, place and rank by values: graph networks, experts, bags of words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse.graph.channels import channels
from fxsparse.graph.channels_groups import ChannelGroup
from fxsparse.planning.compaction import compact
from fxsparse.planning.prune_budgets import ChannelBudget, MacBudget
from fxsparse.planning.prune_channels import plan_channels
from fxsparse.planning.prune_choose import Limits, Scope, allowed_losses
from tests.planning.prune_checks import filled, floats, pruned, same

INDEX = torch.tensor([2, 0, 3, 3])
MASK = torch.tensor([True, False, True, True])


def wide(index: Tensor, like: Tensor) -> Tensor:
    return index.view(-1, 1).expand_as(like)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda x: x[INDEX],
    "mask": lambda x: x[MASK],
    "pairs": lambda x: x.view(2, 2, x.shape[1])[torch.tensor([0, 1]), torch.tensor([1, 1])],
    "index_select": lambda x: x.index_select(0, INDEX),
    "gather": lambda x: x.gather(0, wide(INDEX, x)),
    "topk": lambda x: x.topk(2, 0).values,
    "sort": lambda x: x.sort(0).values.cumsum(1).diff(dim=0) if x.ndim == 1 else x,
    "scatter_add": lambda x: x.new_zeros(5, x.shape[1]).scatter_add_(0, wide(INDEX, x), x),
    "scatter_reduce": lambda x: torch.zeros(5, x.shape[1], dtype=x.dtype).scatter_reduce(0, wide(INDEX, x), x, "amax"),
    "index_add": lambda x: torch.zeros_like(x).index_add_(0, INDEX, x),
    "index_copy": lambda x: torch.zeros_like(x).index_copy_(0, torch.tensor([3, 1, 0, 2]), x),
    "index_put": lambda x: torch.zeros(5, x.shape[1], dtype=x.dtype).index_put_((INDEX,), x, accumulate=True),
    "written rows": lambda x: _written(x),
    "averaged": lambda x: _averaged(x),
}


def _written(x: Tensor) -> Tensor:
    y = torch.zeros(5, x.shape[1], dtype=x.dtype)
    y[INDEX[:3]] = x[:3]
    return y


def _averaged(x: Tensor) -> Tensor:
    """The mean of a node's neighbours."""
    total = x.new_zeros(5, x.shape[1]).scatter_add_(0, wide(INDEX, x), x)
    number = x.new_zeros(5).scatter_add_(0, INDEX, x.new_ones(4)).clamp(min=1)
    return total / number.view(-1, 1).expand_as(total)


class Moved(nn.Module):
    """Linear, an operator along the rows, linear."""

    def __init__(self, *moves: str) -> None:
        super().__init__()
        self.moves = moves
        self.layers = nn.ModuleList([nn.Linear(3, 6), *(nn.Linear(6, 6) for _ in moves[1:])])
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer, move in zip(self.layers, self.moves, strict=True):
            x = MOVES[move](F.pad(layer(x).tanh(), (0, 0, 0, max(0, 4 - x.shape[0])))[:4])
        return self.last(x)


@pytest.mark.parametrize("name", MOVES)
def test_channels_pass_through(name: str) -> None:
    plan = pruned(filled(Moved(name)), (floats(4, 3),))
    assert [(group.channels, group.kept) for group in plan.groups] == [(6, 3)]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(sorted(MOVES)), min_size=2, max_size=3))
def test_channels_pass_through_chains(names: list[str]) -> None:
    model, x = filled(Moved(*names)), floats(4, 3)
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    assert [group.channels for group in plan.groups] == [6] * len(names)
    with torch.no_grad():
        assert same(plan.masked()(x), plan.apply().eval()(x))


STAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "indexed": lambda x: x[:, INDEX],
    "gathered": lambda x: x.gather(1, torch.zeros(4, 6, dtype=torch.long)),
    "ranked": lambda x: F.pad(x.topk(2, 1).values, (0, 4)),
    "placed": lambda x: torch.zeros_like(x).index_add_(1, torch.tensor([1, 0, 2, 2, 5, 4]), x),
    "in part": lambda x: torch.zeros_like(x).scatter_add(0, torch.zeros(2, 3, dtype=torch.long), x),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_indexed_stays(name: str) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.LazyLinear(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(STAYS[name](self.first(x)))

    model = Held()
    model(torch.randn(4, 3))
    free = [group for group in channels(filled(model), (floats(4, 3),)).groups if group.prunable]
    assert not any(member.parameter == "first.weight" for group in free for member in group.members)


class Experts(nn.Module):
    """Each row goes to the two best of four experts, which have hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, rank = torch.where(chosen == number)
            if row.numel():
                y.index_add_(0, row, expert(x[row]) * weights[row, rank, None])
        return y


def test_hidden_units_of_routed_experts_go_and_the_router_stays() -> None:
    plan = pruned(filled(Experts()), (floats(12, 6),), scope=Scope.LOCAL)
    assert [(group.channels, group.kept) for group in plan.groups] == [(8, 4)] * 4
    assert any("is ranked by its values" in str(each) for each in plan.excluded)


class Fused(nn.Module):
    """Experts in weights of three dimensions, with a gate and a value side by side, interleaved or in halves."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.last = kind, nn.Linear(6, 2)
        self.up, self.up_bias = nn.Parameter(torch.empty(3, 6, 16)), nn.Parameter(torch.empty(3, 16))
        self.down = nn.Parameter(torch.empty(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.bmm(x.expand(3, -1, -1), self.up) + self.up_bias[:, None]
        gate, value = (both[..., ::2], both[..., 1::2]) if self.kind == "interleaved" else both.chunk(2, -1)
        return self.last(torch.bmm(F.silu(gate) * value, self.down).sum(0))


@pytest.mark.parametrize("kind", ["interleaved", "halves"])
def test_hidden_units_of_fused_experts_go(kind: str) -> None:
    model = filled(Fused(kind))
    plan = pruned(model, (floats(5, 6),), include="up")
    (lost,) = {plan.removed["down", 1]}
    pairs = {unit: (2 * unit, 2 * unit + 1) if kind == "interleaved" else (unit, unit + 8) for unit in lost}
    assert len(lost) == 4
    assert plan.removed["up", 2] == plan.removed["up_bias", 1] == tuple(sorted(sum(pairs.values(), ())))


class Skipping(nn.Module):
    """Reads every other channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[:, 1::2])


def test_steps_lose_whole_runs() -> None:
    plan = pruned(filled(Skipping()), (floats(4, 3),))
    assert [(group.channels, group.kept) for group in plan.groups] == [(6, 3)]
    assert plan.removed["first.weight", 0] == tuple(
        index for unit in plan.removed["last.weight", 1] for index in (2 * unit, 2 * unit + 1)
    )


class GroupedExperts(nn.Module):
    """Rows sorted by expert, in one grouped product."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(2, 8, 16)), nn.Parameter(torch.empty(2, 16, 8))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(torch._grouped_mm(x, self.up, offs=ends).relu(), self.down, offs=ends)


def test_grouped_products_keep_aligned_strides() -> None:
    model = GroupedExperts()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model, inputs = model.bfloat16().eval(), (torch.randn(6, 8).bfloat16(), torch.tensor([2, 6], dtype=torch.int32))
    plan = plan_channels(model, inputs, budget=ChannelBudget(0.7))
    assert [group.kept for group in plan.groups] == [8]  # 16 bytes are eight numbers
    assert plan.macs == (6 * 8 * 16 * 2, 6 * 8 * 8 * 2)
    torch.testing.assert_close(plan.apply()(*inputs), plan.masked()(*inputs))


def test_a_group_keeps_a_multiple() -> None:
    group = ChannelGroup(0, 10, (), True, multiple=4, classes=(np.zeros(1, dtype=np.int64),) * 10)
    assert allowed_losses(group, Limits()) == (0, 2, 6)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.pair = nn.EmbeddingBag(20, 8, mode="sum"), nn.Bilinear(8, 5, 3)
        self.other = nn.Linear(4, 5)

    def forward(self, ids: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
        return self.pair(self.words(ids, offsets), self.other(x))


def test_bags_and_bilinear_layers() -> None:
    model = filled(Bag())
    inputs = (torch.arange(9), torch.tensor([0, 4]), floats(2, 4))
    small = pruned(model, inputs).apply()
    pair = small.pair
    assert (
        (pair.in1_features, pair.in2_features)
        == tuple(pair.weight.shape[1:])
        == (small.words.embedding_dim, small.other.out_features)
    )
    plan = plan_channels(model, inputs, budget=MacBudget(0.5))
    assert plan.macs[0] == 2 * 8 * 5 * 3 + 2 * 4 * 5


def test_a_constant_that_is_placed_among_zeros_stays() -> None:
    """Rows that nothing is added to are zero: the channel is no constant there."""
    model, x = filled(Moved("scatter_add")), floats(4, 3)
    with torch.no_grad():
        model.layers[0].weight[1] = 0.0
        model.layers[0].weight[2], model.layers[0].bias[2] = 0.0, 0.0
    small = compact(model, (x,))
    assert small.layers[0].out_features == 5 and same(model(x), small(x))


def test_what_nobody_reads_keeps_nothing() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            torch.cdist(y, y)  # a barrier, if its result were used
            return self.last(y)

    assert [group.channels for group in pruned(filled(Idle()), (floats(4, 3),)).groups] == [6]


def test_a_direction_is_spared_only_where_its_length_goes() -> None:
    """weight_norm behind weight_norm: columns of the second become zero, rows of the first cannot."""
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    with pytest.warns(FutureWarning):
        for layer in (model[0], model[2]):
            torch.nn.utils.weight_norm(layer)
    x = floats(3, 4)
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5))
    assert plan.spared == {("0.weight_v", 0)} and ("2.weight_v", 1) in plan.removed
    with torch.no_grad():
        assert same(plan.masked()(x), plan.apply()(x))


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 8), torch.jit.script(nn.Sequential(nn.ReLU())), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_module_stands_by() -> None:
    pruned(filled(Scripted()), (floats(3, 4),))
