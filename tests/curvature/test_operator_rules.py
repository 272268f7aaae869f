"""Cheaper forward-mode rules: the same values and derivatives as torch's own, and less work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from fxsparse.curvature.operator import CurvatureOperator
from fxsparse.curvature.operator_rules import CheapRules
from fxsparse.curvature.operator_scope import _load_forward_rules
from fxsparse.errors import CaptureError
from tests.curvature import operator_oracle as oracle


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _forward_rules() -> None:
    _load_forward_rules()  # with a deprecated function of torch


def _written(y: Tensor) -> Tensor:
    y[:, 0] = 0
    y[..., 1:3].mul_(2)
    return F.relu_(y)


Q = drawn(2, 3, 5, 4)
X0 = drawn(7, 6)
X1 = drawn(7, 3, 6)
X2 = drawn(6)
X3 = drawn(3, 4, 9)
X4 = drawn(3, 4, 7, 7)
X5 = drawn(2, 2, 4, 4, 4)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "linear": (lambda w, b, x=X0: F.linear(x, w, b), (drawn(5, 6, seed=1), drawn(5, seed=2))),
    "linear over tokens": (lambda w, x=X1: F.linear(x, w), (drawn(5, 6, seed=1),)),
    "linear of one vector": (lambda w, b, x=X2: F.linear(x, w, b), (drawn(5, 6, seed=1), drawn(5, seed=2))),
    "bias that is no parameter": (lambda w, x=X0: F.linear(x, w, drawn(5)), (drawn(5, 6, seed=1),)),
    "conv1d": (lambda w, x=X3: F.conv1d(x, w, dilation=2, padding=1), (drawn(5, 4, 3, seed=1),)),
    "conv2d": (
        lambda w, b, x=X4: F.conv2d(x, w, b, stride=2, padding=(1, 0), groups=2),
        (drawn(6, 2, 3, 3, seed=1), drawn(6, seed=2)),
    ),
    "conv2d same": (lambda w, x=X4: F.conv2d(x, w, padding="same"), (drawn(6, 4, 3, 3, seed=1),)),
    "conv3d": (
        lambda w, b, x=X5: F.conv3d(x, w, b),
        (drawn(3, 2, 2, 2, 2, seed=1), drawn(3, seed=2)),
    ),
    "two layers": (
        lambda w, v, x=X0: F.linear(torch.tanh(F.linear(x, w)), v),
        (drawn(5, 6, seed=1), drawn(3, 5, seed=2)),
    ),
    "tied layers": (lambda w, x=X0: F.linear(torch.tanh(F.linear(x, w)), w), (drawn(6, 6, seed=1),)),
    "linear behind a parameter": (
        lambda x, w, b: F.linear(torch.tanh(x).mT, w, b),
        (drawn(6, 7, seed=3), drawn(5, 6, seed=1), drawn(5, seed=2)),
    ),
    "linear of a fixed weight": (lambda x, b: F.linear(x, X0, b), (drawn(3, 6, seed=1), drawn(7, seed=2))),
    "linear of a fixed product": (lambda b: F.linear(X0, X0, b), (drawn(7, seed=2),)),
    "conv2d behind a parameter": (
        lambda x, w, b: F.conv2d(torch.tanh(x), w, b, 2, (1, 0), 1, 2),
        (drawn(3, 4, 7, 7, seed=3), drawn(6, 2, 3, 3, seed=1), drawn(6, seed=2)),
    ),
    "conv1d of a fixed weight": (lambda x, b: F.conv1d(x, drawn(5, 4, 3), b), (X3, drawn(5, seed=2))),
    "conv1d of a fixed product": (lambda b: F.conv1d(X3, drawn(5, 4, 3), b), (drawn(5, seed=2),)),
    "layer norm": (
        lambda x, w, b: F.layer_norm(x.mT, (3, 5), w, b, 0.1),
        (drawn(4, 5, 3, seed=3), drawn(3, 5, seed=1), drawn(3, 5, seed=2)),
    ),
    "layer norm without a weight": (lambda x: F.layer_norm(x, (6,)), (X1,)),
    "layer norm of data": (lambda w, b: F.layer_norm(X1, (6,), w, b), (drawn(6, seed=1), drawn(6, seed=2))),
    "layer norm, its shift": (lambda b: F.layer_norm(X1, (6,), bias=b), (drawn(6, seed=2),)),
    "parts are overwritten": (
        lambda w, b: _written(F.linear(X0, w, b)),
        (drawn(5, 6, seed=1), drawn(5, seed=2)),
    ),
    "parts of tokens are overwritten": (
        lambda w, b, v: _written(F.linear(_written(F.linear(X1, w, b)), v)),
        (drawn(5, 6, seed=1), drawn(5, seed=2), drawn(4, 5, seed=3)),
    ),
    "parts of a convolution are overwritten": (
        lambda w, v: _written(F.conv2d(_written(F.conv2d(X4, w)), v)),
        (drawn(6, 4, 3, 3, seed=1), drawn(2, 6, 3, 3, seed=3)),
    ),
    "parts of a norm are overwritten": (
        lambda w, b: _written(F.layer_norm(_written(F.layer_norm(X1, (6,), w, b)), (6,), w)),
        (drawn(6, seed=1), drawn(6, seed=2)),
    ),
    "parts of attention are overwritten": (
        lambda q: _written(F.scaled_dot_product_attention(q, q, q)),
        (Q,),
    ),
    "fixed keys": (lambda q: F.scaled_dot_product_attention(q, drawn(2, 3, 6, 4), drawn(2, 3, 6, 5)), (Q,)),
    "fixed values": (
        lambda k: F.scaled_dot_product_attention(Q, k, drawn(2, 3, 6, 5)),
        (drawn(2, 3, 6, 4, seed=1),),
    ),
    "values alone": (lambda v: F.scaled_dot_product_attention(Q, Q, v), (drawn(2, 3, 5, 5, seed=2),)),
    "keys for several heads": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        (drawn(2, 4, 5, 4, seed=3), drawn(2, 2, 6, 4, seed=1)),
    ),
    "attention": (F.scaled_dot_product_attention, (Q, drawn(2, 3, 6, 4, seed=1), drawn(2, 3, 6, 5, seed=2))),
    "causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        (Q, drawn(2, 3, 6, 4, seed=1), drawn(2, 3, 6, 5, seed=2)),
    ),
    "masked": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=drawn(5, 6) > 0),
        (Q, drawn(2, 3, 6, 4, seed=1), drawn(2, 3, 6, 5, seed=2)),
    ),
}


def both(rule: Callable[..., Tensor], at: tuple[Tensor, ...], *modes: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Value, tangent, and what the reverse pass returns."""
    leaves = [each.clone().requires_grad_() for each in at]
    with contextlib.ExitStack() as stack:
        stack.enter_context(forward_ad.dual_level())
        for mode in modes:
            stack.enter_context(mode)
        duals = [
            forward_ad.make_dual(each, torch.cos(5 * drawn(*each.shape, seed=9 + k))) for k, each in enumerate(leaves)
        ]
        value, tangent = forward_ad.unpack_dual(rule(*duals))
    assert tangent is not None
    back = torch.autograd.grad(value, leaves, torch.cos(value.detach()))
    return value.detach(), tangent.detach(), list(back)


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_those_of_torch(name: str) -> None:
    rule, at = CASES[name]
    with sdpa_kernel(SDPBackend.MATH):
        expected = both(rule, at)
        found = both(rule, at, CheapRules())
    assert torch.allclose(found[0], expected[0], rtol=1e-12, atol=1e-14)
    assert torch.allclose(found[1], expected[1], rtol=1e-12, atol=1e-13)
    for mine, theirs in zip(found[2], expected[2], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-13)


