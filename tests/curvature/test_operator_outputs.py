"""Outputs without a class axis, the class axis of a cross-entropy, and networks whose loss is nearly zero."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.curvature import FisherCollector
from fxsparse.curvature.fisher_types import UnsupportedLoss
from fxsparse.curvature.losses import MSE, BCEWithLogits, CrossEntropy
from fxsparse.curvature.operator import CurvatureOperator
from fxsparse.errors import DataError
from tests.curvature import operator_oracle as oracle

RTOL = 1e-10
KINDS = ("ggn", "empirical", "hessian", "fisher_mc")


def near(found: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * max(float(expected.abs().max()), 1e-12)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    """Outputs [N]."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()
    return model, drawn(8, 3), torch.rand(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def half_square(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, y, reduction="sum")


def bernoulli(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y, reduction="sum")


LOSSES: dict[str, tuple[Any, Any]] = {
    "mse": ("mse", half_square),
    "bce": ("bce", bernoulli),
    "callable": (bernoulli, bernoulli),
}


@pytest.mark.parametrize("unit", ["sample", "token"])
@pytest.mark.parametrize("name", LOSSES)
def test_outputs_without_further_axes_are_one_of_each_sample(name: str, unit: str) -> None:
    model, x, y = regression()
    loss, reference = LOSSES[name]
    v = drawn(21, 2, seed=3)
    for kind in ("ggn", "empirical"):
        expected = oracle.dense(model, (x,), y, reference, kind)
        op = CurvatureOperator(model, None, loss, (x, y), kind, unit=unit)
        assert op.units == 8
        near(op.mm(v), expected @ v)
        near(op.mv(v[:, 0]), expected @ v[:, 0])
        near(op.diag(), expected.diagonal())
        near(op.dense(), expected)
        assert op.trace().value == pytest.approx(float(expected.trace()), rel=RTOL)
        assert op.quadform(v[:, 1]) == pytest.approx(float(v[:, 1] @ expected @ v[:, 1]), rel=RTOL)
    hessian = CurvatureOperator(model, None, loss, (x, y), "hessian", unit=unit)
    near(hessian.mv(v[:, 0]), oracle.hessian_product(model, (x,), y, reference, v[:, 0]), 1e-9)
    mean = torch.autograd.grad(reference(model(x), y) / 8, list(model.parameters()))
    near(hessian.gradient(), torch.cat([each.flatten() for each in mean]))


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_with_and_without_an_axis_of_one_agree(loss: str, kind: str) -> None:
    model, x, y = regression()
    flat = CurvatureOperator(model, None, loss, (x, y), kind, draws=3)
    wide = CurvatureOperator(model[:3], None, loss, (x, y[:, None]), kind, draws=3)
    v = drawn(21, 2, seed=3)
    near(flat.mm(v), wide.mm(v), 1e-12)
    near(flat.diag(), wide.diag(), 1e-12)
    near(flat.gradient(), wide.gradient(), 1e-12)
    if kind == "ggn":
        for method in ("mc", "sketch"):
            near(flat.diag(method, 5), wide.diag(method, 5), 1e-12)


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("kind", ["empirical", "true", "sketch", "mc"])
def test_the_collector_counts_samples_and_tokens_of_such_outputs(loss: str, kind: str) -> None:
    model, x, y = regression()
    for unit in ("sample", "token"):
        found = []
        for net, targets in ((model, y), (model[:3], y[:, None])):
            collector = FisherCollector(net, loss, kind=kind, unit=unit, groups="element")
            collector.update((x, targets))
            found.append(collector.get())
        assert list(found[0]) == list(found[1])
        for flat, wide in zip(found[0].values(), found[1].values(), strict=True):
            near(flat, wide, 1e-12)


def test_one_column_stands_for_outputs_without_an_axis() -> None:
    z, y = drawn(5), torch.rand(5, dtype=torch.float64)
    for loss in (MSE("half", 2.0), BCEWithLogits()):
        assert loss.columns(z, y) == 1
        near(loss.root_column(z, y, 0).square(), loss.hessian_diagonal(z, y), 1e-14)
        assert loss.valid(z, y).shape == (5,)
        assert loss.spread(loss.valid(z, y), z, y).shape == z.shape


def test_single_samples_and_losses_are_no_outputs() -> None:
    torch.manual_seed(1)
    model = nn.Linear(6, 3).double()
    for check in (True, False):
        with pytest.raises(DataError, match=r"outputs \(=\(3,\)\) must have the 6 samples"):
            CurvatureOperator(model, None, "mse", [(drawn(6), drawn(3))], check=check).mv(drawn(21))
    with pytest.raises(DataError, match=r"outputs \(=\(\)\) must have"):
        CurvatureOperator(model, None, "mse", [(drawn(4, 6), None)], output=lambda z: z.sum())
    with pytest.raises(DataError, match=r"outputs \(=\(4,\)\) must have an axis of classes.*'bce'"):
        labels = torch.tensor([0, 1, 1, 0])
        CurvatureOperator(model, None, "cross_entropy", (drawn(4, 6), labels), output=lambda z: z[:, 0])


class Bytes(nn.Module):
    """As many positions as tokens: [N, V] -> [N, V, V]."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(size, 3), nn.Linear(3, size)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens).cumsum(1)))


def next_token(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("length", [3, 4, 5])
@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(), F.cross_entropy], ids=["name", "module", "f"])
def test_shifted_labels_have_the_classes_last(length: int, loss: Any) -> None:
    torch.manual_seed(0)
    model = Bytes().double()
    tokens = torch.randint(4, (3, length))
    labels = torch.where(torch.rand(3, length) < 0.8, tokens, -100)
    labels[:, 1] = tokens[:, 1]  # no sample without a label
    batch = {"tokens": tokens, "attention_mask": (labels != -100).long(), "labels": labels}
    v = drawn(sum(p.numel() for p in model.parameters()), seed=5)
    for kind in ("ggn", "empirical"):
        expected = oracle.dense(model, (tokens,), labels, next_token, kind)
        op = CurvatureOperator(model, None, loss, [batch], kind)
        near(op.dense(), expected)
        near(op.diag(), expected.diagonal())
        near(op.mv(v), expected @ v)
        collector = FisherCollector(model, loss, kind=kind, groups="element")
        collector.update(batch)
        near(torch.cat([value.flatten() for value in collector.get().values()]), expected.diagonal())
    hessian = CurvatureOperator(model, None, loss, [batch], "hessian")
    near(hessian.mv(v), oracle.hessian_product(model, (tokens,), labels, next_token, v), 1e-9)
    slope = torch.autograd.grad(next_token(model(tokens), labels) / 3, list(model.parameters()))
    near(hessian.gradient(), torch.cat([each.flatten() for each in slope]))
    mc = CurvatureOperator(model, None, loss, [batch], "fisher_mc", draws=2)
    near(mc.mv(v), mc.dense() @ v)


def test_labels_beside_inputs_keep_the_axis_of_torch() -> None:
    """As many classes as positions, labels not shifted: torch's axis 1; `class_axis` says otherwise."""
    torch.manual_seed(0)
    model = nn.Conv1d(2, 4, 1).double()
    x, y = drawn(3, 2, 4), torch.randint(4, (3, 4))
    first = CurvatureOperator(model, None, "cross_entropy", (x, y), "empirical")
    near(first.dense(), oracle.dense(model, (x,), y, oracle.cross_entropy, "empirical"))
    last = CurvatureOperator(model, None, CrossEntropy(class_axis=-1), (x, y), "empirical")
    turned = oracle.dense(model, (x,), y, lambda z, t: oracle.cross_entropy(z.mT, t), "empirical")
    near(last.dense(), turned)
    assert not torch.allclose(first.dense(), last.dense())


def test_probabilities_have_the_axis_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 1).double()
    x, y = drawn(5, 2, 4), drawn(5, 3, 4, seed=1).softmax(1)
    v = drawn(9, seed=2)
    for kind in ("ggn", "empirical"):
        expected = oracle.dense(model, (x,), y, oracle.cross_entropy, kind)
        for loss in ("cross_entropy", nn.CrossEntropyLoss()):
            op = CurvatureOperator(model, None, loss, (x, y), kind)
            near(op.dense(), expected)
            near(op.mv(v), expected @ v)
        collector = FisherCollector(model, nn.CrossEntropyLoss(), kind=kind, groups="element")
        collector.update((x, y))
        near(torch.cat([value.flatten() for value in collector.get().values()]), expected.diagonal())
    mean = torch.autograd.grad(oracle.cross_entropy(model(x), y) / 5, list(model.parameters()))
    near(op.gradient(), torch.cat([each.flatten() for each in mean]))


