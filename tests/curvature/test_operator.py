"""Products, quadratic forms, diagonals and blocks against dense references, in float64."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature.fisher_types import CoupledSamples, UnsupportedLoss
from fxsparse.curvature.losses import MSE, BCEWithLogits, CrossEntropy
from fxsparse.curvature.operator import CurvatureOperator
from fxsparse.curvature.operator_output import Curvature
from fxsparse.errors import ConfigError, DataError
from tests.curvature import operator_oracle as oracle
from tests.curvature.fisher_cases import CASES, Case

RTOL = 1e-10


def near(found: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    scale = float(expected.abs().max())
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * max(scale, 1e-12)


def vectors(size: int, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(size, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextlib.contextmanager
def without_mkldnn() -> Iterator[None]:
    """Its recurrent kernels are differentiable once only."""
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def inputs_of(inputs: tuple[Tensor, ...]) -> object:
    return inputs if len(inputs) > 1 else inputs[0]


@pytest.mark.filterwarnings("ignore:Using padding", "ignore:LSTM with projections")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_equal_the_dense_reference(case: Case) -> None:
    model, inputs, y = case.build()
    data = [(inputs_of(inputs), y)]
    for kind in ("ggn", "fisher", "empirical"):
        expected = oracle.dense(model, inputs, y, oracle.cross_entropy, kind)
        op = CurvatureOperator(model, list(dict(model.named_parameters())), CrossEntropy(), data, kind)
        v = vectors(op.space.size)
        one = op.mv(v[:, 0])
        assert not torch._C._functorch.is_functorch_wrapped_tensor(one)
        near(one, expected @ v[:, 0])
        near(op.mm(v), expected @ v)
        assert op.quadform(v[:, 0]) == pytest.approx(float(v[:, 0] @ expected @ v[:, 0]), rel=RTOL, abs=1e-14)
        near(op.diag(), expected.diagonal())
        op._layers = None  # by rows of single samples, without taps
        near(op.diag(), expected.diagonal())
        small = min(dict(model.named_parameters()).items(), key=lambda item: item[1].numel())[0]
        place = op.space.slice_of(small)
        near(op.block([small]), expected[place, place])


@pytest.mark.filterwarnings("ignore:Using padding", "ignore:LSTM with projections")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hessian_products_equal_two_reverse_passes(case: Case) -> None:
    model, inputs, y = case.build()
    op = CurvatureOperator(
        model, list(dict(model.named_parameters())), "cross_entropy", [(inputs_of(inputs), y)], "hessian", check=False
    )
    v = vectors(op.space.size)
    found = op.mm(v)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), without_mkldnn(), _plain_weight_norm():
        for column in range(2):
            expected = oracle.hessian_product(model, inputs, y, oracle.cross_entropy, v[:, column])
            near(found[:, column], expected, 1e-9)


@contextlib.contextmanager
def _plain_weight_norm() -> Iterator[None]:
    """By its formula: the derivative of torch's own reverse pass is wrong."""

    def formula(v: Tensor, g: Tensor, dim: int) -> Tensor:
        return g * v / v.square().sum([axis for axis in range(v.ndim) if axis != dim], keepdim=True).sqrt()

    with mock.patch.object(torch, "_weight_norm", formula):
        yield


