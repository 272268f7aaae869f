"""Channel groups: golden ones, and an oracle that really removes each channel."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.graph.channels import Channels, channels
from fxsparse.graph.channels_atoms import Atoms, Barrier
from fxsparse.graph.channels_flow import factor_groups
from tests.passes.compact_networks import CASES, Attention, Grouped, GroupedQueries, build

NAMED = {case.name: case for case in CASES}


def members(found: Channels) -> dict[frozenset[tuple[str, int]], int]:
    return {frozenset((m.parameter, m.dim) for m in g.members): g.channels for g in found.groups if g.prunable}


def of(model: nn.Module, *shape: int, route: str = "recorder") -> Channels:
    return channels(model.double().eval(), (torch.randn(shape).double(),), routes=(route,))


@pytest.mark.parametrize("route", ["export", "recorder"])
def test_an_mlp(route: str) -> None:
    found = of(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), 2, 5, route=route)
    assert members(found) == {frozenset({("0.weight", 0), ("0.bias", 0), ("2.weight", 1)}): 8}
    stuck = {(m.parameter, m.dim): g.reason for g in found.groups if not g.prunable for m in g.members}
    assert set(stuck) == {("0.weight", 1), ("2.weight", 0), ("2.bias", 0)}
    assert "output of the model" in stuck["2.bias", 0]
    assert "1 of 4 channel groups can be pruned" in str(found)


def test_groups_of_a_convolution() -> None:
    found = members(of(Grouped(), 2, 3, 5, 5))
    both = frozenset({("first.weight", 0), ("first.bias", 0), ("grouped.weight", 1)})
    group = frozenset(
        {("first.weight", 0), ("first.bias", 0), ("grouped.weight", 0), ("grouped.bias", 0), ("last.weight", 1)}
    )
    assert found[both] == 4 and found[group] == 2


def test_attention_heads_are_found_without_being_told() -> None:
    groups = [g for g in of(Attention(), 2, 5, 16).groups if g.prunable]
    kinds = {tuple((m.parameter, m.dim, m.indices[0]) for m in g.members): g.channels for g in groups}
    head = tuple(i for start in (0, 16, 32) for i in range(start, start + 4))
    position = tuple(range(0, 48, 4))
    assert kinds == {
        (("proj.weight", 1, head[:4]), ("qkv.bias", 0, head), ("qkv.weight", 0, head)): 4,
        (("proj.weight", 1, position[:4]), ("qkv.bias", 0, position), ("qkv.weight", 0, position)): 4,
        (("fc1.bias", 0, (0,)), ("fc1.weight", 0, (0,)), ("fc2.weight", 1, (0,))): 24,
    }


def test_shared_key_heads_and_rotary_halves() -> None:
    found = {
        frozenset((m.parameter, m.dim, len(m.indices[0])) for m in g.members): g.channels
        for g in of(GroupedQueries(), 2, 5, 12).groups
        if g.prunable
    }
    head = frozenset({("q.weight", 0, 8), ("k.weight", 0, 4), ("v.weight", 0, 4), ("o.weight", 1, 8)})
    key = frozenset({("q.weight", 0, 8), ("k.weight", 0, 4), ("angle", 1, 2)})
    value = frozenset({("v.weight", 0, 2), ("o.weight", 1, 4)})
    assert found == {head: 2, key: 2, value: 4}


def test_a_residual_stream_is_one_group() -> None:
    model, _ = build(NAMED["residual"])
    found = members(of(model, 2, 3, 6, 6))
    (key,) = found
    assert found[key] == 8
    assert {("stem.weight", 0), ("body.weight", 0), ("body.weight", 1), ("body_norm.running_var", 0)} < key


def test_a_norm_is_noted_not_a_barrier() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    (group,) = (g for g in of(model, 2, 4).groups if g.prunable)
    assert group.channels == 6 and "read together by layer_norm in `1`" in group.reason


class Distances(nn.Module):
    """Distances: an operator that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.cdist(self.before(x), x.new_ones(6, 6)))


def test_an_unknown_operator_is_a_named_barrier() -> None:
    found = of(Distances(), 2, 3, 4)
    assert not members(found)
    assert any("cdist" in str(barrier) and "is not understood here" in str(barrier) for barrier in found.barriers)
    reasons = {m.parameter: g.reason for g in found.groups for m in g.members if m.dim == 0}
    assert "cdist" in reasons["before.weight"]


