"""Cheaper forward-mode rules: the same values and derivatives as torch's own, and less work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fxsparse.curvature.operator_rules import CheapRules
from fxsparse.curvature.operator_scope import _load_forward_rules


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _forward_rules() -> None:
    _load_forward_rules()  # with a deprecated function of torch


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


def both(rule: Callable[..., Tensor], at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Any]:
    """Value, tangent, and what the reverse pass returns, one inside of the other."""
    along = tuple(drawn(*each.shape, seed=9 + k) for k, each in enumerate(at))
    pulls: list[Any] = []

    def primal(*each: Tensor) -> Tensor:
        value, pull = vjp(rule, *each)
        pulls.append(pull)
        return value

    value, tangent = jvp(primal, at, along)
    return value, tangent, pulls[0](torch.cos(value))


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_those_of_torch(name: str) -> None:
    rule, at = CASES[name]
    with sdpa_kernel(SDPBackend.MATH):
        expected = both(rule, at)
        with CheapRules():
            found = both(rule, at)
    assert torch.allclose(found[0], expected[0], rtol=1e-12, atol=1e-14)
    assert torch.allclose(found[1], expected[1], rtol=1e-12, atol=1e-14)
    for mine, theirs in zip(found[2], expected[2], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "products"), [("linear over tokens", 2), ("conv2d", 2), ("two layers", 5)])
def test_products_with_tangents_of_data_are_not_made(name: str, products: int) -> None:
    """Value and tangent: two products for a layer of data, three for the layers behind it."""
    rule, at = CASES[name]
    seen: list[str] = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "convolution"):
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    along = tuple(torch.ones_like(each) for each in at)
    with CheapRules(), Counted():
        jvp(rule, at, along)
    assert len(seen) == products, seen