class Seen(TorchDispatchMode):
    """Operators that run, products of matrices and convolutions apart."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "convolution"):
            self.products.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "products"),
    [("linear over tokens", 2), ("conv2d", 2), ("two layers", 5), ("conv2d behind a parameter", 3), ("attention", 6)],
)
def test_products_with_tangents_of_data_are_not_made(name: str, products: int) -> None:
    """Value and tangent: two products for a layer of data, three for the layers behind it."""
    rule, at = CASES[name]
    seen = Seen()
    with torch.no_grad(), forward_ad.dual_level(), CheapRules(), seen:
        rule(*[forward_ad.make_dual(each, torch.ones_like(each)) for each in at])
    assert len(seen.products) == products, seen.products


def test_tangents_are_made_without_a_graph() -> None:
    rule, at = CASES["two layers"]
    leaves = [each.clone().requires_grad_() for each in at]
    with forward_ad.dual_level(), CheapRules():
        duals = [forward_ad.make_dual(each, torch.ones_like(each)) for each in leaves]
        value, tangent = forward_ad.unpack_dual(F.linear(duals[0], duals[0]))
    assert value.requires_grad
    assert tangent is not None and not tangent.requires_grad


def test_a_product_is_one_forward_and_one_reverse_pass() -> None:
    """784-512-256-10 in small: 2 + 3 + 3 products on the way forward, 1 + 2 + 2 on the way back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    ggn = CurvatureOperator(model, None, "cross_entropy", (X0[:, :1].expand(7, 7).clone(), torch.arange(7) % 4))
    v = drawn(ggn.space.size)
    seen = Seen()
    with seen:
        ggn.mv(v)
    assert len(seen.products) == 13, seen.products


