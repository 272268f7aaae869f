"""The selection by bits equals torch's `where`, bit for bit, in every use."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from fxsparse.nn import select
from fxsparse.nn.select import keep_, selected

FAST = (torch.float32, torch.float16, torch.bfloat16)
ODD = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1.0])
SHAPES: list[tuple[int, ...]] = [(), (0,), (600,), (40, 30), (8, 4, 3, 9)]


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[values.element_size()])


def drawn(seed: int, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=source)
    odd = torch.rand(shape, generator=source) < 0.2
    values[odd] = ODD[torch.randint(len(ODD), (int(odd.sum()),), generator=source)]
    return values.to(dtype), torch.rand(shape, generator=source) < 0.5


@pytest.mark.parametrize("shape", [(2**18 + 3,), (600, 900), (300, 70, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_go_in_blocks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = drawn(0, dtype, shape)
    turned = [tuple(each.movedim(-1, 0).contiguous().movedim(0, -1) for each in plain)] if len(shape) > 1 else []
    mixed = [(turned[0][0], plain[1])] if turned else []
    for values, mask in (plain, *turned, *mixed, tuple(each[..., ::2] for each in plain)):
        expected, before = torch.where(mask, values, 0.0), values.clone()
        found = selected(values, mask)
        assert torch.equal(bits(expected), bits(found)) and torch.equal(bits(values), bits(before))
        assert found.stride() == torch.empty_like(values).stride()
        keep_(values, mask)
        assert torch.equal(bits(expected), bits(values))
        values.copy_(before)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**16), st.sampled_from((*FAST, torch.float64)), st.sampled_from(SHAPES), st.booleans())
def test_all_bits_are_those_of_where(seed: int, dtype: torch.dtype, shape: tuple[int, ...], last: bool) -> None:
    values, mask = drawn(seed, dtype, shape)
    if last and values.ndim == 4:
        values, mask = values.to(memory_format=torch.channels_last), mask.to(memory_format=torch.channels_last)
    elif last and values.ndim == 2:
        values = values.t().contiguous().t()
    expected, found = torch.where(mask, values, 0.0), selected(values, mask)
    assert torch.equal(bits(expected), bits(found)) and found.dtype is dtype
    assert not values.numel() or dtype not in FAST or found.numel() < 512 or found.stride() == values.stride()
    written = values.clone()
    keep_(written, mask)
    assert torch.equal(bits(expected), bits(written))
    selected(values, mask).fill_(5)  # a tensor of its own
    assert torch.equal(bits(values), bits(drawn(seed, dtype, shape)[0]))


def test_the_product_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[torch.dtype] = []
    product = select._product
    monkeypatch.setattr(select, "_product", lambda values, mask: ran.append(values.dtype) or product(values, mask))
    for dtype in (*FAST, torch.float64, torch.complex64):
        values = torch.randn(40, 30).to(dtype)
        assert torch.equal(selected(values, values.abs() > 1), torch.where(values.abs() > 1, values, 0.0))
    assert ran == list(FAST)
    ran.clear()
    assert selected(torch.ones(40, 30), torch.ones(30) > 0).shape == (40, 30)  # a mask of another shape is broadcast
    assert torch.equal(selected(torch.ones(3), torch.ones(3) > 0), torch.ones(3)) and not ran


@pytest.mark.parametrize("dtype", FAST)
def test_gradients_are_those_of_where(dtype: torch.dtype) -> None:
    values, mask = torch.randn(40, 30).to(dtype).requires_grad_(), torch.rand(40, 30) > 0.5
    incoming = torch.randn(40, 30).to(dtype)
    incoming[~mask] = math.nan
    for each in (incoming, incoming[:1, :1].expand(40, 30)):
        (expected,) = torch.autograd.grad(torch.where(mask, values, 0.0), values, each)
        (found,) = torch.autograd.grad(selected(values, mask), values, each)
        assert torch.equal(bits(expected), bits(found))


def test_gradients_of_gradients() -> None:
    values, mask = torch.randn(40, 30, requires_grad=True), torch.rand(40, 30) > 0.5
    (first,) = torch.autograd.grad(selected(values, mask).pow(3).sum(), values, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), values)
    assert torch.equal(second, torch.where(mask, 6 * values, 0.0).detach())
    assert torch.autograd.grad(selected(values, mask).sum(), values, allow_unused=True)[0] is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
def test_transforms_and_recomputation_see_the_same() -> None:
    values, mask = torch.randn(40, 30), torch.rand(40, 30) > 0.5
    kept = torch.where(mask, values, 0.0)
    assert torch.equal(grad(lambda v: selected(v, mask).square().sum())(values), 2 * kept)
    assert torch.equal(vmap(lambda v: selected(v, mask))(torch.stack([values, -values]))[1], -kept)
    assert torch.equal(jvp(lambda v: selected(v, mask), (values,), (values,))[1], kept)
    with dual_level():
        tangent = unpack_dual(selected(make_dual(values, values), mask)).tangent
        assert tangent is not None and torch.equal(tangent, kept)
    again = values.clone().requires_grad_()
    checkpoint(lambda v: selected(v, mask).square().sum(), again, use_reentrant=False).backward()
    assert torch.equal(again.grad, 2 * kept)
    with torch.inference_mode():
        assert torch.equal(selected(values, mask), kept)


def test_a_mask_that_changes_before_the_backward_pass_is_an_error() -> None:
    values, mask = torch.randn(40, 30, requires_grad=True), torch.rand(40, 30) > 0.5
    result = selected(values, mask).sum()
    mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()
