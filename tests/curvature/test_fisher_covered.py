"""Parameters that taps cover in part, gradients that are NaN or sparse, inputs that belong to every sample."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import ForeignProduct
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature import OBD, CoupledSamples, CurvatureOperator, CurvatureSource, FisherCollector, with_saliencies
from fxsparse.curvature.taps_statistic import instrument_fisher
from fxsparse.errors import DataError
from fxsparse.nn import masked_weights

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is collected by per-sample", "ignore:.*performance drop", "ignore:.*axes of unknown meaning"
)


class Model(nn.Module):
    """A weight, a vector and two layers."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(4))
        self.a, self.head, self.run = nn.Linear(6, 4), nn.Linear(4, 3), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _with_distances(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) - torch.cdist(x, m.w) + m.head(m.a(x).tanh())


def _with_bilinear(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + F.bilinear(x, x, m.w[:, :, None].expand(3, 6, 6) / 6)


def _bias_written(m: Any, x: Tensor) -> Tensor:
    hidden = x.new_zeros(len(x), 4)
    hidden[:, 1:] = m.a(x)[:, 1:]
    hidden[:, 0] = m.a.bias[0]
    return m.head(hidden.tanh())


def _token_written(m: Any, x: Tensor) -> Tensor:
    hidden = x.new_zeros(len(x), 5, 4)
    hidden[:, 0] = m.v
    hidden[:, 1:] = m.a(x)[:, None]
    return m.head((hidden + m.v).tanh().mean(1))


def _custom(m: Any, x: Tensor) -> Tensor:
    return ForeignProduct.apply(F.pad(torch.tanh(F.linear(x, m.w)), (0, 3)), m.w)


def _last_and_custom(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.pad(torch.tanh(ForeignProduct.apply(x, m.w)), (0, 3)), m.w)


def _in_an_expression(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w * m.v[:3, None]) + F.bilinear(x, x, m.w[:, :, None].expand(3, 6, 6) / 6)


CASES = {
    "in an expression": _in_an_expression,
    "linear and distances": _with_distances,
    "linear and bilinear": _with_bilinear,
    "bias written": _bias_written,
    "token written": _token_written,
    "custom behind linear": _custom,
    "linear behind custom": _last_and_custom,
}


def squares(
    model: nn.Module, args: tuple[Any, ...], y: Tensor, kind: str, own: tuple[bool, ...] = (True,)
) -> dict[str, Tensor]:
    """The diagonal by autograd, one sample and one column of the root of the Hessian after the other."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(len(y)):
        z = model(*(x[n : n + 1] if alone else x for x, alone in zip(args, own, strict=True)))
        p = z.detach().softmax(1)
        if kind == "empirical":
            columns = [p - F.one_hot(y[n : n + 1], 3)]
        else:
            columns = [p[:, c : c + 1].sqrt() * (F.one_hot(torch.tensor([c]), 3) - p) for c in range(3)]
        for column in columns:
            found = torch.autograd.grad(z, parameters, column, retain_graph=True, allow_unused=True)
            for name, g in zip(names, found, strict=True):
                if g is not None:
                    total[name] += g.square() / len(y)
    return total


def made(run: Callable[[Any, Tensor], Tensor]) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Model(run).double(), torch.randn(5, 6, dtype=F64), torch.arange(5) % 3


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("kind", ["empirical", "true"])
@pytest.mark.parametrize("groups", ["element", "auto"])
def test_no_use_is_counted_twice(name: str, kind: str, groups: str) -> None:
    model, x, y = made(CASES[name])
    collector = FisherCollector(model, "cross_entropy", kind, groups=groups)
    collector.update((x, y))
    assert collector._engine.slow
    expected = squares(model, (x,), y, kind)
    for key, value in collector.get().items():
        reference = expected[key.split("|")[1]]
        reference = reference.flatten(1).sum(1) if key.endswith("channel") else reference
        assert torch.allclose(value.view_as(reference), reference, rtol=1e-9, atol=1e-16), key


@pytest.mark.parametrize("name", [name for name in CASES if name != "linear and distances"])
def test_the_diagonal_of_an_operator(name: str) -> None:
    model, x, y = made(CASES[name])
    expected = squares(model, (x,), y, "true")
    operator = CurvatureOperator(model, None, "cross_entropy", [(x, y)], kind="ggn")
    for key, value in operator.space.split(operator.diag()).items():
        assert torch.allclose(value, expected[key], rtol=1e-9, atol=1e-16), key


def test_nan_evidence_is_a_data_error() -> None:
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    sparse = fxsparse.transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (x,), sparsity=0.5)
    collector = FisherCollector(sparse)
    with pytest.raises(DataError, match="gradients in this batch that are NaN or infinite"):
        collector.update((x * float("nan"), y))
    assert collector.tasks() == ()
    source = CurvatureSource(sparse, "cross_entropy", [(x * float("nan"), y)])
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    fxsparse.attach(
        sparse, optimizer, with_saliencies(fxsparse.SET(sparsity=0.5, every=1), drop=OBD(source)), total_steps=10
    )
    before = {name: weight.mask.clone() for name, weight in masked_weights(sparse).items()}
    with pytest.raises(DataError, match="NaN or infinite"):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(sparse(x), y).backward()
            optimizer.step()
    assert all(torch.equal(before[name], weight.mask) for name, weight in masked_weights(sparse).items())


def _bags(sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 3)).double()


class Scaled(nn.Module):
    """A sparse embedding whose weight is read twice, once by no operator that has taps."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.head = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.embedding_bag(ids, self.e.weight, sparse=True, mode="sum"))


def test_sparse_gradients() -> None:
    ids, y = torch.randint(0, 7, (5, 3)), torch.arange(5) % 3
    model = _bags(True)
    collector = FisherCollector(model, groups="element")
    collector.update((ids, y))
    expected = squares(_bags(False), (ids,), y, "empirical")
    for key, value in collector.get().items():
        assert torch.allclose(value.view_as(expected[key.split("|")[1]]), expected[key.split("|")[1]], rtol=1e-9), key
    taps = instrument_fisher(model, (ids,))
    F.cross_entropy(taps.module(ids), y).backward()
    assert torch.allclose(taps.fisher(5)["0.weight"], expected["0.weight"].sum(1), rtol=1e-9)


def test_sparse_gradients_without_taps() -> None:
    torch.manual_seed(0)
    ids, y = torch.randint(0, 7, (5, 3)), torch.arange(5) % 3
    model = Scaled().double()
    collector = FisherCollector(model, groups="element")
    collector.update((ids, y))
    assert "e.weight" in collector._engine.slow
    dense = copy.deepcopy(model)
    dense.forward = lambda ids: dense.head(dense.e.weight[ids].sum(1))  # type: ignore[method-assign]  # no sparse gradient
    expected = squares(dense, (ids,), y, "empirical")
    for key, value in collector.get().items():
        assert torch.allclose(value.view_as(expected[key.split("|")[1]]), expected[key.split("|")[1]], rtol=1e-9), key


class Positions(nn.Module):
    """Position numbers and a mask of positions are inputs that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.p = nn.Embedding(11, 6), nn.Embedding(16, 6)
        self.a, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, ids: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        x = self.e(ids) + self.p(places)
        return self.head(self.a(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))


def _positions(n: int, t: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    mask = torch.ones(t, t, dtype=torch.bool).triu(1)
    return (torch.randint(0, 11, (n, t)), torch.arange(t), mask), torch.arange(n) % 3


@pytest.mark.parametrize(
    "sizes", [[(5, 5)], [(3, 3)], [(1, 1)], [(2, 2), (4, 4)], [(5, 4), (5, 5), (4, 4)], [(4, 2), (9, 4)]]
)
@pytest.mark.parametrize("chunk", [None, 4])
def test_inputs_of_every_sample(sizes: list[tuple[int, int]], chunk: int | None) -> None:
    torch.manual_seed(0)
    model = Positions().double().eval()
    collector = FisherCollector(model, groups="element", chunk=chunk)
    for k, (n, t) in enumerate(sizes):
        inputs, y = _positions(n, t)
        collector.update((inputs, y), str(k))
        expected = squares(model, inputs, y, "empirical", (True, False, False))
        for key, value in collector.get(str(k)).items():
            reference = expected[key.split("|")[1]]
            assert torch.allclose(value.view_as(reference), reference, rtol=1e-9, atol=1e-16), key


class Mixed(nn.Module):
    """Samples are mixed, whatever belongs to whom."""

    def __init__(self, by: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.by = nn.Linear(6, 3), by

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        return self.head(self.by(x, u))


def test_inputs_that_may_be_meant_are_named() -> None:
    x, y = torch.randn(5, 6, dtype=F64), torch.arange(5) % 3
    mixed = Mixed(lambda x, u: x + u - (x + u).mean(0)).double()
    with pytest.raises(CoupledSamples, match=r"`args\[0\]`, `args\[1\]`, which have as many rows .*\(=5\)"):
        FisherCollector(mixed).update(((x, torch.randn(5, 6, dtype=F64)), y))
    u = torch.randn(5, 6, dtype=F64)
    for by in (lambda x, u: x * u.view(5, 6), lambda x, u: x * u.view(5, 6)[: len(x)]):
        with pytest.raises(DataError, match=r"`args\[0\]`, `args\[1\]`, which have as many rows .*of another size"):
            FisherCollector(Mixed(by).double()).update(((x, u), y))