def test_golden_network() -> None:
    model, x, y = oracle.golden_mlp()
    op = CurvatureOperator(model, None, nn.CrossEntropyLoss(), (x, y))
    assert F.cross_entropy(model(x), y).item() == pytest.approx(1.1732136386007, abs=1e-13)
    assert op.trace().value == pytest.approx(1.8794901545464, abs=1e-13)
    assert float(op.dense().norm()) == pytest.approx(0.942532827527, abs=1e-12)
    assert int(torch.linalg.matrix_rank(op.dense(), rtol=1e-9)) == 8
    assert op.quadform(torch.ones(21)) == pytest.approx(1.232184286976, abs=1e-12)
    top = op.eigs(3, tol=1e-12)
    assert top.values.tolist() == pytest.approx([0.663155283155, 0.553747258516, 0.328649345565], abs=1e-12)
    rows = op.space.split(op.diag())
    assert rows["0.weight"].sum(1).tolist() == pytest.approx(
        [0.024826006847, 0.190722004414, 0.134150219785], abs=1e-12
    )
    assert rows["2.weight"].sum(1).tolist() == pytest.approx(
        [0.202785569909, 0.116037027617, 0.225288449474], abs=1e-12
    )
    empirical = CurvatureOperator(model, None, "cross_entropy", (x, y), "empirical")
    assert empirical.trace().value == pytest.approx(2.5137386230376, abs=1e-12)
    rows = empirical.space.split(empirical.diag())
    assert rows["0.weight"].sum(1).tolist() == pytest.approx(
        [0.028046797751, 0.420117571934, 0.075067061466], abs=1e-12
    )
    assert rows["2.weight"].sum(1).tolist() == pytest.approx(
        [0.271136946628, 0.183076268399, 0.259418686965], abs=1e-12
    )
    hessian = CurvatureOperator(model, None, "cross_entropy", (x, y), "hessian")
    assert hessian.trace().value == pytest.approx(1.703472576788, abs=1e-12)
    ends = hessian.eigs(2, "BE", tol=1e-9)
    assert ends.values.tolist() == pytest.approx([0.749578313043, -0.408908014541], abs=1e-9)


def test_the_square_of_the_batch_gradient_is_not_the_fisher() -> None:
    model, x, y = oracle.golden_mlp()
    empirical = CurvatureOperator(model, None, "cross_entropy", (x, y), "empirical")
    batch_squared = float(empirical.gradient().square().sum())
    assert batch_squared == pytest.approx(0.4572831993609, abs=1e-12)
    assert empirical.trace().value > 5 * batch_squared
    logistic = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(logistic.weight)
    data = (torch.ones(2, 1, dtype=torch.float64), torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    op = CurvatureOperator(logistic, None, BCEWithLogits(), data, "empirical")
    assert op.diag().item() == 0.25
    assert op.gradient().item() == 0.0


def test_golden_scales_of_losses() -> None:
    x = torch.tensor([[3.0]], dtype=torch.float64)
    y = torch.tensor([[1.0]], dtype=torch.float64)
    one, two = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 2, bias=False).double()
    assert CurvatureOperator(one, None, MSE("sum"), (x, y)).diag().item() == pytest.approx(18)
    assert CurvatureOperator(one, None, MSE("half"), (x, y)).diag().item() == pytest.approx(9)
    assert CurvatureOperator(two, None, nn.MSELoss(), (x, y.expand(1, 2))).diag().tolist() == pytest.approx([9, 9])
    softmax = nn.Linear(2, 3, bias=False).double()
    nn.init.zeros_(softmax.weight)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    for kind in ("ggn", "fisher"):
        diagonal = CurvatureOperator(softmax, None, CrossEntropy(), (x, torch.tensor([0])), kind).diag().view(3, 2)
        assert diagonal.flatten().tolist() == pytest.approx([2 / 9, 8 / 9] * 3)
    rows = (
        CurvatureOperator(softmax, None, CrossEntropy(), (x, torch.tensor([0])), "empirical").diag().view(3, 2).sum(1)
    )
    assert rows.tolist() == pytest.approx([20 / 9, 5 / 9, 5 / 9])


