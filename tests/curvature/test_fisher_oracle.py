"""Every case against the dense reference in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import CASES, Case
from fisher_oracle import fisher

from fxsparse.curvature import FisherCollector, UncoveredParameter
from fxsparse.graph.scopes import rng_fingerprint

RTOL = 1e-10


def collected(
    case: Case, kind: str, groups: str, variance: bool = True
) -> tuple[FisherCollector, dict[str, torch.Tensor]]:
    model, inputs, y = case.build()
    collector = FisherCollector(model, "cross_entropy", kind, groups=groups, variance=variance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collector.update((inputs, y))
    return collector, collector.get()


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning", "ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("kind", ["empirical", "true"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_element_and_every_group_equals_the_dense_reference(case: Case, kind: str) -> None:
    model, inputs, y = case.build()
    reference = fisher(model, inputs, y, F.cross_entropy, kind)
    floor = 1e-25 * max(float(value.max()) for value in reference.values())  # gradients that are zero but for rounding
    collector, found = collected(case, kind, "element")
    assert set(found) == {f"default|{name}|element" for name in reference}
    for name, value in reference.items():
        mine = found[f"default|{name}|element"]
        assert mine.shape == value.shape
        assert (mine - value).abs().max() <= RTOL * value.abs().max() + floor, name
    assert bool(collector._engine.slow) == case.slow, collector._engine.slow

    if kind == "true":  # without variances, layers without positions add up the squares of all columns first
        _, summed = collected(case, kind, "element", variance=False)
        for key, value in found.items():
            assert torch.allclose(summed[key], value, rtol=RTOL, atol=floor), key
        return
    grouped, sums = collected(case, kind, "auto")
    for name, value in reference.items():
        keys = [key for key in sums if key.split("|")[1] == name]
        total = sum(float(sums[key].sum()) for key in keys)
        assert abs(total - float(value.sum())) <= RTOL * float(value.sum()) + floor, name
        for key in keys:
            grouping = grouped._grouping((name, key.split("|")[2]))
            expected = grouping.reduce(value[None])[0]
            assert (sums[key].flatten() - expected).abs().max() <= RTOL * value.abs().max() + floor, key


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning", "ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_the_model_is_left_as_it_was(case: Case) -> None:
    model, inputs, y = case.build()
    model.train()
    next(model.modules()).training = False
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = next(iter(parameters.values()))
    frozen.grad = marker = torch.ones_like(frozen)
    flags = [(module, module.training) for module in model.modules()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = [x.clone() for x in inputs]
    state = rng_fingerprint()
    collector = FisherCollector(model, "cross_entropy", "mc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collector.update((inputs, y))
    assert rng_fingerprint() == state
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert [(module, module.training) for module in model.modules()] == flags
    assert frozen.grad is marker and torch.equal(marker, torch.ones_like(frozen))
    assert all(p.requires_grad for p in after.values())
    assert all(p.grad is None for p in after.values() if p is not frozen)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    for before, now in zip(given, inputs, strict=True):
        assert torch.equal(before, now) and not now.requires_grad and not vars(now)
    assert torch.is_grad_enabled()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 50
    assert len({case.name for case in CASES}) == len(CASES)


def test_what_cannot_be_covered_is_refused_by_name() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, w)
            return x @ w.T

        @staticmethod
        def backward(ctx: object, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, w = ctx.saved_tensors
            if len(x) < 3:
                raise RuntimeError("needs whole batches")
            return delta @ w, delta.T @ x

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(3, 6, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Opaque.apply(x, self.w)

    collector = FisherCollector(Model())
    with pytest.raises(UncoveredParameter, match="no per-sample gradients of `w`.*needs whole batches"):
        collector.update((torch.randn(5, 6, dtype=torch.float64), torch.randint(0, 3, (5,))))
    assert collector.tasks() == ()