def test_probabilities_over_the_last_axis_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 3).double()
    x, y = drawn(5, 4, 2), drawn(5, 4, 3, seed=1).softmax(-1)
    for kind in ("empirical", "fisher"):
        with pytest.raises(DataError, match=r"sum to 1 over their last axis.*class_axis=-1"):
            CurvatureOperator(model, None, "cross_entropy", (x, y), kind).diag()
    op = CurvatureOperator(model, None, CrossEntropy(class_axis=-1), (x, y), "empirical")
    near(op.dense(), oracle.dense(model, (x,), y, lambda z, t: oracle.cross_entropy(z.mT, t.mT), "empirical"))


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (drawn(5), r"targets \(=torch.float64, \(5,\)\)"),
        (torch.zeros(5, 1, dtype=torch.int64), r"\(5, 1\)"),
        (torch.zeros(5, 3, dtype=torch.int64), r"\(5, 3\)"),
        (torch.zeros(4, dtype=torch.int64), r"\(4,\)"),
        ([0, 1, 2, 0, 1], r"targets \(=list\)"),
        (torch.zeros(5, dtype=torch.int64).numpy(), r"targets \(=ndarray\)"),
    ],
)
@pytest.mark.parametrize("kind", ["ggn", "empirical", "true"])
def test_targets_that_fit_no_outputs_have_typed_errors(targets: Any, match: str, kind: str) -> None:
    model = nn.Linear(2, 3).double()
    with pytest.raises(DataError, match=match):
        CurvatureOperator(model, None, "cross_entropy", [(drawn(5, 2), targets)], kind)
    with pytest.raises(DataError, match=match):
        FisherCollector(model, "cross_entropy", kind=kind).update((drawn(5, 2), targets))


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda z, y: None, "returns NoneType"),
        (lambda z, y: 1.0, "returns float"),
        (lambda z, y: z.detach().sum(), "no gradient at the outputs"),
        (lambda z, y: torch.ones((), dtype=z.dtype), "no gradient at the outputs"),
        (nn.CrossEntropyLoss, r"is a class: give an instance, CrossEntropyLoss\(\)"),
    ],
    ids=["none", "float", "detached", "constant", "class"],
)
def test_losses_that_are_none_have_typed_errors(loss: Any, match: str) -> None:
    model = nn.Linear(2, 3).double()
    batch = (drawn(5, 2), drawn(5, 3, seed=1))
    for kind in ("ggn", "empirical", "hessian"):
        with pytest.raises(UnsupportedLoss, match=match):
            CurvatureOperator(model, None, loss, batch, kind)
    with pytest.raises(UnsupportedLoss, match=match):
        FisherCollector(model, loss).update(batch)


