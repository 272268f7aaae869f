"""Averaged copies that follow: the masks of now, and the averages of everything else."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import fxsparse
from fxsparse.errors import ConfigError
from fxsparse.nn import FastMode, Linear, accelerate, masked_weights, masks
from fxsparse.sparsity import SharedSupport, Taylor, Uniform
from fxsparse.training import GMP, RESU, SET, Lengths, Method, Regroup, RigL, attach
from fxsparse.training.alive_only import store_alive

STEPS, DECAY = 24, 0.9  # with which the average of equal integers is not that integer
METHODS: dict[str, Method] = {
    "rigl": RigL(0.6, every=3, alpha=0.5, distribution=Uniform()),
    "set": SET(0.6, every=3, alpha=0.5, distribution=Uniform()),
    "gmp, regrouped": GMP(0.6, every=3, distribution=Uniform(), regroup=Regroup()),
}
AVERAGES: dict[str, dict[str, Any]] = {
    "ema of lists": {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)},
    "ema": {"avg_fn": get_ema_avg_fn(DECAY)},
    "mean": {},
}


def build(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        four = SharedSupport(4)
        layers = [Linear(8, 24, pattern=four), nn.BatchNorm1d(24), nn.Tanh(), Linear(24, 8, pattern=four)]
        return nn.Sequential(*layers).double()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.zero_grad()
    x = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    nn.functional.cross_entropy(model(x), x.argmax(1)).backward()
    optimizer.step()


def start(name: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    return model, optimizer, attach(model, optimizer, METHODS[name], STEPS)


def share(average: str, number: int) -> float:
    return 1 / (number + 1) if average == "mean" else 1 - DECAY


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("copied", [False, True])
def test_a_copy_that_follows_is_the_average_under_the_present_masks(
    name: str, average: str, buffers: bool, copied: bool
) -> None:
    model, optimizer, handle = start(name)
    follower = AveragedModel(model, use_buffers=buffers, **AVERAGES[average])
    handle.follow(follower)
    handle.follow(follower)  # twice is once
    if copied:
        model, optimizer, handle, follower = copy.deepcopy((model, optimizer, handle, follower))
    mean: dict[str, Tensor] = {}
    for number in range(STEPS):
        step(model, optimizer, number)
        follower.update_parameters(model)
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            now, kept = value.detach().clone(), masks(model).get(key, 1)
            if "weight_" in key or not now.is_floating_point() or ("running" in key and not buffers):
                mean[key] = now
            else:
                before = mean.get(key, now) * kept
                mean[key] = before + (now - before) * share(average, number if number else 0) if number else now
    for key, value in [*follower.module.named_parameters(), *follower.module.named_buffers()]:
        if key == "1.num_batches_tracked" and buffers:
            continue  # torch averages it as a number
        torch.testing.assert_close(value.detach(), mean[key], rtol=0, atol=1e-12, msg=key)
    for weight in masked_weights(follower.module).values():
        weight.spec.pattern.check(weight.mask, weight.spec.layout, weight.row_order)
        assert not weight.weight.detach()[~weight.mask].any()
    assert handle.updates > 3


def test_without_following_an_average_of_masks_is_what_torch_makes_of_it() -> None:
    """What the documents warn of: the union, or an error."""
    model, optimizer, _ = start("rigl")
    union = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    mean = AveragedModel(model, use_buffers=True)
    step(model, optimizer, 0)
    mean.update_parameters(model)
    with pytest.raises(RuntimeError, match="bool"):
        mean.update_parameters(model)
    for number in range(1, STEPS):
        union.update_parameters(model)
        step(model, optimizer, number)
    alive = {key: int(mask.sum()) for key, mask in masks(model).items()}
    assert all(int(mask.sum()) > alive[key] for key, mask in masks(union.module).items())


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("buffers", [True, False])
def test_accelerated_and_alive_only_models(average: str, buffers: bool) -> None:
    """The copies of models that store indices, and of those that store alive entries only, hold the same averages."""
    found = []
    for kind in ("masked", "sparse", "alive"):
        model, optimizer, handle = start("rigl")
        if kind != "masked":
            accelerate(model, mode=FastMode.SPARSE)
        if kind == "alive":
            store_alive(handle)
        follower = AveragedModel(model, use_buffers=buffers, **AVERAGES[average])
        handle.follow(follower)
        for number in range(STEPS):
            step(model, optimizer, number)
            follower.update_parameters(model)
        x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
        found.append((follower.eval()(x).detach(), follower.module.state_dict()))
    for output, state in found[1:]:
        torch.testing.assert_close(output, found[0][0], rtol=0, atol=1e-8)
        for key, value in state.items():
            torch.testing.assert_close(value, found[0][1][key], rtol=0, atol=1e-8)


def test_averages_go_on_after_compaction() -> None:
    """What is copied belongs to the copy that stands in the average then."""
    model, optimizer, handle = start("rigl")
    follower = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    handle.follow(follower)
    for number in range(4):
        step(model, optimizer, number)
        follower.update_parameters(model)
    handle.detach()
    small = fxsparse.compact(model, (torch.randn(4, 8, dtype=torch.float64),), optimizer, followers=follower)
    follower.update_parameters(small)
    for key, mask in masks(follower.module).items():
        assert torch.equal(mask, masks(small)[key])


@pytest.mark.parametrize("early", [True, False])
def test_averages_of_a_phase_follow_before_or_after_its_state_is_loaded(early: bool) -> None:
    method = RESU(0.5, cycles=2, rise=1, distribution=Uniform(), lengths=Lengths(0.5, 0, 0.5), score=Taylor())

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = build()
        fxsparse.training.make_loadable(model, method)
        return model, torch.optim.AdamW(model.parameters(), lr=0.02)

    def go(model: nn.Module, optimizer: Any, follower: AveragedModel, first: int, last: int) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "theta hardly moved")
            for number in range(first, last):
                step(model, optimizer, number)
                follower.update_parameters(model)

    model, optimizer = made()
    handle: Any = attach(model, optimizer, method, STEPS)
    follower = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    handle.follow(follower)
    stop = handle.method.timeline.cycles[0].enter + 2
    go(model, optimizer, follower, 0, stop)
    saved = copy.deepcopy([each.state_dict() for each in (model, optimizer, follower, handle)])
    other, second = made()
    again = AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for part, state in zip((other, second, again), saved, strict=False):
        part.load_state_dict(state)
    resumed: Any = attach(other, second, method, STEPS, state=saved[3])
    if early:
        with pytest.raises(ConfigError, match="1 averaged models followed the saved handle"):
            second.step()
    resumed.follow(again)
    go(model, optimizer, follower, stop, STEPS)
    go(other, second, again, stop, STEPS)
    for one, two in ((model, other), (follower, again)):
        for (key, value), expected in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            assert torch.equal(value, expected), key
