"""Taps in modules that are run again in the backward pass, against dense references of single samples."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fisher_oracle import fisher
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature import CoupledSamples, UncoveredParameter
from fxsparse.curvature.taps_again import RunAgain
from fxsparse.curvature.taps_statistic import Instrumented, instrument_fisher
from fxsparse.errors import DataError
from fxsparse.graph import capture
from fxsparse.graph.scopes import rng_fingerprint

F64 = torch.float64
N, T = 5, 4


class Between(nn.Module):
    """A layer before, the module, and a head behind it."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], size: int = 6) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(6, 6), inner
        self.call = call
        self.head = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.inner, torch.tanh(self.first(x))))


def _norm(kind: type[nn.Module], channels: int = T) -> nn.Module:
    norm = kind(channels)
    with torch.no_grad():
        norm.weight.uniform_(-1, 1)
        norm.weight[0] = 0.0  # what divides the output by its factor loses the input here
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def _padded(module: nn.Module, x: Tensor) -> Tensor:
    hidden = x[..., 0] > x[..., 0].mean(1, keepdim=True) + 0.1
    return module(x, x, x, key_padding_mask=hidden, need_weights=False)[0].mean(1)


def _last_states(module: nn.Module, x: Tensor) -> Tensor:
    hidden, cell = module(x.transpose(0, 1))[1]
    return torch.cat([hidden[0], cell[0]], 1)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor], int]] = {
    "self attention": (
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        lambda m, x: m(x, x, x)[0].mean(1),
        6,
    ),
    "attention and its weights": (
        lambda: nn.MultiheadAttention(6, 3, batch_first=True),
        lambda m, x: torch.cat([m(x, x, x)[0].mean(1), m(x, x, x)[1].mean(1)], 1),
        10,
    ),
    "attention overwritten": (
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        lambda m, x: torch.relu_(m(x, x, x)[0]).mean(1),
        6,
    ),
    "padded attention": (lambda: nn.MultiheadAttention(6, 2, bias=False, batch_first=True), _padded, 6),
    "keys from elsewhere": (
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        lambda m, x: m(x, x.flip(1), x.flip(1))[0].mean(1),
        6,
    ),
    "three projections": (
        lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=5, add_bias_kv=True, batch_first=True),
        lambda m, x: m(x, x[..., :4], x[..., :5], need_weights=False)[0].mean(1),
        6,
    ),
    "time first": (
        lambda: nn.MultiheadAttention(6, 2),
        lambda m, x: m(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].sum(0),
        6,
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, norm_first=True),
        lambda m, x: m(x).mean(1),
        6,
    ),
    "lstm": (
        lambda: nn.LSTM(6, 3, num_layers=2, bidirectional=True, batch_first=True),
        lambda m, x: m(x)[0][:, -1],
        6,
    ),
    "lstm, last states": (lambda: nn.LSTM(6, 3), lambda m, x: _last_states(m, x), 6),
    "lstm projected": (lambda: nn.LSTM(6, 4, proj_size=2, batch_first=True), lambda m, x: m(x)[0].mean(1), 2),
    "gru": (lambda: nn.GRU(6, 4, batch_first=True), lambda m, x: m(x)[0].mean(1), 4),
    "rnn": (lambda: nn.RNN(6, 4, bias=False, nonlinearity="relu"), lambda m, x: m(x.transpose(0, 1))[0].sum(0), 4),
    "batch norm 1d": (lambda: _norm(nn.BatchNorm1d), lambda m, x: torch.relu_(m(x)).mean(1), 6),
    "batch norm of vectors": (lambda: _norm(nn.BatchNorm1d, 6), lambda m, x: torch.tanh(m(x[:, 0])), 6),
    "batch norm 2d": (lambda: _norm(nn.BatchNorm2d), lambda m, x: torch.tanh(m(x.unsqueeze(3))).flatten(2).mean(1), 6),
    "sync batch norm": (lambda: _norm(nn.SyncBatchNorm), lambda m, x: torch.tanh(m(x)).mean(1), 6),
    "prelu": (lambda: nn.PReLU(T), lambda m, x: m(x).mean(1), 6),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        lambda m, x: torch.tanh(m(x)).mean(1),
        6,
    ),
    "rows of time first": (lambda: nn.Linear(6, 6), lambda m, x: torch.tanh(m(x.transpose(0, 1))).sum(0), 6),
}
TWICE = {"attention and its weights"}
"""Cases that call the module more than once."""


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, call, size = CASES[name]
    model = Between(make(), call, size).double()
    return model.eval(), torch.randn(N, T, 6, dtype=F64), torch.arange(N) % 3


def groups(made: Instrumented, reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of the elements of a reference, named as `fisher` names them."""
    found = {}
    for name, groupings in made.groupings.items():
        for grouping in groupings:
            key = name if len(groupings) == 1 else f"{name}|{grouping.group_type}"
            found[key] = grouping.reduce(reference[name][None])[0].view(grouping.output_shape)
    return found


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-24 * largest), name


@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:.*axes of unknown meaning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name not in TWICE])
def test_statistics_gradients_and_outputs(name: str, training: bool) -> None:
    model, x, y = build(name)
    reference = fisher(model, (x,), y, F.cross_entropy, "empirical")
    model.train(training and "norm" not in name)
    plain = copy.deepcopy(model)
    made = instrument_fisher(model, (x,))
    assert any(isinstance(module, RunAgain) for module in made.module.modules())
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
    model, x, _ = build("prelu")
    made = instrument_fisher(model, (x,))
    (runner,) = [module for module in made.module.modules() if isinstance(module, RunAgain)]
    given = torch.randn(N, T, 6, dtype=F64)
    y = runner(given)
    given.add_(1.0)
    with pytest.raises(DataError, match="PReLU with `inner.weight`.* in place"):
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_around_it() -> None:
    model, x, y = build("self attention")
    made = instrument_fisher(model, (x,))
    compiled = torch.compile(made.module, backend="aot_eager")
    F.cross_entropy(compiled(x), y).backward()
    equal(made.fisher(N), groups(made, fisher(model, (x,), y, F.cross_entropy, "empirical")))
    torch._dynamo.reset()
