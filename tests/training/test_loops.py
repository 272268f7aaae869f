"""What user loops do around the optimizer: accumulation, AMP, clipping, weight averages, tied weights, compilation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import Conv2d, Guard, Linear, MaskSpec, Route, install_mask, masked_weights, masks, tie_masks
from fxsparse.sparsity import DropKind, Magnitude
from fxsparse.training import (
    GMP,
    SET,
    MeanUniform,
    NegativeGradient,
    Normal,
    RigL,
    Static,
    UpdateReport,
    attach,
)


def dyadic(*shape: int, seed: int, scale: int = 8) -> Tensor:
    """Small multiples of a power of two: sums of their products are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).double() / scale


class Summed(nn.Module):
    """Two linear maps with a loss whose gradients are exact sums over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Linear(6, 10, bias=False, dtype=torch.float64)
        self.second = Linear(10, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.first.weight.copy_(dyadic(10, 6, seed=1))
            self.second.weight.copy_(dyadic(4, 10, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


X, Y = dyadic(64, 6, seed=3), dyadic(64, 4, seed=4)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) * y).sum() / 64


def prepared(method=None, **kwargs) -> tuple[nn.Module, torch.optim.Optimizer, object]:
    model = Summed()
    optimizer = torch.optim.SGD(model.parameters(), lr=2**-6, **kwargs)
    return model, optimizer, attach(model, optimizer, method or RigL(sparsity=0.5, every=2, end=100, alpha=0.5))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("parts", [1, 2, 4, 16])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_equals_one_batch(parts, set_to_none):
    whole, optimizer_1, handle_1 = prepared()
    split, optimizer_2, handle_2 = prepared()
    for _ in range(4):
        optimizer_1.zero_grad(set_to_none)
        loss_of(whole, X, Y).backward()
        optimizer_1.step()
        optimizer_2.zero_grad(set_to_none)
        for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
            before = [mask.clone() for mask in masks(split).values()]
            loss_of(split, x, y).backward()
            assert all(torch.equal(a, b) for a, b in zip(before, masks(split).values(), strict=True))
        optimizer_2.step()
        assert_same(whole, split)
    assert handle_1.updates == handle_2.updates == 2
    assert sum(row.grown for row in handle_1.report().rows) > 0


def test_growth_reads_the_gradient_of_the_whole_batch():
    model, optimizer, handle = prepared(RigL(sparsity=0.5, every=1, end=100, alpha=0.5, decay=DropKind.CONSTANT))
    dense = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 4, bias=False)).double()
    with torch.no_grad():
        dense[0].weight.copy_(model.first.weight)
        dense[1].weight.copy_(model.second.weight)
    loss_of(dense, X, Y).backward()
    before = model.second.weight_mask.clone()
    for x, y in zip(X.chunk(4), Y.chunk(4), strict=True):
        loss_of(model, x, y).backward()
    optimizer.step()
    gradient, grown = dense[1].weight.grad.abs(), model.second.weight_mask & ~before
    left = ~model.second.weight_mask & ~before
    assert bool(grown.any()) and float(gradient[grown].min()) >= float(gradient[left].max())


@pytest.mark.parametrize("when", ["between", "after"])
def test_gradients_asked_for_by_autograd_grad_are_not_part_of_the_batch(when):
    plain, optimizer_1, _ = prepared()
    asked, optimizer_2, handle = prepared()
    for _ in range(4):
        for model, optimizer in ((plain, optimizer_1), (asked, optimizer_2)):
            optimizer.zero_grad()
            for place, rows in (("between", slice(0, 32)), ("after", slice(32, 64))):
                loss_of(model, X[rows], Y[rows]).backward()
                if model is asked and place == when:  # a gradient norm for a log, say
                    torch.autograd.grad(1000 * loss_of(model, X[:8], -Y[:8]), list(model.parameters()))
            optimizer.step()
        assert_same(plain, asked)
    assert handle.updates == 2


def test_a_batch_thrown_away_leaves_nothing_behind():
    clean, optimizer_1, _ = prepared()
    dirty, optimizer_2, _ = prepared()
    for step in range(4):
        optimizer_1.zero_grad()
        loss_of(clean, X, Y).backward()
        optimizer_1.step()
        loss_of(dirty, 1000 * X.flip(0), Y).backward()
        optimizer_2.zero_grad(set_to_none=step % 2 == 0)
        loss_of(dirty, X, Y).backward()
        optimizer_2.step()
        assert_same(clean, dirty)


def test_scores_are_unclipped_and_the_norm_is_masked():
    free, optimizer_1, _ = prepared(RigL(sparsity=0.5, every=1, end=100, alpha=0.5))
    clipped, optimizer_2, _ = prepared(RigL(sparsity=0.5, every=1, end=100, alpha=0.5))
    for _ in range(3):
        for model, optimizer in ((free, optimizer_1), (clipped, optimizer_2)):
            optimizer.zero_grad()
            loss_of(model, X, Y).backward()
        norm = nn.utils.clip_grad_value_(clipped.parameters(), 2**-9)
        own = [weight.weight.grad for weight in masked_weights(clipped).values()]
        assert all(bool((g[~m] == 0).all()) for g, m in zip(own, masks(clipped).values(), strict=True))
        optimizer_1.step()
        optimizer_2.step()
        assert norm is None
        assert_same(free, clipped)  # the steps are replaced, so only the scores could make a difference
    loss_of(free, X, Y).backward()
    expected = math.sqrt(sum(float(w.weight.grad[w.mask].square().sum()) for w in masked_weights(free).values()))
    assert float(nn.utils.clip_grad_norm_(free.parameters(), 1.0)) == pytest.approx(expected, rel=1e-12)


def amp_fixture(fused: bool) -> tuple[nn.Module, torch.optim.Optimizer, object]:
    model = Summed().float()
    optimizer = torch.optim.Adam(model.parameters(), lr=2**-6, fused=fused)
    return model, optimizer, attach(model, optimizer, RigL(sparsity=0.5, every=2, end=100, alpha=0.5))


@pytest.mark.parametrize(("fused", "unscale"), [(False, False), (False, True), (True, False)])
def test_overflow_at_an_update_step_moves_the_update(fused, unscale):
    plain, optimizer_1, handle_1 = amp_fixture(fused)
    scaled, optimizer_2, handle_2 = amp_fixture(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    x, y = X.float(), Y.float()
    for attempt in range(9):
        optimizer_2.zero_grad()
        overflow = attempt in (1, 2, 5)
        before, steps, updates = snapshot(scaled), handle_2.step, handle_2.updates
        scaler.scale(loss_of(scaled, x * math.inf if overflow else x, y)).backward()
        if unscale:
            scaler.unscale_(optimizer_2)
        scaler.step(optimizer_2)
        scaler.update()
        if overflow:
            assert handle_2.step == steps and handle_2.updates == updates
            for name, value in scaled.state_dict().items():
                assert torch.equal(value, before[name])
            continue
        optimizer_1.zero_grad()
        loss_of(plain, x, y).backward()
        optimizer_1.step()
        assert_same(plain, scaled)
    assert handle_1.step == handle_2.step == 6 and handle_1.updates == handle_2.updates == 3


def test_non_finite_gradients_of_dead_weights_hold_the_step():
    model, optimizer, handle = prepared(RigL(sparsity=0.5, every=1, end=100, alpha=0.5))
    before = snapshot(model)
    poison = torch.zeros(4, 10, dtype=torch.float64)
    poison[~model.second.weight_mask] = math.inf
    (loss_of(model, X, Y)).backward()
    handle._window._taps["second.weight"].total += poison  # an overflow that only dense gradients can see
    with pytest.warns(RuntimeWarning, match="non-finite gradient at step 1"):
        optimizer.step()
    assert handle.step == 0 and handle.updates == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.zero_grad()
    loss_of(model, X, Y).backward()
    optimizer.step()
    assert handle.step == 1 and handle.updates == 1


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("method", [SET(sparsity=0.5, every=2, alpha=0.5), GMP(sparsity=0.5, every=2, end=9)])
def test_averages_follow_the_masks(use_buffers, method):
    model, optimizer, handle = prepared(method)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    handle.follow(ema)
    for _ in range(9):
        optimizer.zero_grad()
        loss_of(model, X, Y).backward()
        masks_before = {name: mask.clone() for name, mask in masks(model).items()}
        averages = {name: masked.weight.detach().clone() for name, masked in masked_weights(ema.module).items()}
        updates = handle.updates
        optimizer.step()
        if handle.updates > updates:
            for name, masked in masked_weights(ema.module).items():
                mask = masks(model)[name]
                assert torch.equal(masked.mask, mask)
                assert torch.equal(masked.weight.detach(), averages[name] * mask)  # ema * M, grown entries 0
                assert bool((masked.weight.detach()[mask & ~masks_before[name]] == 0).all())
        ema.update_parameters(model)
        for name, masked in masked_weights(ema.module).items():
            assert bool((masked.weight.detach()[~masks(model)[name]] == 0).all())
    assert handle.updates > 3 and any(row.dropped for row in handle.report())


def test_follow_refuses_strangers():
    _, _, handle = prepared()
    with pytest.raises(ConfigError, match="`first.weight`"):
        handle.follow(nn.Linear(2, 2))


def test_reused_and_tied_weights_have_one_mask_and_one_gradient():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Linear(6, 6, bias=False, dtype=torch.float64)
            self.two = Linear(6, 6, bias=False, dtype=torch.float64)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(self.one(x)))

    model = Tied()
    with torch.no_grad():
        model.one.weight.copy_(dyadic(6, 6, seed=5))
    tie_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=2**-6)
    handle = attach(model, optimizer, RigL(sparsity=0.5, every=1, end=9, alpha=0.5, decay=DropKind.CONSTANT))
    mask, weight = model.one.weight_mask, model.one.weight.detach().clone().requires_grad_()
    before = mask.clone()
    assert model.two.weight_mask is mask and len(masks(model)) == 1
    (torch.linalg.multi_dot([X, weight.t(), weight.t(), weight.t()])[:, :4] * Y).sum().div(64).backward()
    ((model(X))[:, :4] * Y).sum().div(64).backward()
    handle._window._taps["one.weight"].total.sub_(weight.grad).abs_()
    assert float(handle._window._taps["one.weight"].total.max()) < 1e-12
    handle._window._taps["one.weight"].total.add_(weight.grad.abs())
    optimizer.step()
    assert handle.updates == 1 and int(mask.sum()) == int(before.sum()) and not torch.equal(mask, before)


def test_weights_guarded_at_the_parameter_give_the_same_masks():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 10, bias=False, dtype=torch.float64)
            self.second = nn.Linear(10, 4, bias=False, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    guarded, (model, optimizer, _) = Functional(), prepared()
    fresh = Summed()
    with torch.no_grad():
        guarded.first.weight.copy_(fresh.first.weight)
        guarded.second.weight.copy_(fresh.second.weight)
    for layer in (guarded.first, guarded.second):
        install_mask(layer, "weight", MaskSpec(route=Route.PARAMETER, guard=Guard.GRADIENT))
    other = torch.optim.SGD(guarded.parameters(), lr=2**-6)
    attach(guarded, other, RigL(sparsity=0.5, every=2, end=100, alpha=0.5))
    for _ in range(4):
        for each, optim in ((model, optimizer), (guarded, other)):
            optim.zero_grad()
            for x, y in zip(X.chunk(4), Y.chunk(4), strict=True):
                loss_of(each, x, y).backward()
            optim.step()
        assert_same(model, guarded)


@pytest.mark.parametrize("grown", [Normal(0.5), MeanUniform(), NegativeGradient(0.25)])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_values_of_grown_weights(grown, scale):
    model, optimizer, handle = prepared(RigL(sparsity=0.5, every=1, end=9, alpha=0.5, grown=grown))
    before = {name: mask.clone() for name, mask in masks(model).items()}
    weights = {name: masked.weight.detach().clone() for name, masked in masked_weights(model).items()}
    (scale * loss_of(model, X, Y)).backward()
    gradients = {name: tap.total / scale for name, tap in handle._window._taps.items()}
    for parameter in model.parameters():
        parameter.grad /= scale  # as unscaling does
    optimizer.step()
    for name, masked in masked_weights(model).items():
        new = masked.mask & ~before[name]
        values = masked.weight.detach()[new]
        assert values.numel() > 0 and torch.equal(
            masked.weight.detach()[~new], torch.where(masked.mask, weights[name], 0)[~new]
        )
        if isinstance(grown, NegativeGradient):
            assert torch.equal(values, -0.25 * gradients[name][new])
        else:
            bound = 3.0 if isinstance(grown, Normal) else float(weights[name][before[name]].abs().mean())
            assert bool((values != 0).all()) and float(values.abs().max()) <= bound


def test_global_random_state_is_never_touched():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    model, optimizer, _ = prepared(SET(sparsity=0.5, every=1, grown=Normal(0.1)))
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, X, Y).backward()
        optimizer.step()
    untouched = torch.get_rng_state()
    torch.manual_seed(7)
    Summed()
    assert torch.equal(torch.get_rng_state(), untouched) and not torch.equal(state, untouched)


def test_no_collection_and_no_hooks_between_updates():
    model, optimizer, handle = prepared(RigL(sparsity=0.5, every=3, end=100, alpha=0.5))
    open_at = []
    for _ in range(6):
        open_at.append(bool(model.first.weight._backward_hooks))
        optimizer.zero_grad()
        loss_of(model, X, Y).backward()
        optimizer.step()
    assert open_at == [False, False, True, False, False, True]
    handle.detach()
    assert not model.first.weight._backward_hooks and not optimizer._optimizer_step_post_hooks


def test_report_is_a_table():
    model, optimizer, handle = prepared(SET(sparsity=0.5, every=2, alpha=0.5))
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, X, Y).backward()
        optimizer.step()
    report = handle.report()
    assert isinstance(report, UpdateReport) and len(report) == 4 and len(report.updates()) == 2
    assert [row.step for row in report] == [2, 2, 4, 4]
    assert report.rows[0].numel == 60 and report.rows[0].density == report.rows[0].alive / 60
    assert all(row.dropped == row.grown for row in report)
    total = report.updates()[0]
    assert total.alive == sum(int(mask.sum()) for mask in masks(model).values()) == 50
    assert str(report).splitlines()[1].split() == ["2", str(total.dropped), str(total.grown), "50", "0.5000"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_models_give_the_same_masks():
    model, optimizer, _ = prepared()
    twin = Summed()
    other = torch.optim.SGD(twin.parameters(), lr=2**-6)
    compiled = torch.compile(twin, backend="eager")
    handle = attach(compiled, other, RigL(sparsity=0.5, every=2, end=100, alpha=0.5))
    for _ in range(5):
        for each, optim in ((model, optimizer), (compiled, other)):
            optim.zero_grad()
            loss_of(each, X, Y).backward()
            optim.step()
    assert_same(model, twin)
    assert handle.updates == 2


def test_missing_gradients_are_an_error():
    model, optimizer, _ = prepared(RigL(sparsity=0.5, every=1, end=9))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ConfigError, match="no gradient was seen before step 1"):
        optimizer.step()


def test_weights_outside_the_loss_keep_their_masks():
    class Branch(Summed):
        def __init__(self) -> None:
            super().__init__()
            self.unused = Conv2d(2, 2, 3, dtype=torch.float64)

    model = Branch()
    optimizer = torch.optim.SGD(model.parameters(), lr=2**-6)
    handle = attach(model, optimizer, RigL(sparsity=0.5, every=1, end=9, alpha=0.5))
    before = {name: mask.clone() for name, mask in masks(model).items()}
    loss_of(model, X, Y).backward()
    optimizer.step()
    assert torch.equal(model.unused.weight_mask, before["unused.weight"])
    assert not torch.equal(model.first.weight_mask, before["first.weight"]) and len(handle.report()) == 3


def test_nan_weights_raise_at_the_update_and_name_the_weight():
    model, optimizer, _ = prepared(SET(sparsity=0.5, every=1))
    loss_of(model, X, Y).backward()
    with torch.no_grad():
        model.first.weight[model.first.weight_mask] = math.nan
    with pytest.raises(DataError, match="`first.weight` at step 1"):
        optimizer.step()


def test_detach_stops_everything_and_frees_the_optimizer():
    model, optimizer, handle = prepared(SET(sparsity=0.5, every=1))
    with pytest.raises(ConfigError, match="already; detach"):
        attach(model, optimizer, Static(sparsity=0.5))
    handle.detach()
    handle.detach()
    before = {name: mask.clone() for name, mask in masks(model).items()}
    loss_of(model, X, Y).backward()
    optimizer.step()
    assert handle.step == 0 and all(torch.equal(mask, before[name]) for name, mask in masks(model).items())
    attach(model, optimizer, Static(sparsity=0.5))


def test_mask_edits_by_hand_are_respected():
    model, optimizer, handle = prepared(Static(sparsity=0.5, initial=Magnitude()))
    edited = copy.deepcopy(masks(model)["first.weight"]).logical_not()
    masked_weights(model)["first.weight"].set_mask_(edited)
    loss_of(model, X, Y).backward()
    optimizer.step()
    assert torch.equal(model.first.weight_mask, edited) and bool((model.first.weight[~edited] == 0).all())
    assert handle.step == 1


def test_a_micro_batch_that_only_dead_weights_see_counts():
    model = nn.Sequential(Linear(2, 2, bias=False, dtype=torch.float64))
    masked_weights(model)["0.weight"].set_mask_(torch.tensor([[True, False], [True, False]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(model, optimizer, RigL(sparsity=0.5, every=1, end=9, alpha=0.5, decay=DropKind.CONSTANT))
    for x in ([0.0, 3.0], [1.0, 0.0]):  # the first one leaves .grad all zero, its gradient is at dead weights only
        model(torch.tensor([x], dtype=torch.float64)).mul(torch.tensor([1.0, 2.0])).sum().backward()
    optimizer.step()
    assert bool(model[0].weight_mask[1, 1])  # |G| = 6 there, against 3 and 2


def test_every_update_draws_anew():
    model = nn.Sequential(Linear(20, 20, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(model, optimizer, SET(sparsity=0.9, every=1, alpha=1.0))
    seen = [model[0].weight_mask.clone()]
    for _ in range(3):
        model(torch.ones(1, 20)).sum().backward()
        optimizer.step()
        seen.append(model[0].weight_mask.clone())
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