def _soft(n: int) -> Tensor:
    return torch.rand(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(1)


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (CrossEntropy(), torch.tensor([0, 1, 2, 0])),
        (CrossEntropy(label_smoothing=0.1), torch.tensor([0, 1, 2, 0])),
        (CrossEntropy(), _soft(4)),
        (BCEWithLogits(), _soft(4)),
        (MSE("sum"), _soft(4)),
        (MSE("mean"), _soft(4)),
        (MSE("half", 0.7), _soft(4)),
    ],
    ids=["ce", "smoothing", "soft", "bce", "mse sum", "mse mean", "gauss"],
)
def test_the_true_fisher_is_the_ggn(loss: object, target: Tensor) -> None:
    """The Fisher as an expectation over the likelihood's labels, the GGN as J^T H J; they agree to 1e-12."""
    model, x, _ = oracle.golden_mlp()
    op = CurvatureOperator(model, None, loss, (x, target), "ggn")
    expected = torch.zeros(21, 21, dtype=torch.float64)
    for n in range(4):
        j, z = oracle.rows(model, (x,), n)
        expected += j.T @ _expected_outer(loss, z.flatten()) @ j / 4
    near(op.dense(), expected, 1e-12)
    near(CurvatureOperator(model, None, loss, (x, target), "fisher").dense(), expected, 1e-12)


def _expected_outer(loss: object, z: Tensor) -> Tensor:
    """E_y[dl dl^T] over the implied likelihood, written out; Gaussians by their variance."""
    if isinstance(loss, CrossEntropy):
        p = z.softmax(0)
        return sum(
            p[c] * torch.outer(p - F.one_hot(torch.tensor(c), 3), p - F.one_hot(torch.tensor(c), 3)) for c in range(3)
        )
    if isinstance(loss, BCEWithLogits):
        p = z.sigmoid()
        return torch.diag(p * (p - 1).square() + (1 - p) * p.square())
    variance = {"sum": 0.5, "mean": 1.5, "half": 0.49}[loss.reduction]
    return torch.eye(3, dtype=torch.float64) * variance / variance**2


