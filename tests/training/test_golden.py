"""The published tables of single exchanges, through `attach` on every memory layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxsparse.nn import Guard, MaskSpec, Route, install_mask, masked_weight
from fxsparse.sparsity import DropKind, Unstructured
from fxsparse.training import SET, Initial, RigL, WeightState, attach

W16 = [9, -1, 0, 0, 1, 5, 0, -3, 0, 1, -7, 0, 2, 0, 0, 4]
G16 = [90, 90, 1, 5, 8, 90, 2, 90, 1, 3, 90, 4, 90, 5, 0, 90]
W8 = [3, -3, 3, 0, 5, 3, 0, -6]


class Holder(nn.Module):
    """A weight of any layout with the dense gradient that the test chooses."""

    def __init__(self, weight: Tensor, gradient: Tensor, guard: Guard) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.guard = guard
        route = Route.PARAMETER if guard is Guard.GRADIENT else Route.MASK_NODE
        install_mask(self, "weight", MaskSpec(route=route, guard=guard), weight != 0)
        self.gradient = gradient

    def forward(self) -> Tensor:
        seen = self.weight if self.guard is Guard.GRADIENT else masked_weight(self.weight, self.weight_mask)
        return (seen * self.gradient).sum()


def permuted(values: Tensor) -> Tensor:
    """The same values at the same indices, another order in memory."""
    axes = list(range(values.ndim))[::-1]
    return values.permute(axes).contiguous().permute(axes)


LAYOUTS = {
    "flat": lambda v: v.reshape(-1),
    "square": lambda v: v.reshape(-1, 4),
    "conv": lambda v: v.reshape(2, -1, 2, 2) if v.numel() == 16 else v.reshape(2, 1, 2, 2),
    "square transposed in memory": lambda v: permuted(v.reshape(-1, 4)),
    "conv reversed in memory": lambda v: permuted(v.reshape(2, -1, 2, 2)),
}
GUARDS = [Guard.FORWARD, Guard.GRADIENT]


def alive(mask: Tensor) -> set[int]:
    return set(mask.reshape(-1).nonzero().flatten().tolist())


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(
    ("regrow", "expected"),
    [(True, {0, 1, 3, 4, 5, 7, 10, 12, 15}), (False, {0, 1, 3, 5, 7, 10, 12, 13, 15})],
)
def test_rigl(layout, dtype, guard, regrow, expected):
    weight = layout(torch.tensor(W16, dtype=dtype))
    signs = torch.tensor([(-1) ** i for i in range(16)], dtype=dtype)
    model = Holder(weight.clone(), layout(torch.tensor(G16, dtype=dtype) * signs), guard)
    optimizer = adam(model.parameters())
    # the first step fills the optimizer's state, the second one updates
    method = RigL(alpha=0.25, every=2, end=100, decay=DropKind.CONSTANT, regrow_dropped=regrow, initial=Initial.KEEP)
    handle = attach(model, optimizer, method)
    model().backward()
    optimizer.step()
    state = {key: optimizer.state[model.weight][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    optimizer.zero_grad()
    model().backward()
    optimizer.step()
    assert handle.updates == 1 and alive(model.weight_mask) == expected
    assert torch.equal(model.weight.detach(), torch.where(model.weight_mask, weight, 0))
    kept = model.weight_mask & (weight != 0)
    for key, before in state.items():
        assert bool((before[weight != 0] != 0).all())
        assert torch.equal(optimizer.state[model.weight][key], torch.where(kept, before, 0))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("seed", range(5))
def test_set(layout, seed):
    weight = layout(torch.tensor(W8, dtype=torch.float64))
    model = Holder(weight.clone(), torch.ones_like(weight), Guard.FORWARD)
    optimizer = adam(model.parameters())
    attach(model, optimizer, SET(alpha=1 / 3, every=1, regrow_dropped=False, seed=seed, initial=Initial.KEEP))
    model().backward()
    optimizer.step()
    assert alive(model.weight_mask) == {0, 1, 3, 4, 6, 7}
    assert torch.equal(model.weight.detach(), torch.where(model.weight_mask, weight, 0))


def test_set_sign_split():
    # of the positive 3, 0, 5, 1 two go (the alive 0 counts as positive), of the negative -1, -4 one
    weight = torch.tensor([3.0, 0.0, 5.0, 1.0, -1.0, -4.0, 0.0, 0.0])
    model = Holder(torch.where(weight == 0, 1.0, weight), torch.ones(8), Guard.FORWARD)
    with torch.no_grad():
        model.weight.copy_(weight)
        model.weight_mask.copy_(torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool())
    optimizer = adam(model.parameters())
    method = SET(alpha=0.5, every=1, sign_split=True, regrow_dropped=True, initial=Initial.KEEP)
    handle = attach(model, optimizer, method)
    model().backward()
    optimizer.step()
    assert {0, 2, 5} <= alive(model.weight_mask)  # of 3, 0, 5, 1 the two smallest go, of -1, -4 the one nearest 0
    assert int(model.weight_mask.sum()) == 6
    assert bool((model.weight[[1, 3, 4]][~model.weight_mask[[1, 3, 4]]] == 0).all())
    assert handle.report().rows[0].alive == 6


@pytest.mark.parametrize("replaces", [True, False])
def test_replacing_the_step_is_a_flag(replaces):
    weight = torch.tensor(W16, dtype=torch.float64)
    model = Holder(weight.clone(), torch.tensor(G16, dtype=torch.float64), Guard.FORWARD)
    bias = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([*model.parameters(), bias], lr=2**-10)
    method = RigL(alpha=0.25, every=1, end=9, decay=DropKind.CONSTANT, replaces_step=replaces, initial=Initial.KEEP)
    handle = attach(model, optimizer, method)
    (model() + bias.sum()).backward()
    gradient = model.weight.grad
    optimizer.step()
    stepped = weight - 2**-10 * torch.tensor(G16, dtype=torch.float64) * (weight != 0)
    assert handle.step == handle.updates == 1
    assert torch.equal(model.weight.detach(), torch.where(model.weight_mask, weight if replaces else stepped, 0))
    assert bias.item() == (1.0 if replaces else 1 - 2**-10)
    assert model.weight.grad is gradient and bias.grad is not None  # put aside for the step only


def test_set_counts_zeros_as_positive():
    weight = torch.tensor([0.0, 1.0, -1.0, -2.0, 9.0])
    alive = torch.tensor([True, True, True, True, False])
    state = WeightState("w", 0, 1, 1, 0, weight, alive, Unstructured())
    method = SET(alpha=0.5, sign_split=True, every=1)
    assert method.drop_counts([state]) == {"w": 2}  # the 0 of {0, 1} and the -1 of {-1, -2}
    assert (method.drop_scores(state) == -1).tolist() == [[True, False, True, False, False]]
