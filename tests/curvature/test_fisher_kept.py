"""What a model changes when it is run: a collection gives all of it back."""

from __future__ import annotations

import gc
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import LastStep
from fisher_oracle import fisher
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature import CurvatureOperator, FisherCollector
from fxsparse.curvature.kept_state import KeptParameters, kept_attributes
from fxsparse.errors import DataError
from fxsparse.graph.writes import ParameterWrites
from fxsparse.nn import masked_weights

F64 = torch.float64
Y = torch.tensor([0, 1, 2, 0, 1])


def inputs() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=F64)


class Restless(nn.Module):
    """Changes itself in every way that its results do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        for name, buffer in (
            ("count", torch.zeros(())), ("seen", torch.zeros(3, dtype=torch.bool)), ("mean", torch.zeros(4)),
            ("bits", torch.zeros(2, dtype=torch.uint8)), ("nan", torch.full((2,), torch.nan)),
        ):  # fmt: skip
            self.register_buffer(name, buffer)
        self.calls, self.cache = 0, None
        self.history: list[int] = [7]
        self.nested: dict[str, Any] = {"inner": [[1]], "tuple": ([2], torch.zeros(2))}
        self.kinds = [OrderedDict(a=1), defaultdict(int, a=1), Counter("ab"), deque([1, 2], maxlen=2), {1}]
        self.plain = torch.arange(3.0)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        self.count = self.count + 1
        self.seen.fill_(True)
        self.mean.data.copy_(h.detach().mean(0))
        self.bits += 1
        self.calls += 1
        self.cache = h
        self.extra = h
        self.history.append(len(self.history))
        self.nested["inner"][0].append(3)
        self.nested["tuple"][0][:] = [4, 5]
        self.nested["tuple"][1].add_(1)
        self.nested["new"] = 1
        for kind in self.kinds[:3]:
            kind["b"] = 5
        self.kinds[3].append(3)
        self.kinds[4].add(2)
        self.plain.data += 1
        return self.head(h)


def told(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), value.dtype, value.tolist() if not value.is_floating_point() else value.nan_to_num().tolist()
    if isinstance(value, dict):
        return [(key, told(each)) for key, each in value.items()]
    if isinstance(value, list | tuple | deque):
        return [told(each) for each in value]
    return value if isinstance(value, int | str | set | None) else id(value)


def everything(model: nn.Module) -> Any:
    return [[(name, told(value)) for name, value in module.__dict__.items()] for module in model.modules()]


@pytest.mark.parametrize(
    "run",
    [
        lambda model, batch: FisherCollector(model).update(batch),
        lambda model, batch: FisherCollector(model, kind="true", unit="token").update(batch),
        lambda model, batch: FisherCollector(model).oneshot(batch),
        lambda model, batch: CurvatureOperator(model, None, "cross_entropy", [batch]).diag(),
    ],
)
def test_attributes_and_buffers_are_given_back(run: Callable[[nn.Module, Any], Any]) -> None:
    torch.manual_seed(0)
    model = Restless().double()
    before = everything(model)
    run(model, (inputs(), Y))
    assert everything(model) == before


def test_they_are_given_back_after_an_exception() -> None:
    model = Restless().double()
    before = everything(model)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        FisherCollector(model, loss).update((inputs(), Y))
    assert everything(model) == before


def test_a_cached_activation_does_not_live_on() -> None:
    made: list[weakref.ref[Tensor]] = []

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.cache = nn.Linear(6, 3), None

        def forward(self, x: Tensor) -> Tensor:
            self.cache = x * 2
            made.append(weakref.ref(self.cache))
            return self.head(self.cache)

    model = Caching().double()
    FisherCollector(model).update((inputs(), Y))
    gc.collect()
    assert model.cache is None and made and not any(each() is not None for each in made)


def test_a_buffer_that_changes_its_shape_is_given_back() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)
            self.register_buffer("held", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.held.data = torch.ones(len(x))
            return self.head(x)

    model = Growing().double()
    FisherCollector(model).update((inputs(), Y))
    assert model.held.tolist() == [0, 0]


def test_what_did_not_change_is_not_written() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()
    versions = [each._version for each in (*model.buffers(), *model.parameters())]
    FisherCollector(model).update((inputs(), Y))
    assert [each._version for each in (*model.buffers(), *model.parameters())] == versions


def test_masks_are_not_copied() -> None:
    model = fxsparse.transform(nn.Linear(64, 64), (torch.randn(1, 64),), sparsity=0.5)
    (weight,) = masked_weights(model).values()
    with kept_attributes(model):
        weight.mask[0] = ~weight.mask[0]
        changed = weight.mask.clone()
    assert torch.equal(weight.mask, changed)  # nobody's forward pass writes there


class Bounded(nn.Module):
    """Embeddings that a forward pass rescales, and a weight that it clamps."""

    def __init__(self, data: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, max_norm=0.5)
        self.gain, self.head, self.data = nn.Parameter(torch.linspace(-1, 1, 4)), nn.Linear(4, 3), data

    def forward(self, ids: Tensor) -> Tensor:
        if self.data:
            self.gain.data.clamp_(min=0)
        else:
            with torch.no_grad():
                self.gain.clamp_(min=0)
        return self.head(torch.tanh(self.embedding(ids).mean(1) * self.gain))


@pytest.mark.filterwarnings("ignore:.*collected by per-sample gradients", "ignore:There is a performance drop")
@pytest.mark.parametrize("data", [False, True])
def test_parameters_that_the_model_writes_into_are_given_back(data: bool) -> None:
    torch.manual_seed(0)
    model = Bounded(data).double()
    ids = torch.randint(0, 7, (5, 3))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rescaled = Bounded(data).double()
    rescaled.load_state_dict(model.state_dict())
    rescaled(torch.arange(7)[None])  # the fixed point of its own forward pass
    oracle = fisher(rescaled, (ids,), Y, F.cross_entropy, "empirical")
    collector = FisherCollector(model, groups="element")
    for _ in range(3):
        collector.update((ids, Y))
        assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    for name, value in oracle.items():
        assert torch.allclose(collector.get()[f"default|{name}|element"], value, rtol=1e-10, atol=1e-16), name


@pytest.mark.filterwarnings("ignore:.*collected by per-sample gradients", "ignore:There is a performance drop")
def test_bags_of_embeddings_are_given_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(7, 4, max_norm=0.5, mode="sum"), nn.Linear(4, 3)).double()
    before = model[0].weight.detach().clone()
    ids = torch.randint(0, 7, (5, 3))
    kept = KeptParameters(model)
    for _ in range(2):
        with kept.kept():
            model(ids)
            assert not torch.equal(before, model[0].weight)
        assert torch.equal(before, model[0].weight)


def test_tables_that_nobody_writes_into_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    undo = ParameterWrites.undo
    monkeypatch.setattr(ParameterWrites, "undo", lambda self: (copied.extend(self.saved), undo(self))[1])
    for bound in (None, 0.5):
        model = nn.Sequential(nn.Embedding(7, 4, max_norm=bound), nn.Flatten(), nn.Linear(12, 3))
        with KeptParameters(model).kept():
            model(torch.randint(0, 7, (5, 3)))
        assert copied == ([] if bound is None else ["0.weight"])


def test_they_are_given_back_after_an_exception_too() -> None:
    model = nn.Linear(2, 2)
    kept = KeptParameters(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        with pytest.raises(KeyError), kept.kept(), torch.no_grad():
            model.weight.mul_(2)
            raise KeyError
        with kept.kept(), torch.no_grad():
            model.weight.mul_(2)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_parameter_that_is_written_into_for_the_first_time_is_named() -> None:
    model = nn.Linear(2, 2)
    kept = KeptParameters(model)
    with kept.kept():
        pass
    with pytest.warns(UserWarning, match="wrote into its parameter `bias`"), kept.kept(), torch.no_grad():
        model.bias.add_(1)
    before = model.bias.detach().clone()
    with kept.kept(), torch.no_grad():
        model.bias.add_(1)
    assert torch.equal(before, model.bias)


def test_what_a_failed_batch_taught_is_forgotten() -> None:
    """The plan made for batches of another length goes again, with what was learnt of slow parameters."""
    torch.manual_seed(0)

    model = LastStep().double()
    good = torch.randn(4, 3, 6, dtype=F64), torch.tensor([0, 1, 2, 0])
    longer = torch.randn(4, 5, 6, dtype=F64), torch.tensor([0, 1, 2, 0])
    broken = longer[0].clone(), longer[1]
    broken[0][3] = torch.nan  # beyond the samples that are examined
    collector = FisherCollector(model)
    with pytest.raises(DataError, match="NaN"):
        collector.update(broken)
    engine = collector._engine
    assert (engine._plans, engine.groupings, engine.slow) == ([], {}, {})
    collector.update(good)
    plans, groupings, slow = list(engine._plans), engine.groupings, dict(engine.slow)
    with pytest.raises(DataError, match="NaN"):
        collector.update(broken)
    assert engine._plans == plans and engine.groupings is groupings and engine.slow == slow
    collector.update(longer)
    assert len(engine._plans) == len(plans) + 1
    fresh = FisherCollector(model)
    fresh.update(good)
    fresh.update(longer)
    assert all(torch.equal(value, fresh.get()[key]) for key, value in collector.get().items())


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*collected by per-sample gradients")
def test_warnings_of_a_failed_batch_come_again() -> None:
    """Which parameters have no taps is forgotten with the batch that told it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Bilinear(3, 3, 3)).double()
    model.forward = lambda x: model[1](*model[0](x).chunk(2, -1))  # type: ignore[method-assign]
    x, y = torch.randn(4, 6, dtype=F64), torch.tensor([0, 1, 2, 0])
    broken = x.clone()
    broken[3] = torch.nan
    collector = FisherCollector(model, groups="element")
    for batch in (broken, x):
        with pytest.warns(UserWarning, match="`1.weight` is collected by per-sample gradients"):
            if batch is broken:
                with pytest.raises(DataError, match="NaN"):
                    collector.update((batch, y))
                assert collector._engine.slow == {}
            else:
                collector.update((batch, y))
    assert "1.weight" in collector._engine.slow


class Meddling(nn.Module):
    """Writes into layers of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        self.a.notes, self.head.pair = [1], (torch.zeros(2), 3)  # type: ignore[assignment]  # as users do

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        self.a.notes.append(2)  # type: ignore[operator, union-attr]  # a list
        self.head.pair[0].add_(1)  # type: ignore[index, operator, union-attr]  # a tuple
        self.head.cache = h
        return self.head(h)


def test_what_stands_at_plain_layers_is_given_back() -> None:
    model = Meddling().double()
    FisherCollector(model).update((inputs(), Y))
    assert model.a.notes == [1] and model.head.pair[0].tolist() == [0, 0] and not hasattr(model.head, "cache")
