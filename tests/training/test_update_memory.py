"""Mask updates under alive-only storage: dense tensors of one weight at a time, with the bits of all at once."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.nn import DenseGradients, Product, masked_weights, masks
from fxsparse.sparsity import Gradient, Layout, Magnitude, Pooling, SharedSupport, shared_support
from fxsparse.training import RigL, WeightState
from fxsparse.training.gradients import GradientWindow
from fxsparse.training.grown import GrownValue, NegativeGradient, Normal, Zero
from fxsparse.training.handle import Handle
from fxsparse.training.packed_gradient import PackedGradient

WIDE, BATCH, EVERY = 48, 8, 3


class Seen(RigL):
    """RigL that keeps a copy of what it saw, and grows by its own reading of G."""

    def grow_scores(self, state: WeightState) -> Tensor:
        assert state.gradient is not None
        SEEN.append((state.name, state.gradient.clone(), state.step_gradient, state.explored, state.factor))
        return super().grow_scores(state)


SEEN: list[tuple[Any, ...]] = []


def layers(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind == "mlp":
        inner = [nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU()) for _ in range(3)]
        return nn.Sequential(*inner, nn.Linear(WIDE, 40)), torch.randn(BATCH, WIDE)
    conv = nn.Sequential(nn.Conv2d(16, 40, 3), nn.ReLU(), nn.Conv2d(40, 32, 1), nn.Flatten(), nn.Linear(32, 8))
    return conv, torch.randn(2, 16, 3, 3)


def alive_only(kind: str = "mlp", method: Any = None, group: int = 13) -> tuple[nn.Module, Handle, Tensor]:
    model, x = layers(kind)
    model = fxsparse.transform(model, (x,), pattern=SharedSupport(group))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    chosen = RigL(sparsity=0.75, every=EVERY, end=100, distribution=fxsparse.Uniform()) if method is None else method
    handle = fxsparse.attach(model, optimizer, chosen, total_steps=100)
    fxsparse.store_alive(handle)
    return model, handle, x


def steps(
    model: nn.Module, handle: Handle, x: Tensor, count: int, after: Callable[[Tensor], None] | None = None
) -> None:
    for step in range(count):
        handle.optimizer.zero_grad()
        buffer = x + 0.1 * step
        model(buffer).square().mean().backward()
        if after is not None:
            after(buffer)
        handle.optimizer.step()


def bits(model: nn.Module) -> list[Tensor]:
    return [*masks(model).values(), *(p.detach().clone() for p in model.parameters())]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def collected(model: nn.Module, x: Tensor, passes: int, reuse: int = 1) -> dict[str, Any]:
    """G of packed layers after some backward passes, each of which uses the model some times."""
    window = GradientWindow(masked_weights(model))
    window.open()
    for i in range(passes):
        sum(model(x * (1 + i + j)).square().mean() for j in range(reuse)).backward()
    found = window.read()
    window.close()
    return found


def reference(model: nn.Module, x: Tensor, passes: int, reuse: int = 1) -> dict[str, Tensor]:
    """The same by dense gradients that are made at once and added up."""
    totals: dict[str, Tensor] = {}
    weights = masked_weights(model)
    for i in range(passes):
        model.zero_grad()
        with DenseGradients() as found:
            sum(model(x * (1 + i + j)).square().mean() for j in range(reuse)).backward()
        for name, weight in weights.items():
            own = weight.dense(weight.weight.grad)
            one = torch.where(weight.mask, own, own + found.read(weight.sink))
            totals[name] = totals[name] + one if name in totals else one
    return totals


@pytest.mark.parametrize(
    ("kind", "passes", "reuse"), [("mlp", 1, 1), ("mlp", 2, 1), ("mlp", 9, 1), ("mlp", 2, 3), ("conv", 3, 1)]
)
def test_deferred_gradients_have_the_bits_of_dense_sums(kind: str, passes: int, reuse: int) -> None:
    model, handle, x = alive_only(kind)
    handle.detach()
    expected = reference(model, x, passes, reuse)
    model.zero_grad()
    found = collected(model, x, passes, reuse)
    assert {name for name, each in found.items() if isinstance(each, PackedGradient)} == set(expected)
    for name, each in found.items():
        assert torch.equal(each.dense(), expected[name]) and torch.equal(each.dense(), expected[name]), name
        assert each.is_finite()
        held = sum(part.numel if isinstance(part, Product) else part.numel() for one in each.passes for part in one)
        assert held <= expected[name].numel()
    if passes == 1 and reuse == 1:
        assert all(isinstance(part, Product) for each in found.values() for one in each.passes for part in one)
    if passes == 9:
        assert any(each.folded is not None for each in found.values())


@pytest.mark.parametrize("times", [2, 8])
def test_long_inputs_are_not_kept(times: int) -> None:
    model, handle, x = alive_only()
    handle.detach()
    for each in collected(model, x.repeat(times, 1), 1).values():
        assert each.folded is None and [[type(part) for part in one] for one in each.passes] == [[Tensor]]


def test_an_eager_collector_beside_it_sees_the_same() -> None:
    model, handle, x = alive_only()
    handle.detach()
    weights = masked_weights(model)
    sinks = [weight.sink for weight in weights.values()]
    with DenseGradients(sinks, defer=True) as late, DenseGradients(sinks) as now:
        for i in range(2):
            model(x * (1 + i)).square().mean().backward()
    for sink in sinks:
        own = now.read(sink)
        assert own is not None and own.any() and torch.equal(own, late.read(sink))
        assert len(late.summands(sink)) == 2 and len(now.summands(sink)) == 1


@pytest.mark.parametrize("what", ["input", "hidden", "output gradient"])
def test_tensors_that_are_overwritten_after_the_backward_pass_change_nothing(what: str) -> None:
    model, handle, x = alive_only()
    steps(model, handle, x, 2 * EVERY)
    other, second, _ = alive_only()
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(output)
        if what == "output gradient":
            output.register_hook(lambda gradient: kept.append(gradient))

    if what != "input":
        other[1][0].register_forward_hook(keep)  # type: ignore[index]

    def overwrite(buffer: Tensor) -> None:
        with torch.no_grad():
            if what == "input":
                buffer.fill_(1e3)
            else:
                assert len(kept) == (1 if what == "hidden" else 2)
                kept.pop().data.fill_(1e3)
                kept.clear()

    steps(other, second, x, 2 * EVERY, overwrite)
    assert handle.updates == second.updates == 2 and sum(row.grown for row in handle.report()) > 0
    assert equal(bits(model), bits(other))


def test_only_one_dense_gradient_lives_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle, x = alive_only()
    made: list[weakref.ref[Tensor]] = []
    plain = Product.dense

    def dense(product: Product) -> Tensor:
        assert not [each for each in made if each() is not None]
        found = plain(product)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Product, "dense", dense)
    steps(model, handle, x, EVERY - 1)
    assert made == [] and all(tap.total is not None for tap in handle._window._taps.values()) is False
    steps(model, handle, x, 1)
    assert len(made) == len(handle.masked) == 4 and not [each for each in made if each() is not None]


def test_ordinary_steps_hold_nothing() -> None:
    model, handle, x = alive_only()
    for step in range(1, 2 * EVERY + 1):
        handle.optimizer.zero_grad()
        model(x).square().mean().backward()
        held = [tap.total for tap in handle._window._taps.values()]
        assert all((each is not None) == (step % EVERY == 0) for each in held), step
        handle.optimizer.step()
        assert all(tap.total is None for tap in handle._window._taps.values()) and handle._gradients == {}


def test_a_method_reads_what_dense_storage_gives() -> None:
    SEEN.clear()
    model, handle, x = alive_only(method=Seen(sparsity=0.75, every=EVERY, end=100, distribution=fxsparse.Uniform()))
    steps(model, handle, x, EVERY)
    alive, _ = list(SEEN), SEEN.clear()
    dense, x = layers("mlp")
    dense = fxsparse.transform(dense, (x,), pattern=SharedSupport(13))
    fxsparse.accelerate(dense, mode=fxsparse.FastMode.SPARSE)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-2)
    other = fxsparse.attach(
        dense, optimizer, Seen(sparsity=0.75, every=EVERY, end=100, distribution=fxsparse.Uniform()), total_steps=100
    )
    steps(dense, other, x, EVERY)
    assert len(alive) == len(SEEN) == 4
    for own, theirs in zip(alive, SEEN, strict=True):
        assert own[0] == theirs[0] and own[1].any() and own[2].any() and own[4] == theirs[4] == 1.0
        for a, b in zip(own[1:4], theirs[1:4], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("grown", [Zero(), Normal(0.1), NegativeGradient(0.5)])
def test_grown_weights_start_as_in_dense_storage(grown: GrownValue) -> None:
    method = RigL(sparsity=0.75, every=EVERY, end=100, distribution=fxsparse.Uniform(), grown=grown)
    model, handle, x = alive_only(method=method)
    other, second, _ = alive_only(method=method)
    fxsparse.restore_dense(second)
    for each, its in ((model, handle), (other, second)):
        before = masks(each)["0.0.weight"].clone()
        steps(each, its, x, EVERY)
        new = masks(each)["0.0.weight"] & ~before
        weight = masked_weights(each)["0.0.weight"]
        assert new.any() and bool(weight.dense(weight.weight.detach())[new].any()) is not isinstance(grown, Zero)
    fxsparse.restore_dense(handle)
    assert equal(bits(model), bits(other))


def test_what_somebody_wrote_into_dead_entries_does_not_grow() -> None:
    model, handle, x = alive_only()
    fxsparse.restore_dense(handle)
    steps(model, handle, x, 1)
    weight = handle.masked["0.0.weight"]
    state, before = handle._states().of(weight.name), weight.mask.clone()
    weight.weight.data.masked_fill_(~before, 5.0)
    with torch.no_grad():
        handle._change(state, before.roll(1, 1))
    assert not torch.equal(weight.mask, before)
    assert not weight.weight[weight.mask & ~before].any() and not weight.weight[~weight.mask].any()


def test_states_are_made_when_they_are_read_and_replaced_as_they_are() -> None:
    model, handle, x = alive_only()
    steps(model, handle, x, 1)
    state = handle._states()[0]
    assert state.shape == (WIDE, WIDE) and state.device == x.device and not state.has_gradient
    raw = vars(state)
    assert not isinstance(raw["weight"], Tensor) and isinstance(state.weight, Tensor)
    assert not isinstance(raw["weight"], Tensor) and state.weight is not state.weight
    moved = state.replaced(mask=~state.mask)
    assert not isinstance(vars(moved)["weight"], Tensor) and torch.equal(moved.mask, ~state.mask)
    whole = dataclasses.replace(state, mask=~state.mask)
    assert torch.equal(whole.weight, moved.weight) and torch.equal(whole.mask, moved.mask)
    assert [each.name for each in handle._states()[1:]] == list(handle.masked)[1:]


@pytest.mark.parametrize("scale", [1e30, float("nan")])
def test_products_that_overflow_are_noticed_before_anything_changes(scale: float) -> None:
    model, handle, x = alive_only()
    steps(model, handle, x, EVERY - 1)
    before = bits(model)
    handle.optimizer.zero_grad()
    (model(x)[:, 0] * scale).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():  # the parameters' own gradients say nothing
            if parameter.grad is not None:
                parameter.grad.zero_()
    with pytest.warns(RuntimeWarning, match="non-finite gradient"):
        window = handle._window
        for tap in window._taps.values():
            assert isinstance(tap.total, PackedGradient)
            tap.total = dataclasses.replace(tap.total, alive=torch.zeros_like(tap.total.alive))
            for one in tap.total.passes:
                for part in one:
                    assert isinstance(part, Product)
                    part.input.mul_(1e20)
        handle.optimizer.step()
    assert handle.step == EVERY - 1 and equal(before, bits(model))


def test_large_factors_that_never_meet_are_finite() -> None:
    weight = masked_weights(alive_only()[0])["0.0.weight"]
    x, gradient = torch.zeros(2, WIDE), torch.zeros(2, WIDE)
    x[0], gradient[1] = 1e25, 1e25
    alive = torch.zeros_like(weight.weight)

    def packed(*factors: Tensor) -> PackedGradient:
        made = Product(*factors, weight.shape, lambda a, b: b.t() @ a)
        return PackedGradient.of(weight, alive, (made,))

    assert packed(x, gradient).is_finite()
    assert not packed(x, gradient.flip(0)).is_finite()
    assert not packed(x * float("nan"), gradient).is_finite()
    assert not PackedGradient.of(weight, alive + float("inf"), ()).is_finite()
    assert PackedGradient.of(weight, alive, ()).dense().shape == weight.shape


class Scaled(Gradient):
    """A saliency that reads the weight, though its base does not."""

    def formula(self, given: Any) -> Tensor:
        return given.g.abs() * given.w.abs() / given.w.abs().sum()


def test_a_formula_of_its_own_is_given_whole_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Gradient.elementwise and not Gradient.reads_weight
    assert not Scaled.elementwise and Scaled.reads_weight
    monkeypatch.setattr(shared_support, "_BLOCK", 1)
    w, g = torch.randn(8, 6), torch.randn(8, 6)
    state = WeightState("w", 0, 1, 1, 0, w, w > 9, SharedSupport(2), gradient=g)
    units = state.units
    for saliency in (Scaled(), Gradient(), Magnitude()):
        expected = units.pool(saliency.score(w, g), saliency.pooling)
        assert torch.equal(state.scores(saliency), expected) and expected.any()


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("order", [False, True])
def test_blocks_of_groups_have_the_bits_of_all_at_once(
    pooling: Pooling, order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape, layout in (((50, 33), Layout()), ((96, 7, 3, 3), Layout()), ((20, 12, 3), Layout.conv_transpose())):
        rows = layout.matrix_shape(shape)[0]
        units = SharedSupport(5).units(shape, layout, torch.randperm(rows) if order else None)
        scores = torch.randn(shape)
        whole = units.pool(scores, pooling)
        assert len(units._blocks()) == 1
        with monkeypatch.context() as patch:
            patch.setattr(shared_support, "_BLOCK", 40)
            assert len(units._blocks()) > 1 or units.segments < 2 * torch.get_num_threads()
            assert torch.equal(units.pool(scores, pooling), whole)
            scores.view(-1)[3] = float("nan")
            with pytest.raises(fxsparse.errors.DataError, match=f"1 of {scores.numel()} scores are NaN"):
                units.pool(scores, pooling)


@pytest.mark.parametrize("storage", ["dense", "alive"])
def test_autocast_trains_alike_wherever_the_backward_pass_and_the_step_run(storage: str) -> None:
    found = []
    for inside in ((True, True), (True, False), (False, False)):
        model, handle, x = alive_only()
        if storage == "dense":
            fxsparse.restore_dense(handle)
        for _ in range(EVERY):
            handle.optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(x).float().square().mean()
            for enabled, act in zip(inside, (loss.backward, handle.optimizer.step), strict=True):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                    act()
        assert handle.updates == 1 and sum(row.grown for row in handle.report()) > 0
        found.append(bits(model))
    assert equal(found[0], found[1]) and equal(found[0], found[2])