def test_losses_without_a_likelihood() -> None:
    model, x, y = oracle.golden_mlp()
    weighted = CrossEntropy(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    op = CurvatureOperator(model, None, weighted, (x, y))
    loss = nn.CrossEntropyLoss(weight=weighted.weight, reduction="sum")
    near(op.dense(), oracle.dense(model, (x,), y, loss))
    for kind in ("fisher", "fisher_mc"):
        with pytest.raises(UnsupportedLoss):
            CurvatureOperator(model, None, weighted, (x, y), kind)


def test_monte_carlo_is_one_matrix_unbiased_and_independent_of_batches() -> None:
    model, x, y = oracle.golden_mlp()
    exact = oracle.dense(model, (x,), y, oracle.cross_entropy)
    ones = torch.ones(21, dtype=torch.float64)
    target = float(ones @ exact @ ones)
    draws = [
        CurvatureOperator(model, None, "cross_entropy", (x, y), "fisher_mc", seed=seed, check=False).quadform(ones)
        for seed in range(200)
    ]
    sample = torch.tensor(draws)
    assert abs(float(sample.mean()) - target) < 5 * float(sample.std()) / 200**0.5
    few, many = (
        torch.tensor(
            [
                CurvatureOperator(
                    model, None, "cross_entropy", (x, y), "fisher_mc", seed=seed, draws=n, check=False
                ).quadform(ones)
                for seed in range(60)
            ]
        ).std()
        for n in (1, 16)
    )
    assert 2.5 < float(few / many) < 6.5  # sigma ~ 1 / sqrt(S)
    whole = CurvatureOperator(model, None, "cross_entropy", (x, y), "fisher_mc", seed=3)
    parts = CurvatureOperator(
        model, None, "cross_entropy", [(x[:1], y[:1]), (x[1:], y[1:])], "fisher_mc", seed=3, chunk=2
    )
    near(parts.dense(), whole.dense(), 1e-12)
    v = vectors(21)
    near(whole.mm(v), whole.dense() @ v)
    near(whole.diag(), whole.dense().diagonal())


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_chunks_batches_order_and_duplicates_change_rounding_only(kind: str) -> None:
    model, x, y = oracle.golden_mlp()
    whole = CurvatureOperator(model, None, "cross_entropy", (x, y), kind)
    others = {
        "chunk": CurvatureOperator(model, None, "cross_entropy", (x, y), kind, chunk=3),
        "split": CurvatureOperator(model, None, "cross_entropy", [(x[:1], y[:1]), (x[1:], y[1:])], kind),
        "order": CurvatureOperator(model, None, "cross_entropy", (x.flip(0), y.flip(0)), kind),
        "twice": CurvatureOperator(model, None, "cross_entropy", [(x, y), (x, y), (x, y)], kind),
    }
    v = vectors(21)
    for other in others.values():
        near(other.mm(v), whole.mm(v), 1e-12)
        near(other.diag(), whole.diag(), 1e-12)
        near(other.dense(), whole.dense(), 1e-12)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return self.head(torch.tanh(self.mix(x)) + x.cumsum(1))


def _tokens() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(5, (3, 4), generator=g), torch.randint(5, (3, 4), generator=g)
    labels[0, 2:] = -100
    return tokens, labels


@pytest.mark.parametrize("unit", ["sample", "token"])
@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_units_are_samples_or_valid_tokens(unit: str, kind: str) -> None:
    torch.manual_seed(0)
    model = Language().double()
    tokens, labels = _tokens()
    op = CurvatureOperator(model, None, CrossEntropy(class_axis=-1), (tokens, labels), kind, unit=unit)
    assert op.units == (10 if unit == "token" else 3)
    rows = []
    expected = torch.zeros(op.space.size, op.space.size, dtype=torch.float64)
    for n in range(3):
        j, z = oracle.rows(model, (tokens,), n)
        j, z = j.view(4, 5, -1), z[0]
        slopes = torch.zeros(4, 5, dtype=torch.float64)
        for t in range(4):
            if labels[n, t] >= 0:
                slopes[t] = z[t].softmax(0) - F.one_hot(labels[n, t], 5)
                rows.append(j[t].T @ slopes[t])
                if kind == "ggn":
                    expected += (
                        j[t].T
                        @ oracle.output_matrix(oracle.cross_entropy, z[t][None], labels[n, t][None], "ggn")
                        @ j[t]
                    )
        whole = torch.einsum("tc,tcp->p", slopes, j)
        expected += torch.outer(whole, whole) if kind == "empirical" and unit == "sample" else 0.0
    if kind == "empirical" and unit == "token":
        expected = sum(torch.outer(row, row) for row in rows)
    if kind == "hessian":
        v = vectors(op.space.size, 1)[:, 0]

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum")

        near(op.mv(v), oracle.hessian_product(model, (tokens,), labels, loss, v) * 3 / op.units)
        return
    near(op.dense(), expected / op.units)
    near(op.diag(), expected.diagonal() / op.units)
    v = vectors(op.space.size)
    near(op.mm(v), expected @ v / op.units)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model = Language().double()
    tokens, labels = _tokens()
    mask = torch.ones_like(tokens)
    padded = torch.cat([tokens, torch.zeros(3, 2, dtype=torch.int64)], 1)
    labels_padded = torch.cat([labels, torch.full((3, 2), -100)], 1)
    mask_padded = torch.cat([mask, torch.zeros(3, 2, dtype=torch.int64)], 1)
    for kind in ("ggn", "empirical", "hessian"):
        for unit in ("sample", "token"):
            loss = CrossEntropy(class_axis=-1)
            short = CurvatureOperator(
                model, None, loss, [({"tokens": tokens, "attention_mask": mask}, labels)], kind, unit=unit
            )
            long = CurvatureOperator(
                model, None, loss, [({"tokens": padded, "attention_mask": mask_padded}, labels_padded)], kind, unit=unit
            )
            v = vectors(short.space.size)
            near(long.mm(v), short.mm(v), 1e-12)
            near(long.diag(), short.diag(), 1e-12)
    bare = {"tokens": padded, "attention_mask": mask_padded}  # no labels: the mask alone says what counts
    unlabelled = CurvatureOperator(model, None, CrossEntropy(class_axis=-1), [bare], unit="token")
    assert unlabelled.units == 12
    full = CurvatureOperator(
        model, None, CrossEntropy(class_axis=-1), [{"tokens": tokens, "attention_mask": mask}], unit="token"
    )
    near(unlabelled.diag(), full.diag(), 1e-12)


@pytest.mark.parametrize("unit", ["sample", "token"])
def test_labels_of_a_mapping_are_those_of_the_next_position(unit: str) -> None:
    torch.manual_seed(0)
    model = Language().double()
    tokens, labels = _tokens()
    mask = torch.ones_like(tokens)
    mask[1, 3] = 0
    labels[1, 3] = -100
    loss = CrossEntropy(class_axis=-1)
    mapping = [{"tokens": tokens, "attention_mask": mask, "labels": labels}]
    moved = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    for kind in ("ggn", "empirical", "hessian"):
        found = CurvatureOperator(model, None, loss, mapping, kind, unit=unit)

        class Fixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model

            def forward(self, tokens: Tensor) -> Tensor:
                return self.inner(tokens, mask)

        expected = CurvatureOperator(Fixed(), None, loss, (tokens, moved), kind, unit=unit)
        assert found.units == expected.units == (6 if unit == "token" else 3)
        v = vectors(found.space.size)
        near(found.mm(v), expected.mm(v), 1e-12)


def sparse_mlp() -> tuple[nn.Module, Tensor, Tensor]:
    model, x, y = oracle.golden_mlp()
    sparse = fxsparse.transform(model, (x,), sparsity=0.5)
    return sparse, x, y


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_support_on_off_and_dense(kind: str) -> None:
    sparse, x, y = sparse_mlp()
    plain = fxsparse.finalize(sparse)
    whole = CurvatureOperator(plain, None, "cross_entropy", (x, y), kind).dense()
    masks = fxsparse.masks(sparse)
    alive = torch.cat(
        [masks.get(n, torch.ones_like(p, dtype=torch.bool)).flatten() for n, p in sparse.named_parameters()]
    )
    dead = torch.cat(
        [
            (~masks[n] if n in masks else torch.zeros_like(p, dtype=torch.bool)).flatten()
            for n, p in sparse.named_parameters()
        ]
    )
    assert 0 < int(dead.sum()) < len(dead)
    v = vectors(21)
    for support, keep in (("on", alive), ("off", dead), ("dense", torch.ones_like(alive))):
        op = CurvatureOperator(sparse, None, "cross_entropy", (x, y), kind, support)
        expected = whole * keep[:, None] * keep
        near(op.dense(), expected, 1e-11)
        near(op.submatrix(), whole[keep][:, keep], 1e-11)
        found = op.mm(v)
        near(found, expected @ v, 1e-11)
        assert bool((found[~keep] == 0).all())  # exact zeros
        near(op.diag(), expected.diagonal(), 1e-11)
        assert op.space.active == int(keep.sum())
        values = torch.linalg.eigvalsh(whole[keep][:, keep])
        assert op.eigs(1, "SA", tol=1e-10).values.item() == pytest.approx(float(values[0]), abs=1e-9)
        assert op.eigs(1, "LA", tol=1e-10).values.item() == pytest.approx(float(values[-1]), abs=1e-9)
        assert op.trace("hutchinson", 400).value == pytest.approx(float(expected.trace()), abs=0.5)
    named = CurvatureOperator(plain, None, "cross_entropy", (x, y), kind, {n: m for n, m in masks.items()})
    near(named.dense(), whole * alive[:, None] * alive, 1e-11)
    flat = CurvatureOperator(plain, None, "cross_entropy", (x, y), kind, alive)
    near(flat.dense(), named.dense(), 1e-14)


def test_parameters_can_be_chosen_by_name_object_or_alias() -> None:
    model, x, y = oracle.golden_mlp()
    whole = CurvatureOperator(model, None, "cross_entropy", (x, y)).dense()
    by_name = CurvatureOperator(model, ["2.weight"], "cross_entropy", (x, y))
    by_object = CurvatureOperator(model, [model[2].weight], "cross_entropy", (x, y))
    near(by_name.dense(), whole[9:18, 9:18])
    near(by_object.dense(), whole[9:18, 9:18])
    model[0].weight.requires_grad_(False)
    rest = CurvatureOperator(model, None, "cross_entropy", (x, y))
    assert rest.space.names == ("0.bias", "2.weight", "2.bias")
    near(rest.dense(), whole[6:, 6:])
    assert not model[0].weight.requires_grad


def test_damping_counts_on_the_support_everywhere() -> None:
    sparse, x, y = sparse_mlp()
    plain = CurvatureOperator(sparse, None, "cross_entropy", (x, y), mask="on")
    damped = CurvatureOperator(sparse, None, "cross_entropy", (x, y), mask="on", damping=0.5)
    shift = 0.5 * plain.space.support.double()
    v = vectors(21)
    near(damped.mm(v), plain.mm(v) + shift[:, None] * v)
    near(damped.dense(), plain.dense() + torch.diag(shift))
    near(damped.diag(), plain.diag() + shift)
    assert damped.quadform(v[:, 0]) == pytest.approx(float(v[:, 0] @ damped.dense() @ v[:, 0]))
    assert damped.trace().value == pytest.approx(plain.trace().value + 0.5 * plain.space.active)


def test_scipy_and_numpy_take_it() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    model, x, y = oracle.golden_mlp()
    op = CurvatureOperator(model, None, "cross_entropy", (x, y))
    values = linalg.eigsh(linalg.aslinearoperator(op), k=2, return_eigenvectors=False)
    assert sorted(values)[-1] == pytest.approx(0.663155283155, abs=1e-10)
    v = np.random.default_rng(0).standard_normal((21, 3))
    assert np.allclose(op @ v, op.dense().numpy() @ v, atol=1e-12)
    assert np.allclose(op @ v[:, 0], op.dense().numpy() @ v[:, 0], atol=1e-12)
    named = op.mv(op.space.split(torch.from_numpy(v[:, 0].copy())))
    near(op.space.flat(named), op.dense() @ torch.from_numpy(v[:, 0].copy()))


def test_the_sketch_varies_less_on_a_trained_network() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 4, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert F.cross_entropy(model(x), y).item() < 0.05
    op = CurvatureOperator(model, None, "cross_entropy", (x, y))
    exact = op.diag()
    spread = {}
    for method in ("mc", "sketch"):
        found = torch.stack([op.diag(method, 1, generator=torch.Generator().manual_seed(s)) for s in range(40)])
        spread[method] = float((found - exact).square().mean(0).sqrt().div(exact).median())
    assert spread["sketch"] < 0.5 * spread["mc"]


@pytest.mark.parametrize("method", ["mc", "sketch", "hutchinson"])
def test_diagonals_by_drawing_are_unbiased(method: str) -> None:
    model, x, y = oracle.golden_mlp()
    op = CurvatureOperator(model, None, "cross_entropy", (x, y))
    exact = op.diag()
    found = torch.stack([op.diag(method, 1, generator=torch.Generator().manual_seed(s)) for s in range(300)])
    error = found.std(0) / 300**0.5
    assert float(((found.mean(0) - exact).abs() / error).max()) < 5
    many = torch.stack([op.diag(method, 9, generator=torch.Generator().manual_seed(s)) for s in range(100)])
    assert 2.2 < float((found.std(0) / many.std(0)).median()) < 4.0  # sigma ~ 1 / sqrt(S)
    first = op.diag(method, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, op.diag(method, generator=torch.Generator().manual_seed(5)))


class Leaky(nn.Module):
    """Keeps activations, counts its runs in a buffer, draws no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        self.history: list[Tensor] = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.last = torch.tanh(self.a(x))
        self.history.append(self.last)
        return self.b(self.drop(self.norm(self.last)))


def _state(model: nn.Module) -> list[object]:
    return [
        [(n, m.training) for n, m in model.named_modules()],
        [(n, p.requires_grad, p.grad, p.detach().clone()) for n, p in model.named_parameters()],
        [(n, b.clone()) for n, b in model.named_buffers()],
        torch.get_rng_state(),
        [sorted(m.__dict__) for m in model.modules()],
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.is_autocast_enabled("cpu"),
    ]


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian", "fisher_mc"])
def test_nothing_of_the_model_or_of_torch_changes(kind: str) -> None:
    torch.manual_seed(0)
    model = Leaky().double().train()
    model.norm.eval()
    model.a.weight.requires_grad_(False)
    model.b.weight.grad = torch.ones_like(model.b.weight)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,))
    before = _state(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        op = CurvatureOperator(model, ["a.weight", "b.weight"], "cross_entropy", (x, y), kind)
        op.mm(vectors(op.space.size))
        op.diag()
        op.quadform(torch.ones(op.space.size))
        op.eigs(1)
        op.trace("hutch++", 6)
        list(op.sample_gradients())
        op.gradient()
    assert _same(_state(model), before)
    assert model.history == []
    for batch in ([(x, torch.full((6,), -100))], [(x.float(), y)]):
        with pytest.raises((DataError, RuntimeError)):
            CurvatureOperator(model, None, "cross_entropy", batch, kind).mv(torch.ones(31))
    assert _same(_state(model), before)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x), 0.5, training=True)


def test_what_does_not_repeat_itself_is_refused() -> None:
    model, x, y = oracle.golden_mlp()

    class Jitter:
        def __iter__(self):  # noqa: ANN204
            self.n = getattr(self, "n", 0) + 1
            yield x + 0.1 * self.n, y

    with pytest.raises(DataError, match="differ by"):
        CurvatureOperator(model, None, "cross_entropy", Jitter())
    assert CurvatureOperator(model, None, "cross_entropy", Jitter(), check=False).shape == (21, 21)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2, shuffle=True)
    CurvatureOperator(model, None, "cross_entropy", loader)  # the order of batches does not matter
    iterator = ((x[i : i + 2], y[i : i + 2]) for i in (0, 2))
    op = CurvatureOperator(model, None, "cross_entropy", iterator)  # read once, kept
    assert op.trace().value == pytest.approx(1.8794901545464)


def test_coupled_samples_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).double()
    data = (torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(CoupledSamples, match="`1`"):
        CurvatureOperator(model, None, "cross_entropy", data)
    model[1] = nn.InstanceNorm1d(4)
    CurvatureOperator(
        nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 3)).double(), None, "cross_entropy", data
    )


def test_bad_options_have_typed_errors() -> None:
    model, x, y = oracle.golden_mlp()
    make = lambda *a, **k: CurvatureOperator(model, *a, **k)  # noqa: E731
    ok = (None, "cross_entropy", (x, y))
    for arguments, options, match in [
        ((["nope"], *ok[1:]), {}, "nope"),
        (ok, {"kind": "hess"}, "kind"),
        (ok, {"mask": "on"}, "masks"),
        (ok, {"mask": "maybe"}, "maybe"),
        (ok, {"mask": {"0.weight": torch.ones(2, dtype=torch.bool)}}, "0.weight"),
        (ok, {"mask": {"what": torch.ones(2, dtype=torch.bool)}}, "what"),
        (ok, {"mask": torch.ones(3, dtype=torch.bool)}, "mask"),
        (ok, {"chunk": 0}, "chunk"),
        (ok, {"damping": -1.0}, "damping"),
        (ok, {"unit": "word"}, "unit"),
        (ok, {"draws": 0}, "draws"),
    ]:
        with pytest.raises(ConfigError, match=match):
            make(*arguments, **options)
    with pytest.raises(ConfigError, match="no samples"):
        make(None, "cross_entropy", [])
    with pytest.raises(DataError, match="no valid unit"):
        make(None, "cross_entropy", (x, torch.full((4,), -100)))
    op = make(*ok)
    for call in (
        lambda: op.mv(torch.ones(3)),
        lambda: op.diag("what"),
        lambda: op.diag("mc", 0),
        lambda: op.block(["nope"]),
        lambda: op.eigs(0),
        lambda: op.eigs(1, "XX"),
        lambda: op.eigs(1, method="power"),
        lambda: op.trace("what"),
        lambda: op.trace("hutch++", 2),
        lambda: op.mv({"0.weight": torch.ones(2, 3)}),
        lambda: make(*ok, kind="empirical").diag("mc"),
    ):
        with pytest.raises(ConfigError):
            call()
    wide = nn.Linear(100, 50)
    big = CurvatureOperator(wide, None, "mse", (torch.randn(2, 100), torch.randn(2, 50)))
    with pytest.raises(ConfigError, match="4096"):
        big.dense()


def test_kinds_are_understood_by_any_of_their_names() -> None:
    from fxsparse.curvature.fisher_types import FisherType

    assert Curvature.of(FisherType.EXACT) is Curvature.FISHER
    assert Curvature.of(FisherType.MC) is Curvature.FISHER_MC
    assert Curvature.of("exact") is Curvature.FISHER
    assert Curvature.of(Curvature.GGN) is Curvature.GGN


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    width=st.integers(1, 5),
    samples=st.integers(1, 5),
    kind=st.sampled_from(["ggn", "empirical"]),
)
def test_random_networks(seed: int, width: int, samples: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (samples,), generator=generator)
    op = CurvatureOperator(model, None, CrossEntropy(), (x, y), kind, chunk=2)
    expected = oracle.dense(model, (x,), y, oracle.cross_entropy, kind)
    near(op.dense(), expected)
    values = torch.linalg.eigvalsh(op.dense())
    assert float(values[0]) > -1e-12  # positive semi-definite
    assert op.trace().value == pytest.approx(float(values.sum()), rel=1e-9, abs=1e-14)
    a, b = vectors(op.space.size, 2, seed).T
    assert float(a @ op.mv(b)) == pytest.approx(float(b @ op.mv(a)), rel=1e-9, abs=1e-12)  # symmetric


def test_float32_is_near_float64() -> None:
    model, x, y = oracle.golden_mlp()
    exact = CurvatureOperator(model, None, "cross_entropy", (x, y))
    expected, v = exact.dense(), vectors(21)
    single = CurvatureOperator(model.float(), None, "cross_entropy", (x.float(), y))
    near(single.mm(v.float()).double(), expected @ v, 1e-5)
    near(single.diag().double(), expected.diagonal(), 1e-5)


def test_outputs_inside_structures() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            z = self.inner(x)
            return {"hidden": torch.tanh(z), "logits": z}

    model, x, y = oracle.golden_mlp()
    op = CurvatureOperator(Wrapped(model), None, "cross_entropy", [{"x": x, "labels": y}])
    assert op.trace().value == pytest.approx(1.8794901545464)
    taken = CurvatureOperator(Wrapped(model), None, "cross_entropy", (x, y), output=lambda r: r["logits"])
    assert taken.trace().value == pytest.approx(1.8794901545464)

    class Two(Wrapped):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), x

    with pytest.raises(ConfigError, match="output"):
        CurvatureOperator(Two(model), None, "cross_entropy", (x, y))


def test_importing_the_forward_rules_warns_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, x, y = oracle.golden_mlp()
        CurvatureOperator(model, None, "cross_entropy", (x, y))