def test_a_torch_layer_that_checks_its_sizes_stays() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.mha = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return self.mha(y, y, y)[0]

    assert not members(of(Wrapped(), 2, 3, 4))


@pytest.mark.parametrize("operation", [lambda y: y.flip(1), lambda y: y.roll(1, 1), lambda y: y[:, [2, 0, 1]]])
def test_reordered_channels_stay(operation) -> None:  # type: ignore[no-untyped-def]
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(operation(self.a(x)))

    assert not members(of(Ordered(), 2, 4))


def _removed(model: nn.Module, drop: dict[tuple[str, int], set[int]]) -> None:
    for (name, dim), gone in drop.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = getattr(module, attribute)
        kept = torch.tensor([i for i in range(tensor.shape[dim]) if i not in gone])
        short = tensor.detach().index_select(dim, kept)
        if isinstance(tensor, nn.Parameter):
            module._parameters[attribute] = nn.Parameter(short)
        else:
            module._buffers[attribute] = short


@pytest.mark.parametrize("name", ["mlp", "flatten", "residual", "concat and split", "squeeze and excite", "glu"])
def test_every_channel_can_really_be_removed(name: str) -> None:
    """The oracle: slice the members of one channel, and the network must run as it is, for every channel."""
    case = NAMED[name]
    model, x = build(case)
    if name == "concat and split":  # sizes are written into its code
        pytest.skip("its slices are stated in Python")
    for group in channels(model, (x,)).groups:
        for channel in range(group.channels if group.prunable else 0):
            small, _ = build(case)
            _removed(small, {(m.parameter, m.dim): set(m.indices[channel]) for m in group.members})
            assert small(x).shape == model(x).shape


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_both_routes_agree(name: str) -> None:
    model, x = build(NAMED[name])
    one, two = (channels(model, (x,), routes=(route,)) for route in ("export", "recorder"))
    assert members(one) == members(two)


def test_dimensions_of_different_size_that_match_group_wise() -> None:
    assert factor_groups((2, 12, 4), (2, 3, 4, 4)) == [([0], [0]), ([1], [1, 2]), ([2], [3])]
    assert factor_groups((2, 3, 4), (6, 4)) == [([0, 1], [0]), ([2], [1])]
    assert factor_groups((4, 6), (6, 4)) == [([0, 1], [0, 1])]
    assert factor_groups((1, 5), (5, 1)) == [([0], []), ([1], [0]), ([], [1])]


def test_atoms_unite_split_and_merge() -> None:
    atoms = Atoms()
    a, b, c = atoms.fresh(6), atoms.fresh(6), atoms.fresh(6)
    atoms.unite(a, b)
    atoms.unite(b, c[::-1].copy())
    classes = atoms.classes()
    assert (classes[a] == classes[b]).all() and (classes[c] == classes[a][::-1]).all()
    heads, inner = atoms.split(a, (2, 3))
    assert heads is not None and inner is not None and (heads.size, inner.size) == (2, 3)
    assert atoms.split(a, (2, 3)) == (heads, inner) and atoms.merge((heads, inner), (2, 3)) is a
    repeated = atoms.merge((b, None), (6, 2))
    assert repeated is not None and (repeated == np.repeat(b, 2)).all()
    again = atoms.split(repeated, (6, 2))
    assert again[1] is None and again[0] is not None and (again[0] == b).all()
    assert atoms.freeze(a, Barrier("n", "op", "", "why")) and not atoms.freeze(None, Barrier("n", "op", "", "why"))


def test_the_cost_is_linear_in_the_size_of_the_graph() -> None:
    class Deep(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layer, self.depth = nn.Linear(16, 16), depth

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.depth):
                x = F.relu(x) + self.layer(x).view(-1, 4, 4).transpose(1, 2).flatten(1)
            return x

    def seconds(depth: int) -> float:
        model, start = Deep(depth), time.process_time()
        channels(model, (torch.randn(2, 16),), routes=("recorder",))
        return time.process_time() - start

    seconds(5)
    small, large = seconds(100), seconds(800)
    assert large < 24 * small + 1.0  # eight times the nodes
