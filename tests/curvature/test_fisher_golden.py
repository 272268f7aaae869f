"""Values that were worked out by hand or by an independent program."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fxsparse.curvature import MSE, CrossEntropy, FisherCollector, UnsupportedLoss
from fxsparse.curvature.collector_moments import Decaying, Moments
from fxsparse.curvature.groups import slices
from fxsparse.curvature.storage import Storage, store
from fxsparse.curvature.taps_formulas import EmbeddingWeight, LinearWeight
from fxsparse.curvature.taps_layout import Layout

F64 = torch.float64


def linear(rows: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows, dtype=F64))
    return layer


def one(model: nn.Module, loss: object, kind: str, x: Tensor, y: Tensor, groups: str = "auto") -> Tensor:
    collector = FisherCollector(model, loss, kind, groups=groups, variance=len(x) > 1)
    collector.update((x, y))
    (value,) = collector.get(param="weight").values()
    return value


def close(mine: Tensor, expected: object, rtol: float = 1e-11) -> bool:
    return torch.allclose(mine.double(), torch.tensor(expected, dtype=F64), rtol=rtol, atol=0)


def test_softmax_at_zero() -> None:
    x, y = torch.tensor([[1.0, 2.0]], dtype=F64), torch.tensor([0])
    model = linear([[0.0, 0.0]] * 3)
    assert close(one(model, "cross_entropy", "true", x, y), [10 / 9] * 3)
    assert close(one(model, "cross_entropy", "true", x, y, "element"), [[2 / 9, 8 / 9]] * 3)
    assert close(one(model, "cross_entropy", "empirical", x, y), [20 / 9, 5 / 9, 5 / 9])


def test_squares_are_taken_before_the_mean() -> None:
    x, y = torch.ones(2, 1, dtype=F64), torch.tensor([[0.0], [1.0]], dtype=F64)
    assert close(one(linear([[0.0]]), "bce", "empirical", x, y), [0.25])  # the squared batch mean is 0


def test_scales_of_squared_errors() -> None:
    x = torch.tensor([[3.0]], dtype=F64)
    y = torch.zeros(1, 1, dtype=F64)
    for kind in ("true", "ggn"):
        assert close(one(linear([[0.7]]), MSE("sum"), kind, x, y), [18.0])
        assert close(one(linear([[0.7]]), MSE("half"), kind, x, y), [9.0])
        assert close(one(linear([[0.7]]), MSE("half", sigma=2.0), kind, x, y), [9 / 4])
        assert close(one(linear([[0.7], [0.1]]), nn.MSELoss(), kind, x, torch.zeros(1, 2, dtype=F64)), [9.0, 9.0])
        assert close(one(linear([[0.7], [0.1]]), nn.MSELoss(reduction="sum"), kind, x, torch.zeros(1, 2)), [18.0, 18.0])


def golden_mlp() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    with torch.no_grad():
        for parameter, (a, b, c) in zip(
            model.parameters(), ((0.9, 1, 0), (0.3, 1, 1), (0.8, 1, 2), (0.2, 1, 3)), strict=True
        ):
            k = torch.arange(parameter.numel(), dtype=F64)
            parameter.copy_((a * torch.cos(b * k + c)).view_as(parameter))
    n = torch.arange(4, dtype=F64)
    return model, torch.stack([torch.sin(n + 1), torch.cos(2 * n)], 1), torch.tensor([0, 1, 2, 0])


def test_the_golden_network() -> None:
    model, x, y = golden_mlp()
    assert torch.nn.functional.cross_entropy(model(x), y).item() == pytest.approx(1.1732136386007, rel=1e-12)
    for kind, total, first, second in (
        (
            "true",
            1.8794901545464,
            [0.024826006847, 0.190722004414, 0.134150219785],
            [0.202785569909, 0.116037027617, 0.225288449474],
        ),
        (
            "empirical",
            2.5137386230376,
            [0.028046797751, 0.420117571934, 0.075067061466],
            [0.271136946628, 0.183076268399, 0.259418686965],
        ),
    ):
        collector = FisherCollector(model, "cross_entropy", kind)
        collector.update((x, y))
        found = collector.get()
        assert sum(float(value.sum()) for value in found.values()) == pytest.approx(total, rel=1e-12)
        assert close(found["default|0.weight|channel"], first, 1e-10)
        assert close(found["default|2.weight|channel"], second, 1e-10)


def test_the_squared_batch_mean_is_another_number() -> None:
    model, x, y = golden_mlp()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    squared = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert squared == pytest.approx(0.4572831993609, rel=1e-12)


def test_positions_are_added_before_they_are_squared() -> None:
    x = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]], dtype=F64)
    delta = torch.tensor([[[1.0], [2.0]]], dtype=F64)
    formula = LinearWeight(x, (1, 2))
    assert float(formula.rows(delta, Layout(0), 1, None)) == pytest.approx(13, rel=1e-14)
    assert float(formula.expanded().rows(delta, Layout(0), 1, None)) == 9
    ids = torch.tensor([[3, 3]])
    twice = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]], dtype=F64)
    rows = EmbeddingWeight(ids, (5, 2), None).rows(twice, Layout(0), 1, None)
    assert rows is not None and rows.tolist() == [[0, 0, 0, 5, 0]]


def test_expansion_conserves_totals() -> None:
    values = slices("channel", (2, 3)).expand(torch.tensor([6.0, 9.0], dtype=F64))
    assert values.tolist() == [[2, 2, 2], [3, 3, 3]]  # broadcasting the sum would give 45


def test_the_exponential_mean() -> None:
    running = Decaying()
    read = []
    for value in (1.0, 3.0):
        running.step(torch.tensor([value], dtype=F64), 1.0, 0.9)
        read.append(float(running.mean()))
    assert read == [1.0, pytest.approx(2.0526315789, rel=1e-9)]  # started at f and corrected as well, it reads 10


def test_weighted_moments() -> None:
    moments = Moments.of(torch.tensor([[1.0], [3.0]]), weights=torch.tensor([1.0, 3.0]))
    assert float(moments.mean()) == 2.5
    assert moments.spread is not None and float(moments.spread) == 3
    assert float(moments.variance()) == 2
    assert moments.effective == 1.6
    assert float(moments.standard_error()) == pytest.approx(1.118034, rel=1e-6)


def test_half_precision_roots() -> None:
    values = torch.tensor([1.0, 1e-9, 1e-12, 0.0], dtype=F64)
    read = store(values, Storage.CPU_FP16).read()
    assert float(read[1]) == pytest.approx(1.0017e-9, rel=1e-4)
    assert float(read[2]) == pytest.approx(1.0267e-12, rel=1e-4)
    assert float(read[3]) == 0 and float(read[0]) == 1
    assert values.to(torch.float16)[1:3].tolist() == [0, 0]


def test_errors_of_half_precision_roots() -> None:
    exponents = torch.linspace(0, -34, 20_001, dtype=F64)
    values = 2**exponents * 7.3
    read = store(values, Storage.CPU_FP16).read().double()
    error = (read / values - 1).abs()
    assert float(error[exponents >= -28].max()) <= 2**-10 * 1.001
    assert float(error.max()) <= 2**-7


def test_class_weights_have_no_true_fisher() -> None:
    x, y = torch.randn(4, 2, dtype=F64), torch.tensor([0, 1, 2, 0])
    weighted = CrossEntropy(weight=torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    model = linear([[0.1, 0.2], [0.3, -0.4], [0.5, 0.6]])
    for kind in ("true", "mc", "sketch"):
        with pytest.raises(UnsupportedLoss, match="no true Fisher"):
            FisherCollector(model, weighted, kind).update((x, y))
    p = model(x).softmax(-1)
    w = torch.tensor([1.0, 2.0, 3.0], dtype=F64)[y]
    expected = (w[:, None] * p * (1 - p) * x.square().sum(1, keepdim=True)).mean(0)
    found = one(model, weighted, "ggn", x, y)
    assert torch.allclose(found, expected, rtol=1e-12)
    found = one(model, nn.CrossEntropyLoss(weight=weighted.weight), "ggn", x, y)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_the_last_layer_needs_no_backward_pass() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = torch.randn(7, 6, dtype=F64)
    collector = FisherCollector(model, "cross_entropy", "true", parameters=["2.weight", "2.bias"])
    collector.update((x, None))
    passes = 0
    original = torch.autograd.grad

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal passes
        passes += 1
        return original(*args, **kwargs)  # type: ignore[arg-type]

    torch.autograd.grad = counted  # type: ignore[assignment]
    try:
        collector.clear()
        collector.update((x, None))
    finally:
        torch.autograd.grad = original
    assert passes == 0
    a, p = torch.tanh(model[0](x)), model(x).softmax(-1)
    found = collector.get()
    expected = (p * (1 - p) * a.square().sum(1, keepdim=True)).mean(0)
    assert torch.allclose(found["default|2.weight|channel"], expected, rtol=1e-12)
    assert torch.allclose(found["default|2.bias|element"], (p * (1 - p)).mean(0), rtol=1e-12)


def test_a_confident_model_loses_no_digits() -> None:
    x = torch.tensor([[40.0]], dtype=F64)
    model = linear([[1.0], [0.0]])
    q = math.exp(-40)
    expected = 1600 * q / (1 + q) ** 2
    assert close(one(model, "cross_entropy", "true", x, torch.tensor([0])), [expected] * 2, 1e-9)
