"""Taps in modules that are run again in the backward pass, against dense references of single samples."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from again_cases import CASES, F64, QUICK, TWICE, Between, N, T, build, equal, groups
from fisher_oracle import fisher
from torch import nn

import fxsparse
from fxsparse.curvature import CoupledSamples, UncoveredParameter
from fxsparse.curvature.taps_again import RunAgain
from fxsparse.curvature.taps_statistic import instrument_fisher
from fxsparse.errors import DataError
from fxsparse.graph import capture
from fxsparse.graph.scopes import rng_fingerprint


@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:.*axes of unknown meaning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name not in TWICE])
def test_statistics_gradients_and_outputs(name: str, training: bool) -> None:
    model, x, y = build(name)
    reference = fisher(model, (x,), y, F.cross_entropy, "empirical")
    model.train(training and "norm" not in name)
    plain = copy.deepcopy(model)
    made = instrument_fisher(model, (x,))
    assert any(isinstance(module, RunAgain) for module in made.module.modules()) is (name not in QUICK)
    assert not made.refused and set(made.groupings) == set(reference)
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    z = made.module(x)
    assert torch.equal(z, plain(x))
    F.cross_entropy(z, y).backward()
    F.cross_entropy(plain(x), y).backward()
    gradients = dict(made.module.named_parameters())
    for parameter, value in plain.named_parameters():
        assert torch.allclose(gradients[parameter].grad, value.grad, rtol=1e-12, atol=1e-15), parameter
    equal(made.fisher(N), groups(made, reference))
    assert made.removed().code == capture(plain, (x,)).module.code
    assert made.module.state_dict().keys() == plain.state_dict().keys()


def test_a_module_that_is_called_twice_is_refused_by_name() -> None:
    model, x, _ = build("attention and its weights")
    made = instrument_fisher(model, (x,))
    for name, _parameter in model.inner.named_parameters():
        assert "read 2 times" in made.refused[f"inner.{name}"]
    assert set(made.statistics) == {"first.weight", "first.bias", "head.weight", "head.bias"}


def test_other_batches_and_lengths() -> None:
    for name in ("lstm", "time first", "self attention"):
        model, x, _ = build(name)
        made = instrument_fisher(model, (x,))
        for n, t in ((7, 2), (1, 6), (3, 4)):
            batch, labels = torch.randn(n, t, 6, dtype=F64), torch.arange(n) % 3
            made.clear()
            F.cross_entropy(made.module(batch), labels).backward()
            reference = fisher(model, (batch,), labels, F.cross_entropy, "empirical")
            equal(made.fisher(n), groups(made, reference))


def test_passes_add_up_and_unused_outputs_do_no_harm() -> None:
    model, x, y = build("lstm, last states")
    made = instrument_fisher(model, (x,))
    u = torch.randn_like(x)
    for batch in (x, u):
        F.cross_entropy(made.module(batch), y).backward()
    both = fisher(model, (torch.cat([x, u]),), torch.cat([y, y]), F.cross_entropy, "empirical")
    equal(made.fisher(N, passes=2), groups(made, both))


def test_dropout_is_drawn_as_in_the_first_run() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.4, batch_first=True)
    model = Between(layer, lambda m, x: m(x).mean(1)).double().train()
    x, y = torch.randn(N, T, 6, dtype=F64), torch.arange(N) % 3
    made = instrument_fisher(model, (x,))
    torch.manual_seed(5)
    F.cross_entropy(made.module(x), y).backward()
    state = rng_fingerprint()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(N):
        torch.manual_seed(5)
        loss = F.cross_entropy(model(x)[n : n + 1], y[n : n + 1])
        for (name, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            total[name] += g.square() / N
    equal(made.fisher(N), groups(made, total))
    torch.manual_seed(5)
    model(x)
    assert rng_fingerprint() == state  # the second run gives the generators back


def test_a_second_run_that_differs_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = Between(nn.LSTM(6, 6, num_layers=2, dropout=0.5, batch_first=True), lambda m, x: m(x)[0][:, -1]).double()
    x = torch.randn(N, T, 6, dtype=F64)
    made = instrument_fisher(model, (x,))
    with pytest.raises(UncoveredParameter, match="LSTM with `inner.weight_ih_l0`.*other outputs .* run again"):
        made.module(x).sum().backward()
    made.module.eval()
    made.module(x).sum().backward()
    kept = instrument_fisher(model, (x,), parameters=["first.weight", "head.weight"])
    kept.module.train()(x).sum().backward()
    assert set(kept.fisher(N)) == {"first.weight", "head.weight"}


def test_batch_norm_in_training_mode_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3))
    model = model.double().train()
    plain = copy.deepcopy(model)
    x, y = torch.randn(N, 2, 5, 5, dtype=F64), torch.arange(N) % 3
    made = instrument_fisher(model, (x,))
    assert int(model[1].num_batches_tracked) == 0
    F.cross_entropy(made.module(x), y).backward()
    F.cross_entropy(plain(x), y).backward()
    gradients = dict(made.module.named_parameters())
    for name, parameter in plain.named_parameters():  # training itself goes on as ever
        assert torch.allclose(gradients[name].grad, parameter.grad, rtol=1e-12, atol=1e-15), name
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(made.module.named_buffers())[name], buffer), name
    for _ in range(2):
        with pytest.raises(CoupledSamples, match=r"`1` \(BatchNorm2d\) was in training mode"):
            made.fisher(N)
        made.module.eval()  # too late: the batch has been coupled
    made.clear()
    F.cross_entropy(made.module(x), y).backward()
    frozen = copy.deepcopy(model).eval()
    equal(made.fisher(N), groups(made, fisher(frozen, (x,), y, F.cross_entropy, "empirical")))
    assert set(made.fisher(N)) == {f"{k}.{each}" for k in (0, 1, 4) for each in ("weight", "bias")}


def test_batch_norm_without_running_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).double()
    with pytest.raises(CoupledSamples):
        instrument_fisher(model, (torch.randn(4, 6, dtype=F64),))


def test_inputs_that_are_overwritten_are_refused() -> None:
    model, x, _ = build("rows of time first")
    made = instrument_fisher(model, (x,))
    (runner,) = [module for module in made.module.modules() if isinstance(module, RunAgain)]
    given = torch.randn(T, N, 6, dtype=F64)
    y = runner(given)
    given.add_(1.0)
    with pytest.raises(DataError, match="Linear with `inner.weight`.* in place"):
        y.sum().backward()


def test_masks_of_sparse_attention_count() -> None:
    torch.manual_seed(0)
    model = Between(nn.MultiheadAttention(6, 2, batch_first=True), lambda m, x: m(x, x, x)[0].mean(1)).double().eval()
    x, y = torch.randn(N, T, 6, dtype=F64), torch.arange(N) % 3
    sparse = fxsparse.transform(model, (x,), sparsity=0.5)
    masks = fxsparse.masks(sparse)
    assert any("in_proj" in name for name in masks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(sparse.get_parameter(name))
    reference = fisher(model, (x,), y, F.cross_entropy, "empirical")
    made = instrument_fisher(sparse, (x,))
    F.cross_entropy(made.module(x), y).backward()
    kept = {name: value * masks.get(name, torch.tensor(True)) for name, value in reference.items()}
    equal(made.fisher(N), {key: value for key, value in groups(made, kept).items()})
    assert not made.refused


def test_copies_go_their_own_ways_and_nothing_is_held() -> None:
    model, x, y = build("gru")
    made = instrument_fisher(model, (x,))
    twin = copy.deepcopy(made)
    F.cross_entropy(twin.module(x), y).backward()
    assert all(statistic.grad is None for statistic in made.statistics.values())
    equal(twin.fisher(N), groups(twin, fisher(model, (x,), y, F.cross_entropy, "empirical")))
    seen: list[Any] = []
    hook = made.module.get_submodule("inner").register_forward_hook(lambda m, a, out: seen.append(weakref.ref(a[0])))
    made.module(x).sum().backward()
    hook.remove()
    gc.disable()
    try:
        assert len(seen) == 2 and all(each() is None for each in seen)  # no cycle keeps a batch alive
    finally:
        gc.enable()
