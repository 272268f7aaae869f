"""Backward passes that ask for less than everything, or for more: methods see the gradients of the masked model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import fxsparse
from fxsparse.errors import ConfigError

SHAPE = (3, 8, 4, 4)


class Net(nn.Module):
    """Linear layers and convolutions, one with a smaller last group, one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 20, 1)
        self.twice, self.head = nn.Linear(20, 20), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.point(torch.tanh(self.wide(x)))).mean((2, 3))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(y)))))


def adversarial(model: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_()
    (step,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    F.cross_entropy(model(x.detach() + 0.1 * step.sign()), y).backward()


def input_first(model: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y)
    loss.backward(inputs=[x], retain_graph=True)
    loss.backward()


def some_parameters(model: nn.Module, x: Tensor, y: Tensor) -> None:
    loss = F.cross_entropy(model(x), y)
    some = [model.head.weight, model.wide.weight]
    loss.backward(inputs=some, retain_graph=True)
    loss.backward(inputs=[each for each in model.parameters() if all(each is not one for one in some)])


def asked_by_grad(model: nn.Module, x: Tensor, y: Tensor) -> None:
    loss = F.cross_entropy(model(x), y)
    torch.autograd.grad(loss, [model.head.weight, model.twice.weight], retain_graph=True)
    loss.backward()


def frozen(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.wide.requires_grad_(False)
    F.cross_entropy(model(x), y).backward()
    model.wide.requires_grad_(True)
    F.cross_entropy(model(x), y).backward()


def penalty(model: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y)
    (of_x,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + 3 * of_x.square().sum()).backward()


def penalty_alone(model: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_()
    (of_x,) = torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)
    of_x.square().sum().backward()


def batched(model: nn.Module, x: Tensor, y: Tensor) -> None:
    parameters = [model.twice.weight, model.head.weight, model.twice.bias]
    out = model.head(torch.tanh(model.twice(x.flatten(1)[:, :20])))
    rows = torch.eye(6, dtype=x.dtype)[:, None, :].expand(6, *out.shape)
    found = torch.autograd.grad(out, parameters, rows, is_grads_batched=True, retain_graph=True)
    for i, row in enumerate(rows):
        for all_rows, one in zip(found, torch.autograd.grad(out, parameters, row, retain_graph=True), strict=True):
            torch.testing.assert_close(all_rows[i], one)
    F.cross_entropy(model(x), y).backward()


def forward_mode(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    expected = torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, expected)
    F.cross_entropy(model(x), y).backward()


PASSES: tuple[Callable[[nn.Module, Tensor, Tensor], None], ...] = (
    adversarial,
    input_first,
    some_parameters,
    asked_by_grad,
    frozen,
    penalty,
    penalty_alone,
    batched,
    forward_mode,
)


def run(how: Callable[..., None], storage: str, steps: int = 4) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    pattern = fxsparse.SharedSupport(8)
    model = fxsparse.transform(Net().double(), (torch.randn(SHAPE, dtype=torch.float64),), pattern=pattern)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = fxsparse.attach(model, optimizer, fxsparse.RigL(sparsity=0.6, every=1), total_steps=50)
    if storage != "masked":
        fxsparse.accelerate(model, mode=fxsparse.FastMode.SPARSE)
    if storage == "alive":
        fxsparse.store_alive(handle)
    for step in range(steps):
        draws = torch.Generator().manual_seed(step)
        x = torch.randn(SHAPE, dtype=torch.float64, generator=draws)
        optimizer.zero_grad()
        how(model, x, torch.arange(3))
        optimizer.step()
    return model, handle


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, of its forward mode
@pytest.mark.parametrize("storage", ["sparse", "alive"])
@pytest.mark.parametrize("how", PASSES, ids=lambda how: how.__name__)
def test_masks_and_weights_are_those_of_the_masked_model(how: Callable[..., None], storage: str) -> None:
    expected, reference = run(how, "masked")
    found, handle = run(how, storage)
    assert [(row.step, row.dropped, row.grown) for row in handle.report()] == [
        (row.step, row.dropped, row.grown) for row in reference.report()
    ]
    assert sum(row.grown for row in handle.report()) > 20
    for name, mask in fxsparse.masks(expected).items():
        assert torch.equal(fxsparse.masks(found)[name], mask), name
    state = copy.deepcopy(found.state_dict())
    for name, value in expected.state_dict().items():
        if not name.endswith("_mask"):
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12)


def test_convolutions_take_no_batch_of_gradients() -> None:
    model, _ = run(forward_mode, "sparse", steps=1)
    out = model.wide(torch.randn(SHAPE, dtype=torch.float64))
    with pytest.raises(ConfigError, match="`is_grads_batched`.*decelerate"):
        torch.autograd.grad(out, model.wide.weight, torch.ones(2, *out.shape, dtype=out.dtype), is_grads_batched=True)
