"""What goes wrong in user loops is refused by name, or skipped with a warning; nothing is silent."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import Linear, accelerate, decelerate, fast_report, masked_weights, masks, set_masks
from fxsparse.sparsity import ERK, ConstantFanIn, CustomSparsity, Magnitude, SharedSupport, Uniform, Wanda
from fxsparse.training import (
    ACDC,
    GMP,
    ITOP,
    MEST,
    SET,
    SNFS,
    SNIP,
    Densify,
    GraSP,
    Growth,
    Initial,
    MeanUniform,
    NegativeGradient,
    NonFinite,
    OneShot,
    RigL,
    SRigL,
    Static,
    SynFlow,
    attach,
    prune,
)
from fxsparse.training.alive_only import restore_dense, store_alive

READERS = {
    "rigl": RigL(0.5, every=2, end=99),
    "srigl": SRigL(0.5, every=2, end=99),
    "snfs": SNFS(0.5, every=2, end=99),
    "itop": ITOP(0.5, every=2, growth=Growth.GRADIENT),
    "mest": MEST(0.5, every=2, boundaries=(50, 60), gradient=0.5),
    "set, grown by gradient": SET(0.5, every=2, grown=NegativeGradient(0.1)),
}
BLIND = {
    "set": SET(0.5, every=2),
    "gmp": GMP(0.5, every=2, end=8),
    "acdc": ACDC(0.5, every=2, end=8),
    "mest soft": MEST(0.5, every=2, boundaries=(50, 60), soft=True),
    "itop, unseen first": ITOP(0.5, every=2),
}
EVERY = {**BLIND, **READERS, "static": Static(0.5)}


def build(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(Linear(6, 10, bias=False), nn.Tanh(), Linear(10, 4, bias=False))


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 4, generator=generator)


def backward(model: nn.Module, optimizer, step: int = 0, scale: float = 1.0) -> None:
    optimizer.zero_grad()
    x, y = batch(step)
    (scale * nn.functional.mse_loss(model(x), y)).backward()


def prepared(method, lr: float = 0.05):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return model, optimizer, attach(model, optimizer, method)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", READERS)
def test_non_finite_gradients_wait_by_default(name, bad):
    model, optimizer, handle = prepared(READERS[name])
    for step in range(2):
        backward(model, optimizer, step, bad if step == 1 else 1.0)
        if step == 1:
            before, memory = snapshot(model), {k: dict(v) for k, v in handle._memory.items()}
            with pytest.warns(RuntimeWarning, match="non-finite gradient at step 2 in `0.weight`, `2.weight`: neither"):
                optimizer.step()
            assert unchanged(model, before) and handle.step == 1 and handle.updates == 0
            assert all(torch.equal(handle._memory[k][n], t) for k, v in memory.items() for n, t in v.items())
        else:
            optimizer.step()
    backward(model, optimizer, 2)
    optimizer.step()
    assert handle.step == 2 and handle.updates == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", READERS)
def test_non_finite_gradients_raise_where_configured(name, bad):
    model, optimizer, handle = prepared(replace(READERS[name], non_finite=NonFinite.RAISE))
    for step in range(2):
        backward(model, optimizer, step, bad if step == 1 else 1.0)
        if step == 0:
            optimizer.step()
    before = snapshot(model)
    with pytest.raises(DataError, match="non-finite gradient at step 2 in `0.weight`"):
        optimizer.step()
    assert unchanged(model, before) and handle.step == 1 and handle.updates == 0
    backward(model, optimizer, 2)
    optimizer.step()
    assert handle.updates == 1
    with pytest.raises(ConfigError, match="`non_finite`"):
        replace(READERS[name], non_finite="skip")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", [*BLIND, *READERS])
def test_weights_that_are_not_finite_never_make_a_mask(name, bad):
    method = {**READERS, **BLIND}[name]
    model, optimizer, handle = prepared(method)
    backward(model, optimizer)
    optimizer.step()
    backward(model, optimizer, 1)
    first = masked_weights(model)["0.weight"]
    with torch.no_grad():
        first.weight.view(-1)[first.mask.view(-1).nonzero()[0]] = bad
    before = {n: m.clone() for n, m in masks(model).items()}
    with pytest.raises(DataError, match="mask update of `0.weight` at step 2: the weight holds NaN or Inf"):
        optimizer.step()
    assert all(torch.equal(m, before[n]) for n, m in masks(model).items()) and handle.updates == 0


@pytest.mark.parametrize("where", ["0.weight", "2.weight", "1.bias"])
@pytest.mark.parametrize("name", READERS)
def test_a_diverged_training_does_not_wait_for_ever(name, where):
    """Every later gradient is NaN too, so an update that waits for a finite one never comes."""
    method = READERS[name]
    model = build()
    model[1] = nn.BatchNorm1d(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    handle = attach(model, optimizer, method)
    backward(model, optimizer)
    optimizer.step()
    own = dict(model.named_parameters())[where]
    with torch.no_grad():
        own.view(-1)[int(masks(model)[where].flatten().nonzero()[0]) if where in masks(model) else 0] = math.nan
    backward(model, optimizer, 1)
    before = {n: m.clone() for n, m in masks(model).items()}
    with pytest.raises(
        DataError, match=f"at step 2 in .*, and `{where}` holds NaN or Inf \\(=1 values\\): the training"
    ):
        optimizer.step()
    assert all(torch.equal(m, before[n]) for n, m in masks(model).items())
    assert handle.updates == 0 and handle.step == 1


def test_the_update_after_an_error_is_still_an_update():
    model, optimizer, handle = prepared(RigL(0.5, every=1, end=9))
    backward(model, optimizer)
    with torch.no_grad():
        model[0].weight.view(-1)[model[0].weight_mask.view(-1).nonzero()[0]] = math.nan
    with pytest.raises(DataError):
        optimizer.step()
    with torch.no_grad():
        model[0].weight.nan_to_num_()
    backward(model, optimizer)
    optimizer.step()
    assert handle.updates == 1 and handle.step == 2


@pytest.mark.parametrize("name", [*BLIND, *READERS])
def test_skipped_steps_of_a_scaler_do_not_count(name):
    method = {**READERS, **BLIND}[name]
    plain_model, plain, plain_handle = prepared(method)
    model, optimizer, handle = prepared(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for step in range(6):
        backward(plain_model, plain, step)
        plain.step()
        if step in (1, 3):  # an overflow before the good step
            optimizer.zero_grad()
            x, y = batch(step)
            scaler.scale(nn.functional.mse_loss(model(x), y) * math.inf).backward()
            before = snapshot(model)
            scaler.step(optimizer)
            scaler.update()
            assert unchanged(model, before) and handle.step == step
        optimizer.zero_grad()
        x, y = batch(step)
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(m, masks(model)[n]) for n, m in masks(plain_model).items()), step
    assert handle.step == plain_handle.step == 6 and handle.updates == plain_handle.updates
    for key, memory in plain_handle._memory.items():  # powers of two scale exactly
        assert all(torch.equal(value, handle._memory[key][n]) for n, value in memory.items())


@pytest.mark.parametrize("configured", NonFinite)
@pytest.mark.parametrize("name", READERS)
def test_a_step_that_a_fused_optimizer_skips_is_no_bad_input(name, configured):
    """A scaler hands such an optimizer the overflow and lets it skip: nothing is left to warn of or to raise."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    handle = attach(model, optimizer, replace(READERS[name], non_finite=configured))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for step in range(4):
        optimizer.zero_grad()
        x, y = batch(step)
        scaler.scale(nn.functional.mse_loss(model(x), y) * (math.inf if step == 1 else 1.0)).backward()
        before = snapshot(model)
        scaler.step(optimizer)
        scaler.update()
        assert unchanged(model, before) == (step == 1)
    assert handle.step == 3 and handle.updates == 1


