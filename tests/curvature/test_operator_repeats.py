"""Data and models that do not repeat themselves, low precision, compiled models, and losses of log-probabilities."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fxsparse.curvature import CurvatureSource
from fxsparse.curvature.fisher_types import UnsupportedLoss
from fxsparse.curvature.losses import CrossEntropy, as_loss
from fxsparse.curvature.operator import CurvatureOperator
from fxsparse.errors import ConfigError, DataError
from fxsparse.graph.scopes import rng_fingerprint
from tests.curvature import operator_oracle as oracle


def network() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(20, 6), torch.randint(3, (20,))


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Samples that a function of them changes at every reading."""

    def __init__(self, x: Tensor, y: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        self.x, self.y, self.change = x, y, change

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.change(self.x[index]), self.y[index]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + torch.randn(6),
        lambda x: x + torch.from_numpy(np.random.randn(6)).float(),
        lambda x: x * random.random(),
    ],
    ids=["torch", "numpy", "python"],
)
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_augmented_data_are_refused_whatever_they_draw_from(change: Callable[[Tensor], Tensor], kind: str) -> None:
    model, x, y = network()
    loader = DataLoader(Augmented(x, y, change), batch_size=5)
    before = rng_fingerprint()
    with pytest.raises(DataError, match="change between passes"):
        CurvatureOperator(model, None, "cross_entropy", loader, kind)
    assert rng_fingerprint() == before


@pytest.mark.parametrize("own", [False, True], ids=["global", "own generator"])
def test_shuffled_data_are_taken_unless_samples_are_left_out(own: bool) -> None:
    model, x, y = network()
    data = TensorDataset(x, y)
    before = rng_fingerprint()

    def loader(**options: object) -> DataLoader[tuple[Tensor, ...]]:
        source = torch.Generator().manual_seed(0) if own else None
        return DataLoader(data, batch_size=7, shuffle=True, generator=source, **options)

    with pytest.raises(DataError, match="change between passes"):
        CurvatureOperator(model, None, "cross_entropy", loader(drop_last=True))
    v = torch.ones(83)
    found = CurvatureOperator(model, None, "cross_entropy", loader()).mv(v)
    assert torch.allclose(found, CurvatureOperator(model, None, "cross_entropy", (x, y)).mv(v), atol=1e-5)
    assert rng_fingerprint() == before


def test_drawn_labels_belong_to_places_so_that_shuffling_is_refused() -> None:
    model, x, y = network()
    ordered = DataLoader(TensorDataset(x, y), batch_size=7)
    CurvatureOperator(model, None, "cross_entropy", ordered, "fisher_mc")
    with pytest.raises(DataError, match="change between passes"):
        CurvatureOperator(
            model, None, "cross_entropy", DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True), "fisher_mc"
        )


def test_dropout_is_off_and_models_that_draw_in_evaluation_mode_are_refused() -> None:
    model, x, y = network()
    with_dropout = nn.Sequential(*model, nn.Dropout(0.5)).train()
    v = torch.ones(83)
    expected = CurvatureOperator(model, None, "cross_entropy", (x, y)).mv(v)
    assert torch.equal(CurvatureOperator(with_dropout, None, "cross_entropy", (x, y)).mv(v), expected)

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(F.dropout(x, 0.5, training=True))

    with pytest.raises(DataError, match="draws random numbers"):
        CurvatureOperator(Drawing(), None, "cross_entropy", (x, y))


def test_the_callers_generators_do_not_decide() -> None:
    """The second product draws from another state even where the caller stands at any fixed seed."""
    model, x, y = network()
    loader = DataLoader(Augmented(x, y, lambda x: x + torch.randn(6)), batch_size=5)
    for seed in (0, 1, 20240229):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        with pytest.raises(DataError):
            CurvatureOperator(model, None, "cross_entropy", loader)


def test_gradients_of_samples_draw_nothing_from_the_callers_generators() -> None:
    model, x, y = network()
    before = rng_fingerprint()
    op = CurvatureOperator(
        model, None, "cross_entropy", DataLoader(Augmented(x, y, lambda x: x + torch.randn(6)), 5), check=False
    )
    rows = [each["2.bias"] for each in op.sample_gradients()]
    assert rng_fingerprint() == before
    assert len(rows) == 4
    same = CurvatureOperator(model, None, "cross_entropy", DataLoader(TensorDataset(x, y), 5, shuffle=True))
    found = torch.cat([each["2.bias"] for each in same.sample_gradients()]).mean(0)
    assert torch.allclose(found, same.gradient()[-3:], atol=1e-6)
    noise: list[Tensor] = []
    still = DataLoader(Augmented(x, y, lambda x: noise.append(torch.randn(1)) or x), 5)
    list(CurvatureOperator(model, None, "cross_entropy", still, check=False).sample_gradients())
    assert len({float(each) for each in noise}) == 20  # no draw comes twice
    assert rng_fingerprint() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shuffle", [False, True])
def test_low_precision_repeats_itself(dtype: torch.dtype, shuffle: bool) -> None:
    model, x, y = network()
    expected = CurvatureOperator(model, None, "cross_entropy", (x, y)).mv(torch.ones(83))
    low = model.to(dtype)
    data = DataLoader(TensorDataset(x.to(dtype), y), batch_size=6, shuffle=shuffle)
    op = CurvatureOperator(low, None, "cross_entropy", data)
    found = op.mv(torch.ones(83))
    assert found.dtype is dtype
    assert float((found.float() - expected).abs().max()) < 0.05 * float(expected.abs().max())
    noisy = DataLoader(Augmented(x.to(dtype), y, lambda x: x + torch.randn(6, dtype=dtype)), batch_size=5)
    with pytest.raises(DataError):
        CurvatureOperator(low, None, "cross_entropy", noisy)


