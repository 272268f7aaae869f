"""MC and SKETCH: unbiased, and of the variance that theory and measurement say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import CASES
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature import MSE, BCEWithLogits, CrossEntropy, FisherCollector, OutputLoss
from fxsparse.curvature.groups import element

F64 = torch.float64
SIGMA = 5.0
"""Draws are compared at this many standard errors of their mean: one failure in 1.7 million for a normal value."""


def problem(loss: OutputLoss, positions: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn((2, 3, 4) if positions else (3, 4), dtype=F64)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    classes = torch.randint(0, 3, x.shape[:-1])
    y = classes if isinstance(loss, CrossEntropy) else torch.rand((*x.shape[:-1], 3), dtype=F64)
    return model, x, y


LOSSES = (
    CrossEntropy(),
    CrossEntropy(label_smoothing=0.1),
    BCEWithLogits(),
    MSE("sum"),
    MSE("mean"),
    MSE("half", sigma=0.7),
)


@pytest.mark.parametrize("positions", [False, True], ids=["rows", "positions"])
@pytest.mark.parametrize("kind", ["mc", "sketch"])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_mean_of_draws_is_the_exact_fisher(loss: OutputLoss, kind: str, positions: bool) -> None:
    model, x, y = problem(loss, positions)
    exact = FisherCollector(model, loss, "true")
    exact.update((x, y))
    sampled = FisherCollector(model, loss, kind)
    repeats = 400
    for _ in range(3):
        sampled.update((x.repeat(repeats, *(1,) * (x.ndim - 1)), y.repeat(repeats, *(1,) * (y.ndim - 1))))
    for key, value in exact.get().items():
        # the variance over samples holds that of the draws and more, so that the bound is on the safe side of SIGMA
        error = sampled.standard_error()[key]
        assert ((sampled.get()[key] - value).abs() <= SIGMA * error + 1e-12).all(), key


@pytest.mark.parametrize("loss", [*LOSSES, nn.MSELoss(), nn.MSELoss(reduction="sum"), nn.CrossEntropyLoss()], ids=str)
def test_exact_equals_ggn_by_autograd(loss: OutputLoss | nn.Module) -> None:
    model, x, y = problem(loss if isinstance(loss, OutputLoss) else (CrossEntropy() if "Cross" in str(loss) else MSE()))
    total: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(len(x)):
        z = model(x[n : n + 1])
        scalar = (lambda out, n=n: loss.value(out, y[n : n + 1])) if isinstance(loss, OutputLoss) else None
        own = scalar or (lambda out, n=n: loss(out, y[n : n + 1]))  # type: ignore[operator]
        h = torch.autograd.functional.hessian(own, z.detach()).reshape(z.numel(), z.numel())
        rows = [
            torch.autograd.grad(z.flatten()[c], list(model.parameters()), retain_graph=True) for c in range(z.numel())
        ]
        for index, name in enumerate(total):
            j = torch.stack([row[index] for row in rows])
            total[name] += (j * torch.tensordot(h, j, 1)).sum(0).detach() / len(x)
    for kind in ("true", "ggn"):
        collector = FisherCollector(model, loss, kind, groups="element")
        collector.update((x, y))
        for name, value in total.items():
            found = collector.get()[f"default|{name}|element"]
            assert (found - value).abs().max() <= 1e-12 * value.abs().max(), (kind, name)


def test_soft_targets_have_the_same_fisher_as_labels() -> None:
    model, x, y = problem(CrossEntropy())
    soft = torch.rand(3, 3, dtype=F64)
    results = []
    for targets in (y, soft / soft.sum(1, keepdim=True), None):
        collector = FisherCollector(model, "cross_entropy", "true")
        collector.update((x, targets))
        results.append(collector.get())
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.allclose(value, other[key], rtol=1e-12)


def test_the_residual_plays_no_part_in_draws() -> None:
    model, x, _ = problem(MSE())
    fitted = model(x).detach()
    empirical = FisherCollector(model, MSE(), "empirical")
    empirical.update((x, fitted))
    assert all(not value.any() for value in empirical.get().values())
    for kind in ("true", "mc", "sketch"):
        collector = FisherCollector(model, MSE(), kind)
        collector.update((x, fitted))
        assert all(bool((value > 0).all()) for value in collector.get().values())


def test_more_draws_have_less_variance_as_one_over_their_number() -> None:
    model, x, y = problem(CrossEntropy())
    spreads = []
    for samples in (1, 16):
        collector = FisherCollector(model, "cross_entropy", "mc", samples=samples, generator=torch.Generator())
        values = []
        for _ in range(300):
            values.append(collector.oneshot((x, y))["default|0.weight|channel"])
        spreads.append(torch.stack(values).var(0).sum())
    assert 16 / 1.5 < float(spreads[0] / spreads[1]) < 16 * 1.5


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 5)).double()
    x = torch.randn(60, 10, dtype=F64)
    y = (x @ torch.randn(10, 5, dtype=F64)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def test_on_a_trained_network_the_sketch_is_far_better_than_draws() -> None:
    model, x, y = trained()
    assert F.cross_entropy(model(x), y) < 0.05
    exact = FisherCollector(model, "cross_entropy", "true")
    exact.update((x, y))
    errors = {}
    for kind in ("mc", "sketch"):
        collector = FisherCollector(model, "cross_entropy", kind, generator=torch.Generator())
        runs = [collector.oneshot((x, y)) for _ in range(40)]
        relative = [
            ((torch.stack([run[key] for run in runs]) - value).square().mean(0).sqrt() / value)[value > 0]
            for key, value in exact.get().items()
            if key.endswith("channel")
        ]
        errors[kind] = float(torch.cat(relative).median())
    assert errors["sketch"] < 0.5 * errors["mc"], errors


def test_the_same_seed_gives_the_same_bits_and_global_generators_stand_still() -> None:
    model, x, y = problem(CrossEntropy())
    results = []
    for seed in (0, 0, 1):
        collector = FisherCollector(model, "cross_entropy", "sketch", generator=torch.Generator().manual_seed(seed))
        torch.rand(3)
        collector.update((x, y))
        results.append(collector.get()["default|0.weight|channel"])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["tied weights", "conv reused", "module reuse", "weight times mask", "time first"])
def test_draws_go_through_every_way_of_reading_a_weight(name: str) -> None:
    model, inputs, y = next(case for case in CASES if case.name == name).build()
    exact = FisherCollector(model, "cross_entropy", "true")
    exact.update((inputs, y))
    sketch = FisherCollector(model, "cross_entropy", "sketch", samples=300)
    sketch.update((inputs, y))
    for key, value in exact.get().items():
        if float(value.sum()) > 1e-20:
            assert abs(float(sketch.get()[key].sum() / value.sum()) - 1) < 0.3, key


def test_elements_are_kept_in_the_parameters_shape() -> None:
    assert element((2, 3)).output_shape == (2, 3)


@pytest.mark.parametrize("kind", ["sketch", "mc"])
def test_sums_of_several_draws_without_variances(kind: str) -> None:
    """Squares of output gradients are added up over draws, each with its weight, before one product."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 3
    found = []
    for variance in (True, False):
        collector = FisherCollector(model, kind=kind, groups="element", samples=3, variance=variance)
        collector.update(batch)
        found.append(collector.get())
    for key, value in found[0].items():
        assert torch.allclose(found[1][key], value, rtol=1e-12), key


@pytest.mark.parametrize("support", ["mask", "dense"])
def test_sums_without_variances_respect_masks(support: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 3
    dense = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model = fxsparse.transform(dense, (x,), sparsity=0.5)
    found = []
    for variance in (True, False):
        collector = FisherCollector(model, kind="true", groups="element", support=support, variance=variance)
        collector.update((x, y))
        found.append(collector.get())
    for key, value in found[0].items():
        assert torch.allclose(found[1][key], value, rtol=1e-12), key
    dead = ~fxsparse.masks(model)["0.weight"]
    assert bool((found[1]["default|0.weight|element"][dead] == 0).all()) == (support == "mask")
