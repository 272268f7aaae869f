"""Input that a collector refuses or skips, and what others take from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsparse.curvature import (
    EWC,
    FisherCollector,
    FisherType,
    GroupTable,
    Heads,
    Key,
    fisher_damage,
    fisher_weighted_merge,
    from_old,
    restrict,
    to_old,
)
from fxsparse.errors import ConfigError, DataError

F64 = torch.float64
WEIGHT = "default|0.weight|channel"


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator, dtype=F64), torch.arange(n) % 3


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = False
        self.first, self.second, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(x) if self.used else self.first(x)))


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_a_parameter_that_comes_late_to_an_exponential_mean(absent: str) -> None:
    torch.manual_seed(0)
    model = Experts().double()
    key = "default|second.weight|channel"
    collector = FisherCollector(model, accumulate="ema", beta=0.9, absent=absent)
    collector.update(batch())
    assert not collector.get()[key].any()
    assert (collector.effective_size()[key] == 0) == (absent == "skip")
    model.used = True
    collector.update(batch())
    alone = FisherCollector(model)
    alone.update(batch())
    factor = 1.0 if absent == "skip" else 0.1 / 0.19
    assert torch.allclose(collector.get()[key], factor * alone.get()[key], rtol=1e-12)


def test_the_effective_size() -> None:
    mean, ema = FisherCollector(network()), FisherCollector(network(), accumulate="ema", beta=0.5)
    sizes = (5, 3, 7)
    for n in sizes:
        mean.update(batch(n))
        ema.update(batch(n))
    weights = torch.cat([torch.full((n,), 0.5 ** (3 - k)) for k, n in enumerate(sizes)]).double()
    assert set(mean.effective_size().values()) == {15.0}
    expected = float(weights.sum() ** 2 / weights.square().sum())
    assert ema.effective_size()[WEIGHT] == pytest.approx(expected, rel=1e-12)
    other = FisherCollector(network(), accumulate="ema", beta=0.5)
    other.load_state_dict(ema.state_dict())
    assert other.effective_size() == ema.effective_size()


def test_an_empty_batch_is_skipped_and_counted() -> None:
    for first in (True, False):
        collector = FisherCollector(network())
        if not first:
            collector.update(batch())
        before = {} if first else collector.get()
        collector.update((batch()[0][:0], batch()[1][:0]))
        assert collector.skipped() == 1
        if first:
            collector.update(batch())
        reference = FisherCollector(network())
        reference.update(batch())
        for key, value in (before or reference.get()).items():
            assert torch.equal(collector.get()[key], value)
    with pytest.raises(DataError, match="no unit that counts"):
        FisherCollector(network()).oneshot((batch()[0][:0], batch()[1][:0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("kind", "accumulate"), [("mc", "mean"), ("sketch", "ema"), ("empirical", "mean")])
def test_values_that_are_not_finite_change_nothing(value: float, first: bool, kind: str, accumulate: str) -> None:
    collector, reference = (FisherCollector(network(), kind=kind, accumulate=accumulate) for _ in range(2))
    x, y = batch()
    bad = x.clone()
    bad[-1, 0] = value
    if not first:
        collector.update((x, y))
        reference.update((x, y))
    with pytest.raises(DataError, match="`0.weight` has .* NaN or infinite|outputs of the model"):
        collector.update((bad, y))
    assert collector.tasks() == reference.tasks()
    collector.update((x, y))
    reference.update((x, y))
    for key, found in reference.get().items():
        assert torch.equal(collector.get()[key], found)


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda: FisherCollector(network(5)), "`0.weight` of the state has shape"),
        (lambda: FisherCollector(network(), "mse"), "`loss` of the state"),
        (lambda: FisherCollector(network(), nn.CrossEntropyLoss(label_smoothing=0.1)), "`loss` of the state"),
        (lambda: FisherCollector(network(), groups="element"), "`groups` of the state"),
        (lambda: FisherCollector(network(), heads=[Heads(2, queries=("0.weight",))]), "`heads` of the state"),
    ],
)
def test_states_of_other_models_are_refused_at_load(made: Callable[[], FisherCollector], named: str) -> None:
    collector = FisherCollector(network())
    collector.update(batch())
    state, other = collector.state_dict(), made()
    with pytest.raises(ConfigError, match=named):
        other.load_state_dict(state)
    assert other.tasks() == ()


def test_exponential_means_of_another_decay_are_refused_at_load() -> None:
    collector = FisherCollector(network(), accumulate="ema", beta=0.9)
    collector.update(batch())
    with pytest.raises(ConfigError, match="`beta` of the state"):
        FisherCollector(network(), accumulate="ema", beta=0.5).load_state_dict(collector.state_dict())
    with pytest.raises(ConfigError, match="`absent` of the state"):
        FisherCollector(network(), accumulate="ema", beta=0.9, absent="zero").load_state_dict(collector.state_dict())


def test_another_number_of_heads_is_refused_at_load() -> None:
    states = []
    for heads in (2, 3):
        torch.manual_seed(0)
        model = Attending(heads).double()
        collector = FisherCollector(model)
        collector.update((torch.randn(4, 3, 6, dtype=F64), torch.arange(4) % 3))
        states.append(collector.state_dict())
    with pytest.raises(ConfigError, match="has 2 groups, here 3"):
        FisherCollector(Attending(3).double()).load_state_dict(states[0])
    FisherCollector(Attending(3).double()).load_state_dict(states[1])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"heads": 0}, "`heads`"),
        ({"heads": -2}, "`heads`"),
        ({"heads": 2.0}, "`heads`"),
        ({"heads": 4, "kv_heads": 0}, "`kv_heads`"),
        ({"heads": 5, "kv_heads": 2}, "multiple of `kv_heads`"),
        ({"heads": 2, "kv_heads": 3}, "multiple of `kv_heads`"),
        ({"heads": 2, "queries": "0.weight"}, "tuple of names"),
    ],
)
def test_layouts_that_cannot_be(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Heads(**options)


def test_a_bias_has_no_columns() -> None:
    with pytest.raises(ConfigError, match="`0.bias` .* has no columns"):
        FisherCollector(network(), heads=[Heads(2, outputs=("0.bias",))]).update(batch())


def test_several_inputs_are_a_tuple() -> None:
    x, y = batch()
    with pytest.raises(DataError, match=r"give several inputs as \(\(x1, x2\), y\)"):
        FisherCollector(network()).update((x, x, y))


def test_more_groups_than_there_are() -> None:
    with pytest.raises(ConfigError, match="at most the number of groups, 14"):
        FisherCollector(network()).collect([batch()] * 3, top=15)
    collector = FisherCollector(network())
    assert collector.settled is None
    assert collector.collect([batch()] * 9, top=14, patience=2) == 3 and collector.settled is True
    assert collector.collect([batch()] * 2, top=14, patience=2) == 2 and collector.settled is False


def test_sampled_is_the_sketch() -> None:
    assert FisherType.of("sampled") is FisherType.SKETCH
    assert FisherCollector(network(), kind="sampled").kind is FisherType.SKETCH


class Attending(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, heads, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_tensors_by_parameter_end_to_end() -> None:
    torch.manual_seed(0)
    model = Attending().double()
    own = torch.randn(4, 3, 6, dtype=F64), torch.arange(4) % 3
    collector, entries = FisherCollector(model), FisherCollector(model, groups="element")
    collector.update(own, "a")
    entries.update(own, "a")
    fisher, exact = collector.parameters("a"), entries.parameters("a")
    named = dict(model.named_parameters())
    assert {name: value.shape for name, value in fisher.items()} == {n: p.shape for n, p in named.items()}
    fused, blocks = fisher["attention.in_proj_weight"], exact["attention.in_proj_weight"].reshape(6, 3, 6)
    means = blocks.mean((1, 2), keepdim=True).expand(6, 3, 6).reshape(18, 6)
    assert torch.allclose(fused, means, rtol=1e-12)
    for name, value in exact.items():
        assert torch.equal(value, entries.get("a")[f"a|{name}|element"])
    direction = {name: torch.ones_like(p) for name, p in named.items()}
    total = sum(float(value.sum()) for value in exact.values())
    assert fisher_damage(fisher, direction).value == pytest.approx(total, rel=1e-12)
    ewc = EWC(2.0)
    ewc.consolidate("a", fisher, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    assert float(ewc.penalty(model).detach()) == pytest.approx(total, rel=1e-12)
    merged = fisher_weighted_merge([named, named], [fisher, exact])
    assert all(torch.allclose(merged[name], p) for name, p in named.items())
    table = GroupTable.of({name: value for name, value in fisher.items() if value.ndim > 1}, model)
    assert float(table.fisher.sum()) == pytest.approx(sum(float(v.sum()) for v in exact.values() if v.ndim > 1))
    for keyed in (collector.get("a"), collector.get("a", expand=True)):
        with pytest.raises(ConfigError, match=r"FisherCollector\.parameters"):
            GroupTable.of(keyed, model)
    with pytest.raises(ConfigError, match="'b'"):
        collector.parameters("b")
    collector.update((own[0][:0], own[1][:0]), "none")
    with pytest.raises(DataError, match="no unit that counts"):
        collector.parameters("none")


def test_keys_are_part_of_the_face() -> None:
    collector = FisherCollector(network())
    collector.update(batch(), "task_1")
    values = restrict(collector.get("task_1"), group_type="channel")
    old = to_old(values)
    assert list(old) == ["task_1_0.weight", "task_1_2.weight"]
    assert from_old(old, [name for name, _ in network().named_parameters()], "channel") == values
    assert Key.of(next(iter(values))).param == "0.weight"