def test_numpy_sees_bfloat16_as_float32() -> None:
    model, x, y = network()
    op = CurvatureOperator(model.bfloat16(), None, "cross_entropy", (x.bfloat16(), y))
    assert op.dtype == np.float32
    one, several = op.mv(np.ones(83)), op.mm(np.ones((83, 2), dtype=np.float32))
    assert one.dtype == np.float64
    assert several.dtype == np.float32
    assert op.mv(np.ones(83, dtype=np.int64)).dtype == np.float32
    assert np.array_equal(several, op.mm(torch.ones(83, 2)).float().numpy())


def test_compiled_models_have_the_names_of_what_was_compiled() -> None:
    model, x, y = network()
    compiled = torch.compile(model, backend="eager")
    op = CurvatureOperator(compiled, ["0.weight"], "cross_entropy", (x, y))
    assert op.space.names == ("0.weight",)
    plain = CurvatureOperator(model, ["0.weight"], "cross_entropy", (x, y))
    assert torch.equal(op.diag(), plain.diag())
    source = CurvatureSource(compiled, "cross_entropy", [(x, y)])
    assert source.name_of(model[0].weight) == "0.weight"
    assert torch.equal(source.diagonal(model[0].weight).flatten(), plain.diag())


WEIGHTS = torch.tensor([0.5, 1.0, 2.5], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nll_of_log_probabilities_is_cross_entropy_of_logits(kind: str, weight: Tensor | None, reduction: str) -> None:
    model, x, y = oracle.golden_mlp()
    y = y.clone()
    y[1] = 2
    y[3] = 1  # does not count
    nll = nn.NLLLoss(weight=weight, ignore_index=1, reduction=reduction)
    found = CurvatureOperator(nn.Sequential(model, nn.LogSoftmax(-1)), None, nll, (x, y), kind)
    same = nn.CrossEntropyLoss(weight=weight, ignore_index=1, reduction=reduction)
    expected = CurvatureOperator(model, None, same, (x, y), kind)
    assert found.units == expected.units == 3
    assert expected.trace().value > 0.1
    assert torch.allclose(found.dense(), expected.dense(), rtol=1e-10, atol=1e-13)
    assert torch.allclose(found.diag(), expected.diag(), rtol=1e-10, atol=1e-13)
    assert torch.allclose(found.gradient(), expected.gradient(), rtol=1e-10, atol=1e-13)
    if kind == "empirical":  # of torch's own gradients, of the samples that count
        kept = y != 1
        given = nn.Sequential(model, nn.LogSoftmax(-1)), (x[kept],), y[kept]
        by_torch = oracle.dense(*given, lambda z, y: F.nll_loss(z, y, weight, reduction="sum"), kind)
        assert torch.allclose(found.dense(), by_torch, rtol=1e-10, atol=1e-13)


def test_nll_is_refused_where_outputs_are_no_log_probabilities() -> None:
    model, x, y = oracle.golden_mlp()
    for loss in (nn.NLLLoss(), F.nll_loss):
        for kind in ("ggn", "empirical", "hessian"):
            with pytest.raises(DataError, match="log-probabilities"):
                CurvatureOperator(model, None, loss, (x, y), kind)
        assert as_loss(loss).value(model(x).log_softmax(-1), y).item() == pytest.approx(
            F.cross_entropy(model(x), y, reduction="sum").item()
        )
    soft = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    with pytest.raises(DataError, match="class indices"):
        CurvatureOperator(nn.Sequential(model, nn.LogSoftmax(-1)), None, nn.NLLLoss(), (x, soft))
    weighted = nn.NLLLoss(weight=WEIGHTS)
    with pytest.raises(UnsupportedLoss):
        CurvatureOperator(nn.Sequential(model, nn.LogSoftmax(-1)), None, weighted, (x, y), "fisher")
    assert isinstance(as_loss(nn.NLLLoss()), CrossEntropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nll_knows_log_probabilities_of_many_classes_in_any_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = (5 * torch.randn(16, 1000)).to(dtype).log_softmax(-1)
    as_loss(nn.NLLLoss()).gradient(z, torch.randint(1000, (16,)))


def test_vectors_of_the_wrong_kind_have_typed_errors() -> None:
    model, x, y = oracle.golden_mlp()
    op = CurvatureOperator(model, None, "cross_entropy", (x, y))
    for call in (
        lambda: op.mv([1.0] * 21),
        lambda: op.mv(None),
        lambda: op.mv(torch.ones(())),
        lambda: op.mv(np.ones(3)),
        lambda: op.mv(torch.ones(21, 2)),
        lambda: op.mm([1.0]),
        lambda: op.mm(torch.ones(21)),
        lambda: op.quadform(torch.ones(3)),
        lambda: op.quadform([1.0]),
        lambda: op.quadform("v"),
        lambda: op.block([]),
    ):
        with pytest.raises(ConfigError):
            call()
    assert op.quadform(np.ones(21)) == pytest.approx(1.232184286976, abs=1e-12)
