"""Rewinding: the whole state comes back, the dead stay exactly zero, masked training is training of the survivors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.lottery import Step
from fxsparse.lottery.prunable import choose, ensure_masks, prunable_names
from fxsparse.lottery.rewind import DeadWeights, RewindOptimizer, moments, rewind
from fxsparse.nn import masks, set_masks
from fxsparse.training.loop import Samples, Task, TrainState, fit, start
from tests.lottery.nets import SIZES, Tiny, samples, tiny_task


def _masked(task: Task, seed: int = 0) -> tuple[TrainState, DeadWeights]:
    state = start(task, seed)
    ensure_masks(state.model, prunable_names(state.model))
    return state, DeadWeights(state.model, state.optimizer)


def _half(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(mask.shape, generator=generator) < 0.5 for name, mask in masks(model).items()}


def _ones(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(mask) for name, mask in masks(model).items()}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_dead_weights_and_moments_stay_exactly_zero(name: str) -> None:
    task = tiny_task(optimizer=OPTIMIZERS[name], scheduler=None, epochs=25)
    state, dead = _masked(task)
    fit(state, task, 10)
    origin = state.capture()
    fit(state, task, 20)
    chosen = _half(state.model)
    rewind(state, origin, chosen)
    dead.refresh()
    seen = []

    def check(state: TrainState, _: torch.Tensor) -> None:
        for weight, mask in chosen.items():
            assert not state.model.get_parameter(weight)[~mask].any()
            assert state.model.get_parameter(weight)[mask].all()
        for _, slot, value, mask in moments(state.model, state.optimizer):
            if slot not in ("step_size",):  # a step size of Rprop is no moment: nothing is moved by it alone
                assert not value[~mask].any()
            seen.append(slot)

    fit(state, task, on_step=check)
    assert state.step == 100 and seen


def test_the_whole_state_comes_back() -> None:
    task = tiny_task()
    state, dead = _masked(task)
    fit(state, task, 5)
    origin = state.capture()
    fit(state, task)
    moved = state.capture()
    for key in ("model/bn.running_mean", "model/bn.num_batches_tracked", "model/fc.bias", "random/cpu"):
        assert not torch.equal(moved.tensors[key], origin.tensors[key]), key
    rewind(state, origin, _ones(state.model))
    back = state.capture()
    assert back.values == origin.values and set(back.tensors) == set(origin.tensors)
    assert all(torch.equal(back.tensors[name], origin.tensors[name]) for name in origin.tensors)
    dead.close()


def test_masks_are_applied_to_weights_and_moments_of_step_k() -> None:
    task = tiny_task(optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    state, _ = _masked(task)
    fit(state, task, 6)
    origin = state.capture()
    fit(state, task)
    chosen = _half(state.model)
    rewind(state, origin, chosen)
    saved = origin.state()
    names = [name for name, _ in state.model.named_parameters()]
    slots = set()
    for name, mask in chosen.items():
        parameter = state.model.get_parameter(name)
        assert torch.equal(parameter, torch.where(mask, saved["model"][name], 0.0))
        for slot in ("exp_avg", "exp_avg_sq"):
            before = saved["optimizer"]["state"][names.index(name)][slot]
            assert before[~mask].any()
            assert torch.equal(state.optimizer.state[parameter][slot], torch.where(mask, before, 0.0))
            slots.add(slot)
        assert torch.equal(masks(state.model)[name], mask)
    assert slots == {"exp_avg", "exp_avg_sq"}
    assert torch.equal(state.model.bn.running_var, saved["model"]["bn.running_var"])


def test_fresh_optimizer_keeps_the_position_of_the_schedule() -> None:
    task = tiny_task()
    state, _ = _masked(task)
    fit(state, task, 5)
    origin, rate = state.capture(), state.optimizer.param_groups[0]["lr"]
    fit(state, task)
    assert state.optimizer.param_groups[0]["lr"] != rate
    rewind(state, origin, _ones(state.model), RewindOptimizer.FRESH)
    assert not state.optimizer.state and state.optimizer.param_groups[0]["lr"] == rate and state.step == 5
    assert state.scheduler is not None and state.scheduler.last_epoch == 5


def test_kept_weights_stay_trained() -> None:
    task = tiny_task()
    state, _ = _masked(task)
    fit(state, task, 3)
    origin = state.capture()
    fit(state, task)
    trained = {name: tensor.detach().clone() for name, tensor in state.model.state_dict().items() if "mask" not in name}
    chosen = _half(state.model)
    rewind(state, origin, chosen, kept=trained)
    for name, tensor in trained.items():
        wanted = torch.where(chosen[name], tensor, 0.0) if name in chosen else tensor
        assert torch.equal(state.model.state_dict()[name], wanted)
    assert state.step == 3 and not state.optimizer.state


def test_an_all_alive_round_repeats_round_0() -> None:
    task = tiny_task()
    plain = start(task, 4)
    fit(plain, task)
    state, dead = _masked(task, 4)
    origin = state.capture()
    for _ in range(2):
        rewind(state, origin, _ones(state.model))
        dead.refresh()
        fit(state, task)
        for name, tensor in plain.model.state_dict().items():
            assert torch.equal(state.model.state_dict()[name], tensor), name


class Survivors(nn.Module):
    """Two linear layers whose parameters are the surviving weights only: the slow oracle."""

    def __init__(self, model: nn.Sequential, chosen: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.masks = chosen
        for i in (0, 2):
            weight = model[i].weight.detach()
            setattr(self, f"w{i}", nn.Parameter(weight[chosen[f"{i}.weight"]].clone()))
            setattr(self, f"b{i}", nn.Parameter(model[i].bias.detach().clone()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in (0, 2):
            mask = self.masks[f"{i}.weight"]
            weight = torch.zeros(mask.shape, dtype=x.dtype).masked_scatter(mask, getattr(self, f"w{i}"))
            x = x @ weight.T + getattr(self, f"b{i}")
            x = torch.tanh(x) if i == 0 else x
        return x


@pytest.mark.parametrize("name", ["sgd", "sgd_fused", "adam", "adamw_foreach", "rmsprop"])
def test_masked_training_is_training_of_the_survivors(name: str) -> None:
    data = samples(24)
    data = Samples(data.inputs.double(), data.labels)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()

    task = Task(build, data, epochs=8, batch_size=6, optimizer=OPTIMIZERS[name])
    state, dead = _masked(task)
    chosen = _half(state.model)
    set_masks(state.model, chosen)
    dead.refresh()
    assert isinstance(state.model, nn.Sequential)
    oracle = Task(lambda: Survivors(state.model, chosen), data, epochs=8, batch_size=6, optimizer=OPTIMIZERS[name])
    small = start(oracle, 0)
    fit(small, oracle)
    before = {key: mask.clone() for key, mask in masks(state.model).items()}
    fit(state, task)
    for i in (0, 2):
        weight, mask = state.model[i].weight.detach(), chosen[f"{i}.weight"]
        torch.testing.assert_close(weight[mask], getattr(small.model, f"w{i}").detach(), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(state.model[i].bias, getattr(small.model, f"b{i}"), rtol=1e-11, atol=1e-13)
        assert torch.equal(before[f"{i}.weight"], masks(state.model)[f"{i}.weight"])


def test_only_prunable_weights_count() -> None:
    model = Tiny()
    assert {name: model.get_parameter(name).numel() for name in prunable_names(model)} == SIZES
    mixed = nn.ModuleDict(
        {
            "emb": nn.Embedding(4, 6),
            "attn": nn.MultiheadAttention(6, 2),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "norm": nn.LayerNorm(6),
            "frozen": nn.Linear(6, 6).requires_grad_(False),
            "tied": nn.Linear(6, 4, bias=False),
            "up": nn.ConvTranspose1d(2, 2, 3),
        }
    )
    mixed["tied"].weight = mixed["emb"].weight
    assert prunable_names(mixed) == ("attn.in_proj_weight", "attn.out_proj.weight", "grouped.weight", "up.weight")


def test_choosing_layers() -> None:
    model = Tiny()
    assert choose(model, ["out", "conv"]) == ("conv.weight", "out.weight")
    assert choose(model, ["*c*"]) == ("conv.weight", "fc.weight")
    assert choose(model, ["fc.weight"]) == ("fc.weight",)
    with pytest.raises(ConfigError, match=r"`prunable_layers` \(=bn\) matches no prunable weight"):
        choose(model, ["fc", "bn"])
    with pytest.raises(ConfigError, match="no prunable weight"):
        choose(nn.LayerNorm(3), None)


@pytest.mark.parametrize(("text", "step"), [("2ep", 14), ("500it", 500), ("2ep50it", 64), ("0it", 0), (3, 3), ("9", 9)])
def test_steps(text: str | int, step: int) -> None:
    parsed = Step.parse(text)
    assert parsed.resolve(7) == step and Step.parse(str(parsed)) == parsed


@pytest.mark.parametrize("text", ["", "ep", "2e", "-1it", "1.5ep", "5it2ep", True])
def test_bad_steps(text: str) -> None:
    with pytest.raises(ConfigError, match="rewind_step"):
        Step.parse(text)
