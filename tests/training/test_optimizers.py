"""Dead weights and their state stay zero under every optimizer of torch.optim."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.nn import Linear, masked_weights
from fxsparse.training import GMP, MEST, SET, SNFS, RigL, Static, attach

optim = torch.optim
PLAIN = {"foreach": False}
FOREACH = {"foreach": True}
FUSED = {"fused": True}

CASES = [
    *[(optim.SGD, {"lr": 0.1, "weight_decay": 0.1, **how}) for how in (PLAIN, FOREACH, FUSED)],
    *[
        (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, **how})
        for how in (PLAIN, FOREACH, FUSED)
    ],
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True, **FOREACH}),
    *[(optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, **how}) for how in (PLAIN, FOREACH, FUSED)],
    *[(optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, **how}) for how in (PLAIN, FOREACH, FUSED)],
    (optim.AdamW, {"lr": 0.01, "maximize": True, **FUSED}),
    *[
        (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1, **h})
        for h in (PLAIN, FOREACH)
    ],
    *[
        (optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1, "weight_decay": 0.1, **h})
        for h in (PLAIN, FOREACH)
    ],
    (optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1, "weight_decay": 0.1, **FUSED}),
    *[(optim.Adadelta, {"weight_decay": 0.1, **how}) for how in (PLAIN, FOREACH)],
    *[(optim.Adamax, {"weight_decay": 0.1, **how}) for how in (PLAIN, FOREACH)],
    *[(optim.NAdam, {"weight_decay": 0.1, **how}) for how in (PLAIN, FOREACH)],
    *[(optim.RAdam, {"weight_decay": 0.1, **how}) for how in (PLAIN, FOREACH)],
    *[(optim.Rprop, how) for how in (PLAIN, FOREACH)],
    *[(optim.ASGD, {"weight_decay": 0.1, "t0": 2, **how}) for how in (PLAIN, FOREACH)],
    (optim.Muon, {"lr": 0.02, "weight_decay": 0.1}),
    (optim.Adafactor, {"lr": 0.02, "weight_decay": 0.1}),
    (optim.LBFGS, {"lr": 0.1, "max_iter": 3}),
]
IDS = [f"{kind.__name__}-{'-'.join(f'{k}={v}' for k, v in kwargs.items())}" for kind, kwargs in CASES]
METHODS = [
    Static(sparsity=0.7),
    SET(sparsity=0.7, every=2, end=7),
    RigL(sparsity=0.7, every=2, end=7),
    GMP(sparsity=0.7, every=2, end=7),
    SNFS(sparsity=0.7, every=2, end=7),
    MEST(sparsity=0.7, every=2, end=7, p=(0.2, 0.0), boundaries=(8,), gradient=0.1),
]


def build() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(Linear(8, 12, bias=False), nn.Tanh(), Linear(12, 4, bias=False)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    return model, torch.randn(16, 8, generator=generator).double(), torch.randn(16, 4, generator=generator).double()


def closure_of(model, optimizer, x, y):
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    return closure


def assert_clean(model, optimizer) -> None:
    for name, masked in masked_weights(model).items():
        dead = ~masked.mask
        assert bool(dead.any()) and bool(masked.mask.any())
        assert bool((masked.weight.detach()[dead] == 0).all()), name
        assert bool(masked.weight.detach().isfinite().all())
        for key, value in optimizer.state.get(masked.weight, {}).items():
            if isinstance(value, Tensor) and value.shape == masked.weight.shape:
                assert bool((value[dead] == 0).all()), (name, key)


@pytest.mark.filterwarnings("ignore:.*keeps state of another shape:UserWarning")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize(("kind", "kwargs"), CASES, ids=IDS)
def test_zeros_are_the_dead(kind, kwargs, method):
    model, x, y = build()
    optimizer = kind(model.parameters(), **kwargs)
    handle = attach(model, optimizer, method)
    closure = closure_of(model, optimizer, x, y)
    moved = False
    for step in range(9):
        before = [masked.weight.detach().clone() for masked in masked_weights(model).values()]
        if kind is optim.LBFGS or step % 2:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        if handle.updates or not isinstance(method, GMP):
            assert_clean(model, optimizer)
        moved |= any(
            not torch.equal(old[masked.mask], masked.weight.detach()[masked.mask])
            for old, masked in zip(before, masked_weights(model).values(), strict=True)
        )
    assert moved and handle.step == 9
    assert handle.updates == (0 if isinstance(method, Static) else 4 if isinstance(method, GMP) else 3)
    alive = sum(int(masked.mask.sum()) for masked in masked_weights(model).values())
    assert alive == 29 + 15  # K(96, .7) + K(48, .7)


@pytest.mark.parametrize("momentum", [True, False])
def test_hooks_are_needed(momentum):
    """The same training without the handle revives the dead: the property above is no accident."""
    model, x, y = build()
    kwargs = {"lr": 0.1, "momentum": 0.9} if momentum else {"lr": 0.1}
    optimizer = optim.SGD(model.parameters(), **kwargs) if momentum else optim.Adamax(model.parameters())
    closure = closure_of(model, optimizer, x, y)
    closure()
    optimizer.step()
    handle = attach(model, optimizer, SET(sparsity=0.7, every=1))
    handle.detach()
    for masked in masked_weights(model).values():  # what a mask edit by hand forgets
        optimizer.state[masked.weight]["momentum_buffer" if momentum else "exp_inf"].fill_(1.0)
    closure()
    optimizer.step()
    with pytest.raises(AssertionError):
        assert_clean(model, optimizer)


def test_grown_weights_start_without_state_and_survivors_keep_theirs():
    model, x, y = build()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    handle = attach(model, optimizer, RigL(sparsity=0.5, every=4, end=100, alpha=0.4))
    closure = closure_of(model, optimizer, x, y)
    for _ in range(3):
        closure()
        optimizer.step()
    masks = {name: masked.mask.clone() for name, masked in masked_weights(model).items()}
    state = {name: copy.deepcopy(optimizer.state[masked.weight]) for name, masked in masked_weights(model).items()}
    closure()
    optimizer.step()
    assert handle.updates == 1
    for name, masked in masked_weights(model).items():
        new, kept = masked.mask & ~masks[name], masked.mask & masks[name]
        assert bool(new.any()) and bool(kept.any())
        assert bool((masked.weight.detach()[new] == 0).all())
        after = optimizer.state[masked.weight]
        for key in ("exp_avg", "exp_avg_sq"):
            assert bool((after[key][new] == 0).all())
            assert torch.equal(after[key][kept], state[name][key][kept]) and bool((after[key][kept] != 0).any())
        assert (
            after["step"] == state[name]["step"] == 3
        )  # the replaced step counts for the schedule, not for the optimizer
    closure()
    optimizer.step()
    for name, masked in masked_weights(model).items():  # alive zeros get gradients and move
        new = masked.mask & ~masks[name]
        assert bool((masked.weight.detach()[new] != 0).all())


def test_factored_state_is_reset_whole_with_one_warning():
    model, x, y = build()
    optimizer = optim.Adafactor(model.parameters(), lr=0.02)
    attach(model, optimizer, RigL(sparsity=0.7, every=2, end=7))
    closure = closure_of(model, optimizer, x, y)
    closure()
    optimizer.step()
    assert bool((optimizer.state[model[0].weight]["row_var"] != 0).any())
    closure()
    with pytest.warns(UserWarning, match="Adafactor keeps state of another shape .*col_var, row_var"):
        optimizer.step()
    state = optimizer.state[model[0].weight]
    assert bool((state["row_var"] == 0).all()) and bool((state["col_var"] == 0).all()) and state["step"] == 1
    for _ in range(2):
        closure()
        optimizer.step()  # a warning would be an error here


@pytest.mark.parametrize("kind", [optim.SparseAdam, "wrapper", "zero"])
def test_refused_optimizers_are_named(kind):
    model, _, _ = build()
    if kind == "wrapper":
        optimizer = object()
    elif kind == "zero":
        optimizer = type("ZeroRedundancyOptimizer", (optim.SGD,), {})(model.parameters(), lr=0.1)
    else:
        optimizer = kind(list(model.parameters()))
    name = type(optimizer).__name__
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=f"`optimizer` \\(={name}\\)"):
        attach(model, optimizer, Static())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_param_groups_added_later_are_put_aside_too():
    model, x, y = build()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    handle = attach(model, optimizer, RigL(sparsity=0.7, every=2, end=7))
    late = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    values = []
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x) + late, y).backward()
        optimizer.step()
        values.append(late.detach().clone())
    assert not torch.equal(values[0], torch.zeros(4))
    assert torch.equal(values[1], values[0]) and torch.equal(values[3], values[2])  # update steps are replaced
    assert not torch.equal(values[2], values[1])
    assert handle.updates == 2


def test_schedulers_see_an_ordinary_optimizer():
    model, x, y = build()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    handle = attach(model, optimizer, RigL(sparsity=0.7, every=1, end=7))
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    closure = closure_of(model, optimizer, x, y)
    for _ in range(3):
        closure()
        optimizer.step()
        scheduler.step()
    assert handle.step == 3 and optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)


def test_gradients_that_bypass_the_mask_do_not_reach_the_optimizer():
    model, x, y = build()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(model, optimizer, Static(sparsity=0.7))
    (nn.functional.mse_loss(model(x), y) + model[0].weight.sum()).backward()
    optimizer.step()
    assert_clean(model, optimizer)
    assert bool((model[0].weight.grad[~model[0].weight_mask] == 0).all())


def test_a_failing_closure_leaves_nothing_put_aside():
    model, x, y = build()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    handle = attach(model, optimizer, RigL(sparsity=0.7, every=1, end=7))
    closure = closure_of(model, optimizer, x, y)

    def failing() -> Tensor:
        closure()
        raise KeyError("data")

    with pytest.raises(KeyError):
        optimizer.step(failing)
    assert handle.step == handle.updates == 0 and all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step(closure)
    assert handle.step == handle.updates == 1