def test_without_tangents_torch_runs_its_own() -> None:
    layer = nn.Linear(6, 3).double()
    with CheapRules():
        value = layer(X0)
        rows = torch.func.jacrev(lambda w: F.linear(X0, w).sum(0))(layer.weight.detach())
    assert type(value.grad_fn).__name__ == "AddmmBackward0"
    assert torch.allclose(rows[0, 0], X0.sum(0))


class Normed(nn.Module):
    """Weight norm by its formula."""

    def __init__(self, first: nn.Module, last: nn.Linear, dim: int | None) -> None:
        super().__init__()
        weights = first.parametrizations.weight
        self.bias, self.g, self.v = first.bias, weights.original0, weights.original1
        self.last, self.axes = last, [0, 1] if dim is None else [1 - dim]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.g * self.v / self.v.square().sum(self.axes, keepdim=True).sqrt()
        return self.last(F.linear(x, weight, self.bias).tanh())


@pytest.mark.parametrize("dim", [0, 1, None])
def test_second_derivatives_of_weight_norm(dim: int | None) -> None:
    """The derivative of torch's own reverse pass is wrong, and not symmetric."""
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(3, 4), dim=dim), nn.Tanh(), nn.Linear(4, 3)).double()
    formula = Normed(model[0], model[2], dim)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    names = {id(p): name for name, p in model.named_parameters()}
    op = CurvatureOperator(model, None, "cross_entropy", (x, y), "hessian")
    order = [(op.space.slice_of(names[id(p)]), p) for p in formula.parameters()]
    v = torch.randn(op.space.size, 2, dtype=torch.float64)
    given = torch.cat([v[place] for place, _ in order])
    products = [oracle.hessian_product(formula, (x,), y, oracle.cross_entropy, each) for each in given.T]
    found = torch.cat([op.mm(v)[place] for place, _ in order])
    assert torch.allclose(found, torch.stack(products, 1), rtol=1e-10, atol=1e-12)
    alone = torch.cat([op.mv(v[:, 0])[place] for place, _ in order])
    assert torch.allclose(alone, products[0], rtol=1e-10, atol=1e-12)
    assert op.engine._way == 0
    op.engine._way = 1  # plain autograd
    plain = torch.cat([op.mm(v)[place] for place, _ in order])
    assert torch.allclose(plain, torch.stack(products, 1), rtol=1e-10, atol=1e-12)


class _Scaled(torch.autograd.Function):
    """x exp(s), whose backward pass takes exp(s) for a constant where it goes to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, s)
        return x * s.exp()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        x, s = ctx.saved_tensors
        return delta * s.detach().exp(), (delta * x * s.exp()).sum(0)


class ScaledLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(3, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return _Scaled.apply(self.first(x), self.scale)


def test_hessians_that_are_not_symmetric_are_refused() -> None:
    torch.manual_seed(0)
    model, x, y = ScaledLayer().double(), torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    for check in (True, False):
        with pytest.raises(CaptureError, match=r"not symmetric.*not differentiable itself"):
            CurvatureOperator(model, None, "cross_entropy", (x, y), "hessian", check=check).mv(torch.ones(15))
    op = CurvatureOperator(model, None, "cross_entropy", (x, y))  # first derivatives are right
    v = torch.randn(15, dtype=torch.float64)
    assert torch.allclose(op.mv(v), op.dense() @ v, rtol=1e-10, atol=1e-12)
    one = CurvatureOperator(model, ["scale"], "cross_entropy", (x, y), "hessian").dense()
    assert torch.allclose(one, one.T, rtol=1e-10, atol=1e-12)
