"""Where the samples lie: found at weights of zero too, and checked again where the data tell it."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import ForeignProduct
from fisher_oracle import fisher
from torch import Tensor, nn

from fxsparse.curvature import CurvatureOperator, FisherCollector
from fxsparse.curvature.taps_checked import checked
from fxsparse.curvature.taps_layout import Layout
from fxsparse.curvature.taps_mode import TapMode
from fxsparse.curvature.taps_pass import TapPass
from fxsparse.curvature.taps_rules import RULES
from fxsparse.curvature.taps_statistic import instrument_fisher

F64 = torch.float64
SLOW = pytest.mark.filterwarnings("ignore:.*is collected by per-sample", "ignore:.*performance drop")


def summed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum")


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {key.split("|")[1] for key in found} == set(expected)
    for key, value in found.items():
        name = key.split("|")[1]
        assert torch.allclose(value.view_as(expected[name]), expected[name], rtol=1e-9, atol=1e-16), key


class TimeFirst(nn.Module):
    """Positions before samples on one axis; the head is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        return self.head(torch.tanh(self.a(x.transpose(0, 1).reshape(t * n, -1))).view(t, n, -1).mean(0))


class LowRank(nn.Module):
    """A frozen layer with an addition of rank 2, one of whose factors is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        x = x.transpose(0, 1).reshape(t * n, -1)
        return self.head(torch.tanh(self.base(x) + x @ self.down.T @ self.up.T).view(t, n, -1).mean(0))


class Frames(nn.Module):
    """Images of several times, times first; the norm's factor is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 3)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        images = x.transpose(0, 1).reshape(t * n, 2, 1, 3)
        return self.head(self.norm(self.conv(images)).view(t, n, 3, 3).mean((0, 3)))


class Scaled(nn.Module):
    """A branch with times first, whose scale is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=False)
        self.scale, self.head = nn.Parameter(torch.zeros(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.head((x + self.scale * self.layer(x)).mean(0))


ZERO: dict[str, Callable[[], nn.Module]] = {
    "head": TimeFirst,
    "low rank": LowRank,
    "norm over frames": Frames,
    "layer scale": Scaled,
}


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().eval()


def opened(model: nn.Module) -> None:
    """No weight is zero any more."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.copy_(torch.randn_like(parameter))


def reference(model: nn.Module, inputs: tuple[Any, ...], y: Tensor, kind: str = "empirical") -> dict[str, Tensor]:
    found = fisher(model, inputs, y, summed, kind)
    return {name: found[name] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", list(ZERO))
@pytest.mark.parametrize(("n", "t", "later"), [(6, 4, (6, 4)), (4, 6, (6, 6)), (3, 3, (8, 8)), (1, 4, (2, 5))])
def test_weights_of_zero_hide_nothing(name: str, n: int, t: int, later: tuple[int, int]) -> None:
    model = made(ZERO[name])
    collector = FisherCollector(model, groups="element")
    first, second = (torch.randn(*size, 6, dtype=F64) for size in ((n, t), later))
    collector.update((first, torch.arange(n) % 3), "zero")
    opened(model)
    y = torch.arange(len(second)) % 3
    collector.update((second, y), "open")
    equal(collector.get("open"), reference(model, (second,), y))


@pytest.mark.parametrize("name", ["low rank", "layer scale"])
def test_an_operator_is_kept_while_weights_leave_zero(name: str) -> None:
    model = made(ZERO[name])
    x, y = torch.randn(6, 6, 6, dtype=F64), torch.arange(6) % 3
    operator = CurvatureOperator(model, None, "cross_entropy", [(x, y)], kind="empirical")
    operator.diag()
    opened(model)
    equal({f"|{k}": v for k, v in operator.space.split(operator.diag()).items()}, reference(model, (x,), y))


class Gated(nn.Module):
    """Samples whose first entry is not positive send no gradient back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        hidden = torch.tanh(self.a(x.transpose(0, 1).reshape(t * n, -1))).view(t, n, -1)
        return self.head((hidden * F.relu(x[:, 0, :1])).mean(0))


@pytest.mark.parametrize("closed", [3, 7, 8])
def test_samples_without_gradients_hide_nothing(closed: int) -> None:
    model = made(Gated)
    x, y = torch.randn(8, 4, 6, dtype=F64), torch.arange(8) % 3
    x[:, 0, 0] = 1.0
    x[:closed, 0, 0] = -1.0
    collector = FisherCollector(model, groups="element")
    collector.update((x, y))
    equal(collector.get(), reference(model, (x,), y))


class HiddenUse(nn.Module):
    """A weight that torch's operators and a custom function read, behind a head of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(ForeignProduct.apply(torch.tanh(F.linear(x, self.w)), self.w)))


@SLOW
def test_uses_without_taps_are_missed_at_zero_gradients_too() -> None:
    model = made(HiddenUse)
    x, y = torch.randn(5, 6, dtype=F64), torch.arange(5) % 3
    collector = FisherCollector(model, groups="element")
    collector.update((x, y), "zero")
    opened(model)
    collector.update((x, y), "open")
    total: dict[str, Tensor] = {}
    for n in range(5):
        names, own = zip(*model.named_parameters(), strict=True)
        for name, g in zip(names, torch.autograd.grad(summed(model(x[n : n + 1]), y[n : n + 1]), own), strict=True):
            total[name] = total.get(name, torch.zeros_like(g)) + g.square() / 5
    equal(collector.get("open"), total)


class Tokens(nn.Module):
    """Two layers for tokens, on which the cases below work in an order of their own."""

    def __init__(self, run: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head, self.run = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3), run

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.run(self, x, lengths))

    def both(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))


