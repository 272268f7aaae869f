"""Inputs that belong to all samples and are as long as the batch: told from rows of samples before samples are cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxsparse.curvature import FisherCollector
from fxsparse.curvature.fisher_types import CoupledSamples
from fxsparse.curvature.operator import CurvatureOperator
from fxsparse.errors import DataError
from tests.curvature import operator_oracle as oracle
from tests.curvature.test_operator_input import drawn, near


class Attending(nn.Module):
    """Tokens, and positions and a bias that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place, self.head = nn.Embedding(5, 4), nn.Embedding(4, 4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, tokens: Tensor, places: Tensor, bias: Tensor) -> Tensor:
        h = self.token(tokens) + self.place(places)
        return self.head(self.attention(h, h, h, attn_mask=bias, need_weights=False)[0].mean(1))


class Asked(nn.Module):
    """A table of questions, which all samples share, comes first; each sample answers all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, table: Tensor, x: Tensor) -> Tensor:
        scores = self.key(x) @ self.query(table).T  # [N, questions]
        return self.head((scores.softmax(-1) @ table.new_ones(len(table), 4)).tanh() + scores @ self.query(table))


class Scaled(nn.Module):
    """A scale of features: broadcast where it is cut, so that no shape tells."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.last((self.first(x) * scale).tanh())


class First(nn.Module):
    """A table of which only the first rows are read, whichever samples there are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.head(self.layer(x + table[:1]).tanh())


class Bound(nn.Module):
    """A model whose shared inputs are given."""

    def __init__(self, model: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.model, x)


def cases(kind: str, sizes: tuple[int, ...]) -> tuple[nn.Module, nn.Module, list[Any], Tensor, Tensor]:
    """A model, the same with its shared inputs bound, batches, and all samples and labels."""
    torch.manual_seed(0)
    length = 4 if kind != "scaled" else 3
    source = torch.Generator().manual_seed(1)
    xs = [
        torch.randint(0, 5, (n, 4), generator=source)
        if kind == "attending"
        else torch.randn(n, 5 if kind == "asked" else 3, generator=source, dtype=torch.float64)
        for n in sizes
    ]
    ys = [torch.randint(0, 3, (n,), generator=source) for n in sizes]
    table = torch.randn(length, length if kind == "attending" else 3, generator=source, dtype=torch.float64)
    model: nn.Module
    if kind == "attending":
        model, places = Attending().double(), torch.arange(4)
        data = [((x, places, table), y) for x, y in zip(xs, ys, strict=True)]
        bound = Bound(model, lambda m, x: m(x, places, table))
    elif kind == "asked":
        model = Asked().double()
        data = [((table, x), y) for x, y in zip(xs, ys, strict=True)]
        bound = Bound(model, lambda m, x: m(table, x))
    elif kind == "scaled":
        model, scale = Scaled().double(), table[0]
        data = [(((x,), {"scale": scale}), y) for x, y in zip(xs, ys, strict=True)]
        bound = Bound(model, lambda m, x: m(x, scale=scale))
    else:
        model = First().double()
        data = [({"x": x, "table": table}, y) for x, y in zip(xs, ys, strict=True)]
        bound = Bound(model, lambda m, x: m(x, table))
    return model, bound, data, torch.cat(xs), torch.cat(ys)


SIZES = [("attending", 4), ("asked", 4), ("scaled", 3), ("first", 4)]
LOADERS = [(sizes, kind) for kind, n in SIZES for sizes in ((n,), (2, n), (n, n + 1, n))]


@pytest.mark.parametrize(("sizes", "kind"), LOADERS)
@pytest.mark.parametrize("curvature", ["ggn", "empirical"])
def test_every_path_reads_them_as_shared(sizes: tuple[int, ...], kind: str, curvature: str) -> None:
    model, bound, data, x, y = cases(kind, sizes)
    expected = oracle.dense(bound, (x,), y, oracle.cross_entropy, curvature)
    v = drawn(len(expected), 3, seed=2)
    for chunk in (None, 1, 2):
        for check in (True, False):
            op = CurvatureOperator(model, None, "cross_entropy", data, curvature, chunk=chunk, check=check)
            near(op.mv(v[:, 0]), expected @ v[:, 0])
    for chunk in (None, 2):

        def fresh(chunk: int | None = chunk, **options: Any) -> CurvatureOperator:
            return CurvatureOperator(model, None, "cross_entropy", data, curvature, chunk=chunk, check=False, **options)

        near(fresh().mm(v), expected @ v)
        assert fresh().quadform(v[:, 1]) == pytest.approx(float(v[:, 1] @ expected @ v[:, 1]), rel=1e-10)
        near(fresh().diag(), expected.diagonal())
        near(fresh().diag(chunk=1), expected.diagonal())
        near(fresh().dense(), expected)
        name = "head.weight" if kind != "scaled" else "last.weight"
        place = fresh().space.slice_of(name)
        near(fresh().block([name]), expected[place, place])
        assert fresh().trace().value == pytest.approx(float(expected.trace()), rel=1e-10)
        largest = torch.linalg.eigvalsh(expected)[-1]
        near(fresh().eigs(1, tol=1e-10).values[0], largest, 1e-8)
        support = drawn(len(expected), seed=3) > 0
        kept = torch.where(support[:, None] & support, expected, 0.0)
        near(fresh(mask=support).mv(v[:, 0]), kept @ v[:, 0])
        near(fresh(mask=support).diag(), kept.diagonal())
        near(fresh(mask=support).dense(), kept)
        assert fresh().units == len(y)


@pytest.mark.parametrize(("sizes", "kind"), LOADERS)
def test_gradients_and_products_of_other_kinds_too(sizes: tuple[int, ...], kind: str) -> None:
    model, bound, data, x, y = cases(kind, sizes)
    names = [name for name, _ in model.named_parameters()]
    slopes = []
    for n in range(len(y)):
        value = oracle.cross_entropy(bound(x[n : n + 1]), y[n : n + 1])
        found = torch.autograd.grad(value, list(model.parameters()))
        slopes.append(dict(zip(names, found, strict=True)))
    for chunk in (None, 1, 3):
        op = CurvatureOperator(model, None, "cross_entropy", data, chunk=chunk, check=False)
        rows = list(op.sample_gradients(chunk))
        for name in names:
            near(torch.cat([row[name] for row in rows]), torch.stack([slope[name] for slope in slopes]))
            mean = torch.stack([slope[name] for slope in slopes]).mean(0)
            near(op.gradient()[op.space.slice_of(name)], mean.flatten())
        v = drawn(op.space.size, seed=4)
        hessian = CurvatureOperator(model, None, "cross_entropy", data, "hessian", chunk=chunk, check=False)
        if chunk is None:
            with sdpa_kernel(SDPBackend.MATH):
                product = oracle.hessian_product(bound, (x,), y, oracle.cross_entropy, v)
        near(hessian.mv(v), product, 1e-9)
        drawn_ = CurvatureOperator(model, None, "cross_entropy", data, "fisher_mc", chunk=chunk, draws=3, check=False)
        if chunk is None:
            labels = drawn_.dense()
        near(drawn_.dense(), labels)
        near(drawn_.mv(v), labels @ v)


class Blind(nn.Module):
    """Mixes samples, whatever is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.layer(x - x.mean(0)) + table.sum()