def fitted(scale: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A network that is sure of its labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x = drawn(64, 6)
    with torch.no_grad():
        labels = model(x).argmax(1)
        sure = model(x).topk(2).values.diff().abs()[:, 0] > 0.3
        model[2].weight.mul_(scale)
        model[2].bias.mul_(scale)
    return model, x[sure], labels[sure]


@pytest.mark.parametrize("scale", [50, 100])
@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_products_of_fitted_networks_do_not_cancel(scale: float, kind: str) -> None:
    model, x, y = fitted(scale)
    assert F.cross_entropy(model(x), y) < 1e-6
    wide = CurvatureOperator(model, None, "cross_entropy", (x, y), kind)
    near32 = CurvatureOperator(copy.deepcopy(model).float(), None, "cross_entropy", (x.float(), y), kind)
    v = drawn(wide.space.size, 2, seed=4)
    expected = _dense_by_pairs(model, x) @ v
    near(wide.mm(v), expected, 1e-8)
    near(near32.mm(v.float()).double(), expected, 2e-5)
    assert near32.quadform(v[:, 0].float()) == pytest.approx(float(v[:, 0] @ expected[:, 0]), rel=2e-5)
    near(near32.diag("hutchinson", 4).double(), wide.diag("hutchinson", 4), 2e-5)
    near(near32.diag("sketch", 4).double(), wide.diag("sketch", 4), 2e-5)


@pytest.mark.parametrize("gap", [0.0, 1.0, 20.0, 60.0])
def test_hessian_and_its_root_are_exact_where_one_class_is_sure(gap: float) -> None:
    """Float32 against float64, in relative terms, also of entries that are tiny."""
    z = drawn(6, 4)
    z[:, 1] += gap
    y, v, loss = torch.ones(6, dtype=torch.int64), drawn(6, 4, seed=1), CrossEntropy()
    for rule in (loss.hessian_product, loss.root_product):
        found, expected = rule(z.float(), y, v.float()).double(), _by_pairs(z, v, rule.__name__)
        assert torch.allclose(found, expected, rtol=2e-4, atol=1e-32)
        assert torch.allclose(rule(z, y, v), expected, rtol=1e-9, atol=1e-32)


def _dense_by_pairs(model: nn.Module, x: Tensor) -> Tensor:
    """The GGN with every entry of H a product, where autograd would take 1 - p."""
    total = torch.zeros(0)
    for n in range(len(x)):
        j, z = oracle.rows(model, (x,), n)
        p = z[0].softmax(0)
        pairs = torch.outer(p, p).fill_diagonal_(0.0)
        total = j.T @ (torch.diag(pairs.sum(1)) - pairs) @ j + (total if n else 0.0)
    return total / len(x)


def _by_pairs(z: Tensor, v: Tensor, name: str) -> Tensor:
    """(diag p - p p^T) v as sums over pairs of classes, in which nothing but v - v cancels; S u likewise."""
    p = z.softmax(-1)
    if name == "hessian_product":
        return (p[:, :, None] * p[:, None, :] * (v[:, :, None] - v[:, None, :])).sum(-1)
    root = p.sqrt()
    # sqrt(p_c) u_c - p_c sum_k sqrt(p_k) u_k = sum_k (p_k sqrt(p_c) u_c - p_c sqrt(p_k) u_k)
    mixed = p[:, None, :] * (root * v)[:, :, None] - p[:, :, None] * (root * v)[:, None, :]
    return mixed.sum(-1)