@pytest.mark.parametrize("name", [*BLIND, *READERS])
def test_zero_gradients(name):
    model, optimizer, handle = prepared({**READERS, **BLIND}[name])
    alive = sum(int(m.sum()) for m in masks(model).values())
    for step in range(5):
        backward(model, optimizer, step, 0.0)
        optimizer.step()
    assert handle.updates >= 1 and handle.step == 5
    after = sum(int(m.sum()) for m in masks(model).values())
    if name not in ("gmp", "acdc", "mest soft", "srigl"):
        assert after == alive
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.mark.parametrize("alive", [0, 1])
@pytest.mark.parametrize("name", EVERY)
def test_dead_layers_and_single_weights(name, alive):
    method = replace(EVERY[name], initial=Initial.KEEP, sparsity=0.9 if name == "gmp" else 0.5)
    model = build()
    few = torch.zeros(10, 6, dtype=torch.bool)
    few.view(-1)[:alive] = True
    set_masks(model, {"0.weight": few, "2.weight": torch.arange(40).reshape(4, 10) % 2 == 0})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if name == "srigl" and not alive:  # one row with one weight is a constant fan-in
        with pytest.raises(ConfigError, match="`0.weight`: `mask` breaks ConstantFanIn"):
            attach(model, optimizer, method)
        return
    handle = attach(model, optimizer, method)
    before = {n: int(m.sum()) for n, m in masks(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            backward(model, optimizer, step)
            optimizer.step()
    after = {n: int(m.sum()) for n, m in masks(model).items()}
    assert handle.updates >= (name != "static")
    if name == "snfs":
        assert sum(after.values()) == sum(before.values()) and min(after.values()) >= min(alive, 1)
    elif name == "gmp":
        assert after["0.weight"] == alive and 1 <= after["2.weight"] < before["2.weight"]
    elif name == "mest soft":
        assert before["0.weight"] <= after["0.weight"] and after["2.weight"] >= before["2.weight"]
    elif name != "acdc":
        assert after == before
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_growing_into_a_dead_layer_gives_finite_values():
    model = build()
    set_masks(model, {"0.weight": torch.zeros(10, 6, dtype=torch.bool)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    class Revive(ACDC):
        grown = MeanUniform()

    handle = attach(
        model, optimizer, Revive(0.5, every=1, start=1, end=3, distribution=Uniform(), initial=Initial.KEEP)
    )
    for step in range(3):
        backward(model, optimizer, step)
        optimizer.step()
    assert handle.updates and bool(model[0].weight.isfinite().all())


def test_a_target_below_the_present_sparsity_needs_a_method_that_grows():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    attach(model, optimizer, Static(0.9)).detach()
    before = snapshot(model)
    for method in (
        GMP(0.5, end=9),
        GMP(0.5, end=9, initial=Initial.KEEP),
        GMP(0.5, schedule=CustomSparsity(((3, 0.5),))),
    ):
        with pytest.raises(ConfigError, match="`sparsity` \\(=0.5\\) is below .*\\(=0.9.*never grows.*Densify"):
            attach(model, optimizer, method)
        assert unchanged(model, before)
    attach(model, optimizer, GMP(0.9, end=9)).detach()
    attach(model, optimizer, GMP(0.95, end=9)).detach()
    attach(model, optimizer, ACDC(0.5, end=9)).detach()
    attach(model, optimizer, Densify(0.5, path=(0.9, 0.5), cycle_steps=9)).detach()  # what the message advises
    attach(model, optimizer, GMP(0.5, start=3, end=3, initial=Magnitude())).detach()


@pytest.mark.parametrize("name", EVERY)
def test_a_method_is_attached_once(name):
    model, optimizer, handle = prepared(EVERY[name])
    before = snapshot(model)
    with pytest.raises(ConfigError, match="`optimizer` \\(=SGD\\) drives Handle.* already; detach"):
        attach(model, optimizer, EVERY[name])
    other = torch.optim.Adam(model.parameters())
    with pytest.raises(ConfigError, match="`0.weight` is driven by Handle.* through another optimizer"):
        attach(model, other, EVERY[name])
    assert unchanged(model, before)
    handle.detach()
    attach(model, other, EVERY[name])


@pytest.mark.parametrize("name", EVERY)
def test_the_optimizer_must_hold_every_masked_weight(name):
    model = build()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="`optimizer` \\(=SGD\\) does not hold `2.weight`"):
        attach(model, optimizer, EVERY[name])
    assert unchanged(model, before)
    optimizer.add_param_group({"params": [model[2].weight]})
    handle = attach(model, optimizer, EVERY[name])
    backward(model, optimizer)
    optimizer.step()
    del optimizer.param_groups[1]
    with pytest.raises(ConfigError, match="holds `2.weight` no more"):
        optimizer.step()
    assert handle.step == 1


def _replace_parameter(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


def _replace_module(model: nn.Module) -> None:
    model[2] = nn.Linear(10, 4)


def _assign(model: nn.Module) -> None:
    model.load_state_dict(build(1).state_dict(), assign=True)


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        (_replace_parameter, "parameter `2.weight` was replaced after attach"),
        (_replace_module, "module `2` with `2.weight` was replaced after attach"),
        (_assign, "parameter `0.weight` was replaced after attach"),
    ],
)
@pytest.mark.parametrize("name", EVERY)
def test_replaced_parameters_are_named(name, swap, message):
    model, optimizer, handle = prepared(EVERY[name])
    backward(model, optimizer)
    optimizer.step()
    swap(model)
    backward(model, optimizer)
    with pytest.raises(ConfigError, match=f"{message}; detach"):
        optimizer.step()
    assert handle.step == 1
    handle.detach()
    optimizer.step()  # nobody minds any more


@pytest.mark.parametrize("name", [*BLIND, *READERS])
def test_closures(name):
    method = {**READERS, **BLIND}[name]
    plain_model, plain, plain_handle = prepared(method)
    model, optimizer, handle = prepared(method)
    for step in range(5):
        backward(plain_model, plain, step)
        plain.step()

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            x, y = batch(step)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
    assert handle.updates == plain_handle.updates >= 1
    for one, other in zip(model.state_dict().values(), plain_model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:LBFGS keeps state of another shape:UserWarning")
@pytest.mark.parametrize("name", [*BLIND, *READERS])
def test_optimizers_that_call_closures_many_times(name):
    model = build()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    handle = attach(model, optimizer, {**READERS, **BLIND}[name])
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            x, y = batch(step)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert handle.updates >= 1
    for weight in masked_weights(model).values():
        assert bool((weight.weight[~weight.mask] == 0).all())


@pytest.mark.parametrize("name", READERS)
def test_a_step_without_any_backward_pass_says_so(name):
    _, optimizer, _ = prepared(READERS[name])
    with pytest.raises(ConfigError, match="no gradient was seen before step"):
        optimizer.step()
        optimizer.step()


def test_frozen_weights_are_left_out_by_those_that_read_gradients():
    model = build()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = attach(model, optimizer, SNFS(0.5, distribution=ERK(), every=1), 9)
    first = model[0].weight_mask.clone()
    for step in range(3):
        backward(model, optimizer, step)
        optimizer.step()
    assert torch.equal(first, model[0].weight_mask) and handle.updates == 3


PRUNES = {
    "snip": SNIP(0.5),
    "grasp": GraSP(0.5),
    "synflow": SynFlow(0.5, rounds=3),
    "magnitude": OneShot(0.5),
    "wanda": OneShot(0.5, saliency=Wanda()),
}


def pruned(name: str, model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    return prune(model, PRUNES[name], [batch()], lambda y, t: scale * nn.functional.mse_loss(y, t))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", PRUNES)
def test_weights_that_are_not_finite_are_never_pruned_by(name, bad):
    model = build()
    with torch.no_grad():
        model[2].weight[1, 2] = bad
    before = snapshot(model)
    with pytest.raises(DataError, match="hold NaN or Inf|NaN"):
        pruned(name, model)
    assert all(torch.equal(value.nan_to_num(), before[n].nan_to_num()) for n, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_pruning_by_gradients_that_are_not_finite(name):
    model = build()
    before = snapshot(model)
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match="scores of `0.weight` hold NaN or Inf"):
            pruned(name, model, bad)
    assert unchanged(model, before)
    found = pruned(name, model, 0.0)  # all scores are 0: ties go to the lower index
    assert sum(int(mask.sum()) for mask in found.values()) == 50


@pytest.mark.parametrize("alive", [0, 1])
@pytest.mark.parametrize("name", PRUNES)
def test_pruning_around_a_dead_layer(name, alive):
    model = build()
    few = torch.zeros(10, 6, dtype=torch.bool)
    few.view(-1)[:alive] = True
    set_masks(model, {"0.weight": few})
    found = pruned(name, model)
    assert torch.equal(found["0.weight"], few) and 1 <= int(found["2.weight"].sum()) <= 40


@pytest.mark.parametrize("total", ["9", 1.5, True, 0, -3, [4]])
def test_lengths_that_are_no_count_of_steps(total):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ConfigError, match=r"`total_steps` \(="):
        attach(model, optimizer, SET(0.5), total)
    attach(model, optimizer, SET(0.5), np.int64(9))


@pytest.mark.parametrize("kind", [RigL, SET, SNFS, GMP, SRigL])
@pytest.mark.parametrize(("option", "value"), [("every", 1.5), ("every", "2"), ("every", True), ("end", 9.5)])
def test_steps_that_are_no_integers(kind, option, value):
    with pytest.raises(ConfigError, match=f"`{option}` \\(={value!r}\\) must be .* step, an integer"):
        kind(0.5, **{option: value}).timed(20).check(ConstantFanIn())


@pytest.mark.parametrize("start", [2.5, None, "0"])
def test_starts_that_are_no_integers(start):
    with pytest.raises(ConfigError, match="`start`"):
        RigL(0.5, start=start)


def test_what_is_no_model_and_no_handle():
    for act in (accelerate, decelerate, fast_report):
        for bad in (3, None, "model", [nn.Linear(2, 2)]):
            with pytest.raises(ConfigError, match=r"`model` \(=.*\) must be a torch.nn.Module"):
                act(bad)
    for act in (store_alive, restore_dense):
        for bad in (3, build()):
            with pytest.raises(ConfigError, match=r"`handle` \(=.*\) must be what fxsparse.attach returned"):
                act(bad)
    model = nn.Sequential(Linear(16, 16, pattern=SharedSupport(4)))
    for bad in ("a", True, [0.5], 2.0, math.nan, -0.1):
        with pytest.raises(ConfigError, match=r"`sparse_threshold` \(="):
            accelerate(model, sparse_threshold=bad)
    assert len(fast_report(model)) == 0  # nothing has changed
    assert len(accelerate(model, sparse_threshold=1)) == 1


def test_decelerate_names_the_mend_and_changes_nothing():
    model = nn.Sequential(Linear(16, 16, pattern=SharedSupport(4)), Linear(16, 8, pattern=SharedSupport(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = attach(model, optimizer, SET(0.5, distribution=Uniform()))
    store_alive(handle)
    with pytest.raises(ConfigError, match=r"`0` stores its alive weights only; call restore_dense\(handle\) first"):
        decelerate(model)
    assert len(fast_report(model)) == 2
    restore_dense(handle)
    decelerate(model)
    assert len(fast_report(model)) == 0