class Fixed(nn.Module):
    """Runs on four samples alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.layer(x.view(4, 3) + table)


@pytest.mark.parametrize(("model", "kind"), [(Blind(), CoupledSamples), (Fixed(), DataError)])
def test_what_cannot_be_told_is_refused_by_name(model: nn.Module, kind: type[DataError]) -> None:
    batch = ((drawn(4, 3), drawn(4, 3, seed=1)), torch.tensor([0, 1, 2, 0]))
    op = CurvatureOperator(model.double(), None, "cross_entropy", [batch])
    assert bool(op.mv(torch.ones(12)).isfinite().all())  # whole batches are not cut
    cut = CurvatureOperator(model, None, "cross_entropy", [batch], chunk=2, check=False)
    calls: list[Callable[[], Any]] = [
        op.diag,
        op.dense,
        op.trace,
        lambda: list(op.sample_gradients()),
        lambda: cut.mv(torch.ones(12)),
        lambda: cut.quadform(torch.ones(12)),
        lambda: cut.units,
    ]
    for call in calls:
        with pytest.raises(kind, match=r"`args\[0\]` \(4, 3\), `args\[1\]` \(4, 3\).*\(=4\).*batches of another size"):
            call()


def test_inputs_of_single_samples_stay_so() -> None:
    """Two inputs with a row for each sample, as long as their rows: cut both."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 3)

        def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
            return self.head((self.embedding(tokens).tanh() * keep[..., None]).sum(1))

    torch.manual_seed(0)
    model = Masked().double()
    tokens, keep = torch.randint(0, 5, (4, 4)), torch.rand(4, 4, dtype=torch.float64).round()
    y = torch.tensor([0, 1, 2, 1])
    expected = oracle.dense(model, (tokens, keep), y, oracle.cross_entropy)
    v = drawn(len(expected), seed=2)
    for chunk in (None, 1, 3):
        op = CurvatureOperator(model, None, "cross_entropy", ((tokens, keep), y), chunk=chunk)
        near(op.mv(v), expected @ v)
        near(op.diag(), expected.diagonal())
        near(op.dense(), expected)


def test_the_labels_tell_how_many_samples_there_are() -> None:
    """A table in front of the samples, of another length than they."""
    for samples in (3, 5):
        model, bound, data, x, y = cases("asked", (samples,))
        expected = oracle.dense(bound, (x,), y, oracle.cross_entropy)
        v = drawn(len(expected), seed=2)
        for chunk in (None, 2):
            op = CurvatureOperator(model, None, "cross_entropy", data, chunk=chunk)
            near(op.mv(v), expected @ v)
            near(op.diag(), expected.diagonal())
            assert op.units == samples
        unlabelled = CurvatureOperator(model, None, "cross_entropy", [(data[0][0],)], chunk=2, check=False)
        with pytest.raises(DataError, match=r"must have the 2 samples along axis 0"):
            unlabelled.mv(v)


@pytest.mark.parametrize(("kind", "samples"), SIZES)
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.filterwarnings("ignore:.*collected by per-sample gradients", "ignore:There is a performance drop")
def test_the_collector_reads_them_alike(kind: str, samples: int, chunk: int | None) -> None:
    model, bound, data, x, y = cases(kind, (samples,))
    expected = oracle.dense(bound, (x,), y, oracle.cross_entropy, "empirical").diagonal()
    collector = FisherCollector(model, "cross_entropy", kind="empirical", groups="element", chunk=chunk)
    collector.update(data[0])
    found = {key.split("|")[1]: value for key, value in collector.get("default").items()}
    near(torch.cat([found[name].flatten() for name, _ in model.named_parameters()]).double(), expected)
