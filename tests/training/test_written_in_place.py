"""Layers with a sparse product among operations in place: every method sees the gradients that the masked model has."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import ConfigError

EVERY = 3


class Net(nn.Module):
    """A layer, what happens to its input and its output, and a head."""

    def __init__(self, layer: nn.Module, after: Callable[[Tensor], Tensor], zeroed: bool = False) -> None:
        super().__init__()
        self.layer, self.after, self.zeroed = layer, after, zeroed
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.layer(x)
        if self.zeroed:
            x.zero_()  # the layer has multiplied a copy, so autograd allows it
        y = self.after(y)
        return self.head(y if isinstance(self.layer, nn.Linear) else y.flatten(2).mean(2))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "linear, tanh_": (lambda: Net(nn.Linear(32, 64), torch.tanh_), (6, 32), False),
    "linear of three axes, relu_": (lambda: Net(nn.Linear(32, 64), nn.ReLU(True)), (3, 2, 32), False),
    "linear, uneven groups": (lambda: Net(nn.Linear(32, 64), nn.ReLU(True)), (6, 32), False),
    "linear, no bias, dropout": (
        lambda: Net(nn.Linear(32, 64, bias=False), lambda y: F.dropout(y.view(2, 3, 64), 0.0, True, True).view(6, 64)),
        (6, 32),
        False,
    ),
    "1x1 convolution, relu_": (lambda: Net(nn.Conv2d(32, 64, 1), nn.ReLU(True)), (3, 32, 4, 4), False),
    "1x1 convolution, stride 2": (
        lambda: Net(nn.Conv2d(32, 64, 1, 2, bias=False), nn.ReLU(True)),
        (3, 32, 5, 5),
        False,
    ),
    "3x3 convolution, relu_": (lambda: Net(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(True)), (3, 32, 4, 4), False),
    "circular convolution, input zeroed": (
        lambda: Net(nn.Conv2d(32, 64, 3, padding=1, padding_mode="circular"), torch.tanh, True),
        (3, 32, 4, 4),
        False,
    ),
    "autocast, input zeroed": (lambda: Net(nn.Linear(32, 64), torch.tanh, True), (6, 32), True),
}


def trained(name: str, storage: str, group: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[tuple[int, int]]]:
    """Masks, weights and exchanges after an update of RigL."""
    make, shape, autocast = CASES[name]
    torch.manual_seed(0)
    pattern = fxsparse.SharedSupport(group)
    model = fxsparse.transform(make(), (torch.randn(shape),), pattern=pattern)
    model = model if autocast else model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = fxsparse.RigL(sparsity=0.8, every=EVERY)
    handle = fxsparse.attach(model, optimizer, method, total_steps=40)
    if storage != "masked":
        fxsparse.accelerate(model, mode=fxsparse.FastMode.SPARSE)
    if storage == "alive":
        fxsparse.store_alive(handle)
    generator = torch.Generator().manual_seed(1)
    for _ in range(EVERY):
        optimizer.zero_grad()
        x = torch.randn(shape, generator=generator).to(torch.float32 if autocast else torch.float64)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.float().square().mean().backward() if autocast else y.square().mean().backward()
        optimizer.step()
    weights = {key: value.clone() for key, value in model.state_dict().items() if not key.endswith("_mask")}
    exchanged = [(row.dropped, row.grown) for row in handle.report().rows]
    return {key: mask.clone() for key, mask in fxsparse.masks(model).items()}, weights, exchanged


@pytest.mark.parametrize("storage", ["fast", "alive"])
@pytest.mark.parametrize("name", CASES)
def test_updates_are_those_of_the_masked_model(name: str, storage: str) -> None:
    group = 24 if "uneven" in name else 16
    masks, weights, exchanged = trained(name, "masked", group)
    found = trained(name, storage, group)
    assert exchanged[0][0] == exchanged[0][1] > 0
    assert found[2] == exchanged
    assert all(torch.equal(found[0][key], mask) for key, mask in masks.items())
    if not CASES[name][2]:
        for key, value in weights.items():
            torch.testing.assert_close(found[1][key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(32, 4, 4), (2, 32, 4, 4)])
def test_outputs_may_be_written_into(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(32, 64, 1), nn.ReLU(inplace=True))
    sparse = fxsparse.transform(plain, (torch.randn(shape),), pattern=fxsparse.SharedSupport(16), sparsity=0.5)
    dense = fxsparse.finalize(copy.deepcopy(sparse))
    fxsparse.accelerate(sparse, mode=fxsparse.FastMode.SPARSE)
    x = torch.randn(shape)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(sparse(first), dense(second))
    sparse(first).square().sum().backward()
    dense(second).square().sum().backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_state_of_dense_storage_is_refused_by_name() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 32)
    states = []
    for alive in (False, True):
        model = fxsparse.transform(nn.Sequential(nn.Linear(32, 64)), (example,), pattern=fxsparse.SharedSupport(16))
        optimizer = torch.optim.AdamW(model.parameters())
        handle = fxsparse.attach(model, optimizer, fxsparse.Static(sparsity=0.75), total_steps=9)
        if alive:
            fxsparse.store_alive(handle)
            optimizer.load_state_dict(states[0])
            before = {key: value.clone() for key, value in model.state_dict().items()}
        model(example).square().mean().backward()
        if alive:
            with pytest.raises(ConfigError, match=r"`exp_avg` of `0.weight` \(=\(64, 32\)\) is not stored as"):
                optimizer.step()
            assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        else:
            optimizer.step()
        states.append(copy.deepcopy(optimizer.state_dict()))