def _valid(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[None] < lengths[:, None]


def _unpadded(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    mask = _valid(x, lengths)
    full = x.new_zeros(*mask.shape, 5)
    return full.masked_scatter(mask[..., None].expand_as(full), m.both(x[mask])).mean(1)


def _unpadded_by_numbers(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    sizes = lengths.tolist()
    hidden = m.both(torch.cat([row[:size] for row, size in zip(x, sizes, strict=True)]))
    return torch.stack([part.mean(0) for part in hidden.split(sizes)])


def _unpadded_in_place(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    mask = _valid(x, lengths)
    full = x.new_zeros(*mask.shape, 5)
    full[mask] = m.both(x[mask])
    return full.mean(1)


def _routed(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    flat = torch.tanh(m.a(x)).flatten(0, 1)
    taken = (flat[:, 0] > 0).nonzero()[:, 0]
    return flat.index_add(0, taken, torch.tanh(m.b(flat[taken]))).view(len(x), -1, 5).mean(1)


def _ranks(values: Tensor) -> Tensor:
    """The place of each value in their order, without sorting."""
    one, two, number = values[:, None], values[None], torch.arange(len(values))
    return ((one > two) | ((one == two) & (number[:, None] > number[None]))).sum(1)


def _dispatched(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    flat = torch.tanh(m.a(x)).flatten(0, 1)
    order = F.one_hot(_ranks(flat[:, 0]), len(flat)).to(flat)
    return (order @ torch.tanh(m.b(order.T @ flat))).view(len(x), -1, 5).mean(1)


def _dispatched_by_einsum(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    flat = torch.tanh(m.a(x)).flatten(0, 1)
    order = (_ranks(flat[:, 0])[:, None] == torch.arange(len(flat))).to(flat)
    hidden = torch.tanh(m.b(torch.einsum("ts,td->sd", order, flat)))
    return torch.einsum("ts,sd->td", order, hidden).view(len(x), -1, 5).mean(1)


def _written(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    hidden = torch.tanh(m.a(x)).mean(1)
    ranks = _ranks(hidden[:, 0])
    return torch.tanh(m.b(hidden)) + torch.tanh(m.b(torch.zeros_like(hidden).index_copy(0, ranks, hidden)))[ranks]


def _assigned(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    hidden = torch.tanh(m.a(x)).mean(1)
    ranks, full = _ranks(hidden[:, 0]), torch.zeros_like(hidden)
    full[ranks] = hidden
    return torch.tanh(m.b(hidden)) + torch.tanh(m.b(full))[ranks]


def _sorted(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    hidden = torch.tanh(m.a(x)).mean(1)
    order = hidden[:, 0].argsort()
    return torch.tanh(m.b(torch.tanh(m.b(hidden)) + torch.tanh(m.b(hidden[order]))[order.argsort()]))


def _repeated(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    rows = torch.repeat_interleave(torch.arange(len(x)), lengths)
    hidden = torch.tanh(m.b(torch.tanh(m.a(torch.repeat_interleave(x.mean(1), lengths, dim=0)))))
    return torch.zeros(len(x), 5, dtype=x.dtype).index_add(0, rows, hidden)


def _branched(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    if bool((lengths == lengths[0]).all()):
        return m.both(x.flatten(0, 1)).view(len(x), -1, 5).mean(1)
    return m.both(x.transpose(0, 1).flatten(0, 1)).view(-1, len(x), 5).mean(0)


MOVED: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "unpadded": _unpadded,
    "unpadded by numbers": _unpadded_by_numbers,
    "unpadded in place": _unpadded_in_place,
    "routed": _routed,
    "dispatched": _dispatched,
    "dispatched by einsum": _dispatched_by_einsum,
    "sorted": _sorted,
    "written": _written,
    "assigned": _assigned,
    "repeated": _repeated,
    "branched": _branched,
}
LENGTHS = [
    ([6, 6, 6, 6], [6, 2, 3, 5]),
    ([6, 6, 6, 5, 4, 3], [6, 6, 6, 5, 4, 3]),
    ([2], [3, 1]),
    ([3] * 4, [5, 1, 3, 3]),
]


@SLOW
@pytest.mark.parametrize("name", list(MOVED))
@pytest.mark.parametrize(("first", "second"), LENGTHS)
def test_samples_that_lie_where_the_data_tell(name: str, first: list[int], second: list[int]) -> None:
    model = made(lambda: Tokens(MOVED[name]))
    collector = FisherCollector(model, groups="element")
    for task, lengths in (("first", first), ("second", second), ("again", first)):
        inputs = torch.randn(len(lengths), 6, 6, dtype=F64), torch.tensor(lengths)
        if task == "first" and name in ("sorted", "written", "assigned"):  # an order that changes nothing
            inputs = inputs[0][torch.tanh(model.a(inputs[0])).mean(1)[:, 0].argsort()], inputs[1]
        if task == "first" and name.startswith("dispatched"):
            flat = inputs[0].flatten(0, 1)
            inputs = flat[torch.tanh(model.a(flat))[:, 0].argsort()].view_as(inputs[0]), inputs[1]
        y = torch.arange(len(lengths)) % 3
        collector.update((inputs, y), task)
        equal(collector.get(task), reference(model, inputs, y))


@SLOW
@pytest.mark.parametrize("seed", range(6))
def test_an_order_that_is_drawn_is_no_place(seed: int) -> None:
    def shuffled(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        hidden = torch.tanh(m.a(x)).mean(1)
        order = torch.randperm(len(x))
        return torch.tanh(m.b(hidden)) + torch.tanh(m.b(hidden[order]))[order.argsort()]

    model = made(lambda: Tokens(shuffled))
    torch.manual_seed(seed)
    collector = FisherCollector(model, groups="element")
    for n in (2, 6):
        inputs, y = (torch.randn(n, 3, 6, dtype=F64), torch.full((n,), 3)), torch.arange(n) % 3
        collector.update((inputs, y), str(n))
        equal(collector.get(str(n)), reference(model, inputs, y))


@SLOW
@pytest.mark.parametrize("kind", ["empirical", "ggn"])
def test_the_diagonal_of_an_operator_where_the_data_tell(kind: str) -> None:
    model = made(lambda: Tokens(_unpadded))
    lengths = torch.tensor([6, 6, 6, 5, 4, 3])
    inputs, y = (torch.randn(6, 6, 6, dtype=F64), lengths), torch.arange(6) % 3
    operator = CurvatureOperator(model, None, "cross_entropy", [(inputs, y)], kind=kind)
    found = {f"|{name}": value for name, value in operator.space.split(operator.diag()).items()}
    equal(found, reference(model, inputs, y, "empirical" if kind == "empirical" else "true"))


class Common(nn.Module):
    """Embeddings, position numbers, a mask, attention, an early metric and a branch, none of which moves samples."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 6), nn.Embedding(9, 6)
        self.register_buffer("table", torch.randn(9, 6))
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.conv, self.head, self.best = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 3), torch.zeros(())

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        places = mask.cumsum(1) - 1
        x = self.tokens(ids) + self.places(places.clamp_min(0)) + self.table[places]
        self.best = x.detach().topk(2).values.sum()
        if bool(mask.all()):
            x = x * 1.0
        x = x.masked_fill(~mask[..., None], 0.0)
        x[~mask] = 0.0
        x = self.conv(self.block(x, src_key_padding_mask=~mask).transpose(1, 2)).transpose(1, 2)
        return self.head(x.amax(1))


def passes(collector: FisherCollector, batch: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    count = 0
    original = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counted)
        collector.update(batch)
    return count


def test_common_models_are_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Common)
    collector = FisherCollector(model)
    y = torch.arange(7) % 3
    whole, padded = (
        torch.ones(7, 5, dtype=torch.bool),
        torch.arange(5)[None] < torch.tensor([5, 5, 5, 4, 2, 3, 1])[:, None],
    )
    counts = []
    for mask in (whole, whole, padded, padded, whole):
        batch = (torch.randint(0, 11, (7, 5)), mask), y
        counts.append(passes(collector, batch, monkeypatch))
    assert counts[1:] == [1, 3, 1, 1]  # a branch that was not taken before is checked once


@SLOW
def test_what_picks_entries_is_checked_in_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(lambda: Tokens(lambda m, x, lengths: m.both(x)[torch.arange(len(x)), lengths - 1]))
    collector = FisherCollector(model)
    for n in (4, 17, 300):
        batch = (torch.randn(n, 6, 6, dtype=F64), torch.arange(n) % 6 + 1), torch.arange(n) % 3
        collector.update(batch)
        rounds = 1 if n <= 16 else 2 if n <= 256 else 3
        assert passes(collector, batch, monkeypatch) == 1 + 1 + rounds
    assert not collector._engine.slow


class Branch(nn.Module):
    """Padded batches go through one more operator."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale, self.head = nn.Linear(6, 5), nn.Parameter(torch.randn(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        if not bool(mask.all()):
            hidden = torch.where(mask[..., None], hidden, self.scale)
        return self.head(hidden.sum(1))


@pytest.mark.parametrize("padded", [slice(0, 1), slice(4, 6), slice(2, 3)])
def test_a_branch_that_few_samples_take(padded: slice) -> None:
    model = made(Branch)
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[padded, 2:] = False
    inputs, y = (torch.randn(6, 4, 6, dtype=F64), mask), torch.arange(6) % 3
    collector = FisherCollector(model, groups="element")
    collector.update((inputs, y))
    total: dict[str, Tensor] = {}
    for n in range(6):
        hidden = torch.tanh(model.a(inputs[0][n]))
        z = model.head(torch.where(mask[n, :, None], hidden, model.scale).sum(0, keepdim=True))
        names, own = zip(*model.named_parameters(), strict=True)
        for name, g in zip(names, torch.autograd.grad(summed(z, y[n : n + 1]), own), strict=True):
            total[name] = total.get(name, torch.zeros_like(g)) + g.square() / 6
    equal(collector.get(), total)
    assert not collector._engine.slow


@pytest.mark.parametrize("n", [2, 5, 16, 17, 40])
def test_a_check_tells_any_two_samples_apart(n: int) -> None:
    layer = nn.Linear(3, 2).double()
    x = torch.randn(n, 3, dtype=F64)
    pairs = list(itertools.combinations(range(n), 2))
    for one, two in [(0, 0), *pairs[:: max(1, len(pairs) // 25)], pairs[-1]]:
        order = torch.arange(n)
        order[one], order[two] = two, one
        mode = TapMode(dict(layer.named_parameters()), [], RULES, lambda *_: None, {}, watched={0})
        with mode:
            z = layer(mode.data(x))[order] * 1e-3
        run = TapPass(mode, z, n, {}, edges=mode.edges)
        mode.edges = {}
        found = checked(run, {0: [Layout(0)]})[0]
        assert (found.layouts, found.samples) == (([Layout(0)], n) if one == two else ([], 0))


@SLOW
def test_checks_leave_nothing_alive() -> None:
    model = made(lambda: Tokens(_unpadded))
    alive: list[weakref.ref[Tensor]] = []
    model.b.register_forward_hook(lambda module, args, y: alive.append(weakref.ref(y)))
    collector = FisherCollector(model)
    for lengths in ([6, 6, 6, 6], [6, 2, 3, 5]):
        collector.update(((torch.randn(4, 6, 6, dtype=F64), torch.tensor(lengths)), torch.arange(4) % 3))
    gc.collect()
    assert alive and not any(each() is not None for each in alive)
    assert not [each for each in gc.get_objects() if type(each) is TapMode]


@pytest.mark.parametrize("name", ["head", "layer scale", "norm over frames"])
def test_instrumented_at_zero(name: str) -> None:
    model = made(ZERO[name])
    taps = instrument_fisher(model, (torch.randn(3, 3, 6, dtype=F64),))
    opened(model)
    x, y = torch.randn(8, 8, 6, dtype=F64), torch.arange(8) % 3
    F.cross_entropy(taps.module(x), y).backward()
    expected = reference(model, (x,), y)
    found = taps.fisher(8)
    assert found
    for key, value in found.items():
        total = expected[key.split("|")[0]].sum()
        if "|" not in key:
            assert torch.allclose(value.sum(), total, rtol=1e-9), key


class Bags(nn.Module):
    """Chosen entries go through a layer; example inputs choose one of each sample."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.a, self.b, self.head, self.by = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3), by

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        moved = torch.tanh(self.b(hidden[chosen]))
        full = torch.zeros_like(hidden).masked_scatter(chosen.unsqueeze(-1).expand(hidden.size()), moved)
        return self.head(full.sum(1))


def test_instrumented_refuses_by_name_where_the_data_tell() -> None:
    model = made(lambda: Bags("mask"))
    chosen = torch.zeros(3, 4, dtype=torch.bool)
    chosen[:, 1] = True
    taps = instrument_fisher(model, (torch.randn(3, 4, 6, dtype=F64), chosen))
    assert {"b.weight", "b.bias"} <= set(taps.refused)
    assert "values of the inputs tell where samples lie" in taps.refused["b.weight"]
    assert set(taps.statistics) == {"a.weight", "a.bias"}
    x, y = torch.randn(5, 4, 6, dtype=F64), torch.arange(5) % 3
    chosen = torch.rand(5, 4) > 0.4
    F.cross_entropy(taps.module(x, chosen), y).backward()
    expected = reference(model, (x, chosen), y)
    assert torch.allclose(taps.fisher(5)["a.weight"], expected["a.weight"].sum(1), rtol=1e-9)


class Numbered(nn.Module):
    """Python reads numbers of entries out of the inputs and calls a part of the model with them."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 3))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        sizes = lengths.tolist()
        hidden = self.part(torch.cat([row[:size] for row, size in zip(x, sizes, strict=True)]))
        return self.head(torch.stack([part.mean(0) for part in hidden.split(sizes)]))


def test_instrumented_refuses_by_name_behind_numbers() -> None:
    model = made(Numbered)
    with pytest.raises(Exception, match="no layer to tap.*values of the inputs tell where samples lie"):
        instrument_fisher(model, (torch.randn(3, 4, 6, dtype=F64), torch.ones(3, dtype=torch.int64)))
