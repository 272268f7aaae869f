"""Models in half precision: gradients are squared in single precision, where squares of 1e-4 do not vanish."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from fisher_cases import Fn, ForeignProduct
from torch import Tensor, nn

from fxsparse.curvature import CurvatureOperator, FisherCollector
from fxsparse.curvature.taps_statistic import instrument_fisher

SCALE = 2.0**-10

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), (6,)),
    "positions": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Flatten(), nn.Linear(25, 3)),
        (5, 6),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv1d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv1d(6, 6, 3, groups=2), nn.Tanh(), nn.Conv1d(6, 3, 1)),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        ),
        (2, 9),
    ),
    "norms": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)), (6,)),
    "tied": (lambda: Fn(lambda s, x: s.b(s.a(s.a(x).tanh())), a=nn.Linear(6, 6), b=nn.Linear(6, 3)), (6,)),
    "expression": (
        lambda: Fn(
            lambda s, x: s.b(nn.functional.linear(x, s.w * 1.5).tanh()),
            w=nn.Parameter(torch.randn(8, 6) / 3),
            b=nn.Linear(8, 3),
        ),
        (6,),
    ),
    "without taps": (
        lambda: Fn(lambda s, x: ForeignProduct.apply(x, s.w), w=nn.Parameter(torch.randn(3, 6))),
        (6,),
    ),
}


def loss(z: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(z.float(), y.float(), reduction="sum") * SCALE


def squares(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Means over samples of the model's own gradients, squared in double precision."""
    found = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for n in range(len(x)):
        gradients = torch.autograd.grad(loss(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters()))
        for total, g in zip(found.values(), gradients, strict=True):
            total += g.double().square() / len(x)
    return found


@pytest.mark.parametrize("case", ["linear", "positions", "convolutions", "norms"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_taps_in_graphs_square_in_single_precision(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = CASES[case]
    model = make().to(dtype)
    x, y = torch.randn(16, *shape).to(dtype), torch.randn(16, 3).to(dtype)
    tapped = instrument_fisher(model, (x,))
    loss(tapped.module(x), y).backward()
    found, expected = tapped.fisher(16, mean=False), squares(model, x, y)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype is torch.float32
        assert float(value.sum()) == pytest.approx(float(expected[name].sum()), rel=0.03), name


@pytest.mark.parametrize("groups", ["auto", "element"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_do_not_vanish(case: str, groups: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = CASES[case]
    model = make().to(dtype)
    x, y = torch.randn(16, *shape).to(dtype), torch.randn(16, 3).to(dtype)
    expected = squares(model, x, y)
    collector = FisherCollector(model, loss, groups=groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what has no taps
        collector.update((x, y))
        operator = CurvatureOperator(model, None, loss, [(x, y)], "empirical")
        diagonal = operator.space.split(operator.diag())
    found = collector.parameters()
    lost = sum(float((g.float().square().to(dtype) == 0).double().mean()) for g in expected.values())
    assert lost or dtype is torch.bfloat16
    for name in expected:
        for value in (found[name], diagonal[name]):
            assert value.dtype in (torch.float32, torch.float64)
            assert float(value.sum()) == pytest.approx(float(expected[name].sum()), rel=0.03), name


@pytest.mark.parametrize("kind", ["empirical", "sketch", "mc", "true"])
def test_a_fitted_model_in_half_precision(kind: str) -> None:
    """Probabilities of wrong classes of 1e-7 have gradients, whose roots half precision holds."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(64, 4, dtype=torch.float64), torch.randint(3, (64,))
    with torch.no_grad():
        model.weight.mul_(0.1)
        model.bias.copy_(torch.tensor([16.0, 0.0, 0.0]))
    found = []
    for dtype in (torch.float64, torch.float16):
        collector = FisherCollector(model.to(dtype), "cross_entropy", kind, generator=torch.Generator().manual_seed(1))
        collector.update((x.to(dtype), y))
        found.append(collector.parameters()["weight"].double())
    if kind == "mc":  # the draws differ
        assert bool(found[1].isfinite().all())
        return
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=1e-3 * float(found[0].max()))
