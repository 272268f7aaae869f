"""RESU beside what a loop brings: clipping, micro-batches, scaled losses, optimizers, averages, torch.compile."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxsparse
from fxsparse.errors import DataError
from fxsparse.nn import Linear, masked_weights, masks
from fxsparse.sparsity import Magnitude, Uniform
from fxsparse.sparsity.saliency import Taylor
from fxsparse.training import attach
from fxsparse.training.input_norms import InputNorms
from fxsparse.training.resu import RESU
from fxsparse.training.resu_phases import Phase
from fxsparse.training.resu_taps import InputTap
from fxsparse.training.resu_theta import ThetaSGD
from tests.training.resu_run import TOTAL, Run, adamw, assert_zero_dead, batch, net

pytestmark = pytest.mark.filterwarnings("ignore:theta hardly moved:UserWarning")
# Gradients, clipping, accumulation, AMP


@pytest.mark.parametrize("freeze", [True, False])
def test_the_clip_norm_counts_what_is_trained(freeze):
    run = Run(RESU.frozen(sparsity=0.8, cycles=1, distribution=Uniform(), freeze_active=freeze)).to_phase(0)
    units = run.units()

    def check(_: Run) -> None:
        for unit in units.values():
            kept = unit.trainable if freeze else torch.ones_like(unit.trainable)
            gradient = unit.weight.weight.grad
            assert not gradient[~kept].any() and gradient[unit.trainable].any()

    run.go(run.step + 1, check)


@pytest.mark.parametrize("score", [Magnitude(), Taylor()])
def test_accumulated_micro_batches_are_one_batch(score):
    def go(parts: int) -> dict[str, torch.Tensor]:
        model = nn.Sequential(Linear(12, 16, dtype=torch.float64), nn.ReLU(), Linear(16, 8, dtype=torch.float64))
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        method = RESU.frozen(
            sparsity=0.7, cycles=2, distribution=Uniform(), score=score, prune=score, theta=ThetaSGD(lr=0.1)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        attach(model, optimizer, method, TOTAL)
        for step in range(TOTAL):
            optimizer.zero_grad()
            x, y = batch(step, torch.float64)
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(xs), ys) / parts).backward()
            optimizer.step()
        return {
            **{n: w.weight.detach() for n, w in masked_weights(model).items()},
            **{k: v for k, v in masks(model).items()},
        }

    one, four = go(1), go(4)
    for name, value in one.items():
        assert torch.allclose(value.double(), four[name].double(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_leaves_theta_the_true_gradient(fused):
    runs = []
    for scale in (1.0, 2.0**12):
        run = Run(optimizer=lambda p: adamw(p, fused=fused), model=net(dtype=torch.float64))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        for step in range(TOTAL):
            run.optimizer.zero_grad()
            x, y = batch(step, torch.float64)
            loss = nn.functional.cross_entropy(run.model(x), y)
            if step == run.cycles[1].enter + 1 and not fused:
                loss = loss * float("inf")  # an overflow in the phase: skipped, it does not count
            scaler.scale(loss).backward()
            scaler.step(run.optimizer)
            scaler.update(scale)
        runs.append(run)
    assert runs[0].handle.step == TOTAL - (not fused)
    for name, value in runs[0].weights().items():
        assert torch.allclose(value, runs[1].weights()[name], rtol=1e-9, atol=1e-12)


def test_a_non_finite_gradient_in_a_phase_moves_nothing():
    run = Run().to_phase(1)
    before, step = run.weights(), run.handle.step
    bias = run.model[0].bias.detach().clone()

    def poison(run: Run) -> None:
        run.model[0].weight.grad[:] = float("nan")

    with pytest.warns(RuntimeWarning, match="non-finite gradient"):
        run.go(run.step + 1, poison)
    assert run.handle.step == step and torch.equal(run.model[0].bias, bias)
    assert all(torch.equal(value, before[name]) for name, value in run.weights().items())
    run.go(TOTAL + 1)  # the phase goes on by one step
    assert run.handle.phase is Phase.FINAL


def test_non_finite_gradients_raise_where_that_was_asked_for():
    from fxsparse.training.updater import NonFinite

    run = Run(RESU.frozen(sparsity=0.8, cycles=1, non_finite=NonFinite.RAISE, distribution=Uniform())).to_phase(0)
    with pytest.raises(DataError, match="non-finite"):
        run.go(run.step + 1, lambda run: run.model[0].weight.grad.fill_(float("inf")))


@pytest.mark.parametrize("event", ["prune", "end"])
def test_a_mask_is_never_chosen_from_weights_that_are_not_finite(event):
    run = Run(RESU.frozen(sparsity=0.8, cycles=1, distribution=Uniform()))
    run.go(getattr(run.cycles[0], event) - 1)
    before = run.masks()
    x, y = batch(run.step)
    run.optimizer.zero_grad()
    nn.functional.cross_entropy(run.model(x), y).backward()
    weight = masked_weights(run.model)["3.weight"]
    with torch.no_grad():
        position = tuple((weight.mask if event == "prune" else ~weight.mask).nonzero()[0].tolist())
        weight.weight[position] = float("nan")
    with pytest.raises(DataError, match=r"3\.weight"):
        run.optimizer.step()
    assert all(torch.equal(mask, before[name]) for name, mask in run.masks().items())


def test_maximizing_optimizers_take_theta_uphill():
    down = Run(
        RESU.frozen(sparsity=0.8, cycles=1, distribution=Uniform(), theta=ThetaSGD()), lambda p: torch.optim.SGD(p, 0.1)
    )
    up = Run(
        RESU.frozen(sparsity=0.8, cycles=1, distribution=Uniform(), theta=ThetaSGD()),
        lambda p: torch.optim.SGD(p, 0.1, maximize=True),
    )
    gains = []
    for run in (down, up):
        run.to_phase(0)
        before = run.weights()["0.weight"]
        gradient = []
        run.go(run.step + 1, lambda run, kept=gradient: kept.append(run.model[0].weight.grad.clone()))
        gains.append(float(((run.weights()["0.weight"] - before) * gradient[0]).sum()))
    assert gains[0] < 0 < gains[1]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("freeze", [True, False])
def test_every_optimizer_through_a_whole_training(name, freeze):
    method = RESU.frozen(sparsity=0.8, cycles=2, freeze_active=freeze, distribution=Uniform())
    run = Run(method, OPTIMIZERS[name]).to_phase(1)
    before, kept = run.weights(), run.masks()
    run.go(run.step + 3)
    for key, mask in kept.items():
        assert torch.equal(run.weights()[key][mask], before[key][mask]) is freeze
        assert not torch.equal(run.weights()[key][~mask], before[key][~mask])
    run.go(TOTAL)
    assert_zero_dead(run)
    for weight in masked_weights(run.model).values():
        for value in run.optimizer.state[weight.weight].values():
            if isinstance(value, torch.Tensor) and value.shape == weight.weight.shape and name != "rprop":
                assert not value[~weight.mask].any()


@pytest.mark.parametrize("keep_state", [False, True])
def test_a_closure_is_followed(keep_state):
    """LBFGS keeps one direction for all weights, frozen ones included."""
    method = RESU.frozen(sparsity=0.7, cycles=2, distribution=Uniform(), keep_state=keep_state)
    run = Run(method, lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3))
    frozen = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LBFGS keeps state")
        for step in range(TOTAL):
            phase, before, kept = run.handle.phase, run.weights(), run.masks()

            def closure(step: int = step) -> torch.Tensor:
                run.optimizer.zero_grad()
                x, y = batch(step)
                loss = nn.functional.cross_entropy(run.model(x), y)
                loss.backward()
                return loss

            run.optimizer.step(closure)
            if phase is Phase.RESU and run.handle.phase is Phase.RESU:
                after = run.weights()
                frozen.append(all(torch.equal(after[n][m], before[n][m]) for n, m in kept.items()))
                assert all(not torch.equal(after[n][~m], before[n][~m]) for n, m in kept.items())
    assert frozen and all(frozen)
    assert_zero_dead(run)


# Inputs


def test_input_statistics_of_several_batches_are_those_of_one():
    model = nn.Sequential(Linear(5, 4), nn.Conv1d(6, 3, 1))
    model[0].train()
    weights = masked_weights(model)
    x = torch.randn(8, 6, 5)  # (batch, time, channels)
    taps = {}
    for parts in (1, 4):
        tap = InputTap(model, weights, moments=True)
        tap.open()
        for part in x.chunk(parts):
            model(part)
        tap.close()
        model(x)  # not collected
        taps[parts] = tap.statistics()["0.weight"]
    flat = x.reshape(-1, 5).double()
    expected = {"norm": flat.norm(dim=0), "mean": flat.mean(0), "variance": flat.var(0, correction=0)}
    for name, value in expected.items():
        for parts in (1, 4):
            assert torch.allclose(taps[parts][name], value.expand(4, 5), rtol=1e-6, atol=1e-7)


def test_evaluation_is_no_calibration_and_errors_close_the_tap():
    model = nn.Sequential(Linear(5, 4))
    tap = InputTap(model, masked_weights(model), moments=False)
    tap.open()
    model.eval()
    model(torch.randn(3, 5))
    model.train()
    with torch.no_grad():
        model(torch.randn(3, 5))
    assert not tap.seen
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 6))
    assert not isinstance(torch.utils._python_dispatch._get_current_dispatch_mode(), InputNorms)
    tap.close()


# Averages


def test_an_average_stands_still_over_a_phase():
    run = Run(RESU.frozen(sparsity=0.6, cycles=1, distribution=Uniform(), budget=(0.3, 0.3)))
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    run.handle.follow(average)
    while run.step < run.cycles[0].enter:
        run.go(run.step + 1)
        average.update_parameters(run.model)
    held, before = masked_weights(average.module)["0.weight"].weight.detach().clone(), run.masks()["0.weight"]
    # the phase begins inside the last step, before the average is updated: what it held then is what counts
    run2 = run.handle._averages._held[0]["0.weight"]
    while run.step < run.cycles[0].end:
        run.go(run.step + 1)
        if run.step < run.cycles[0].end:
            average.update_parameters(run.model)
    mask, weight = run.masks()["0.weight"], run.weights()["0.weight"]
    copied = masked_weights(average.module)["0.weight"]
    assert (mask & ~before).any() and torch.equal(copied.mask, mask) and held.shape == run2.shape
    assert torch.equal(copied.weight, torch.where(mask & before, run2, weight) * mask)


# Routes


class Mixed(nn.Module):
    """Weights that are masked in modules, in the graph, at the parameter and behind a computation."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 16, dtype=dtype)
        self.free = nn.Parameter(torch.randn(16, 16, dtype=dtype) / 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16, dtype=dtype))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, dtype=dtype)
        self.head = nn.Conv1d(16, 8, 3, padding=1, dtype=dtype)

    def forward(self, x):
        h = nn.functional.linear(self.inner(x).relu(), self.free).relu()
        h = self.normed(h)[:, None].expand(-1, 3, -1)
        return self.head(self.attention(h, h, h, need_weights=False)[0].transpose(1, 2)).mean(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("freeze", [True, False])
def test_every_route_through_a_whole_training(dtype, freeze):
    torch.manual_seed(0)
    model = fxsparse.transform(Mixed(dtype), (batch(0, dtype)[0],))
    routes = {weight.spec.route.value for weight in masked_weights(model).values()}
    assert routes == {"module", "mask node", "parameter", "effective weight"}
    method = RESU.frozen(sparsity=0.6, cycles=2, distribution=Uniform(), freeze_active=freeze)
    run = Run(method, lambda p: torch.optim.AdamW(p, lr=0.01), model).to_phase(1)
    before, kept = run.weights(), run.masks()
    run.go(run.step + 2)
    for name, mask in kept.items():
        assert torch.equal(run.weights()[name][mask], before[name][mask]) is freeze, name
        assert not torch.equal(run.weights()[name][~mask], before[name][~mask]), name
    run.go(TOTAL)
    assert_zero_dead(run)
    assert all(row.won > 0 and row.movement > 0 for row in run.handle.report().resurrections)


# torch.compile


def test_a_whole_training_compiles_once():
    gc.collect()
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = Run(RESU.frozen(sparsity=0.8, cycles=2, distribution=Uniform(), freeze_active=False))
    compiled = torch.compile(run.model, backend=backend, fullgraph=True)
    for step in range(TOTAL):
        run.optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(compiled(x), y).backward()
        run.optimizer.step()
    assert len(graphs) == 1 and run.handle.phase is Phase.FINAL
