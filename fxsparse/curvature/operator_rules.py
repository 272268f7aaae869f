"""Forward-mode rules that are cheaper than torch's own.

1. Layers that read data: without the product of the weight with the tangent of zeros that their input has, which costs
   as much as the layer itself.
2. Attention without a mask: a plain softmax, without the search for rows that are masked as a whole, as one function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_is_traced: Any = torch._C._functorch.is_functorch_wrapped_tensor  # it has no public name
_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class _Linear(torch.autograd.Function):
    """X W^T + b as a function of W and b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        (ctx.x, _, bias) = inputs
        ctx.biased = bias is not None

    @staticmethod
    def jvp(ctx: Any, _: None, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(ctx.x, weight, bias)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        d = delta.flatten(0, -2)
        return None, d.mT @ ctx.x.flatten(0, -2), d.sum(0) if ctx.biased else None


class _Conv(torch.autograd.Function):
    """A convolution as a function of weight and bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        stride, padding, dilation, groups = options
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.x, weight, bias, ctx.options = inputs
        ctx.shape, ctx.biased = tuple(weight.shape), bias is not None

    @staticmethod
    def jvp(ctx: Any, _: None, weight: Tensor, bias: Tensor | None, __: None) -> Tensor:
        stride, padding, dilation, groups = ctx.options
        return torch.convolution(ctx.x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        stride, padding, dilation, groups = ctx.options
        weight = ctx.x.new_empty(()).expand(ctx.shape)
        _, found, _ = torch.ops.aten.convolution_backward(
            delta,
            ctx.x,
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            (0,) * len(stride),
            groups,
            (False, True, False),
        )
        return None, found, delta.sum((0, *range(2, delta.ndim))) if ctx.biased else None, None


class CheapRules(TorchFunctionMode):
    """Calls of linear layers and convolutions on data, and of attention, go through these rules."""

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if _of_data(given) and given["input"].ndim > 1 and given["weight"].ndim == 2:
                return _Linear.apply(given["input"], given["weight"], given.get("bias"))  # type: ignore[no-untyped-call]  # untyped in torch
        elif func in _CONVOLUTIONS:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            given = dict(zip(names, args, strict=False)) | kwargs
            dims = _CONVOLUTIONS[func]
            if _of_data(given) and given["input"].ndim == dims + 2 and not isinstance(given.get("padding", 0), str):
                each = [
                    _each(given.get(name, value), dims)
                    for name, value in (("stride", 1), ("padding", 0), ("dilation", 1))
                ]
                options = (*each, given.get("groups", 1))
                return _Conv.apply(given["input"], given["weight"], given.get("bias"), options)  # type: ignore[no-untyped-call]  # untyped in torch
        elif (
            func is F.scaled_dot_product_attention
            and len(args) == 3
            and set(kwargs) <= _ATTENTION
            and args[0].shape[:-2] == args[1].shape[:-2] == args[2].shape[:-2]
        ):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


_ATTENTION = {"is_causal", "scale"}


class _Attention(torch.autograd.Function):
    """The product P v with the softmax P of q k^T s, all of them functions of parameters; P comes along."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        scores = (q * scale) @ k.mT
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        p = scores.softmax(-1)
        return p @ v, p

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        q, k, v, _, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, output[1])
        ctx.save_for_forward(q, k, v, output[1])

    @staticmethod
    def jvp(ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *_: None) -> tuple[Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        terms = [] if dv is None else [p @ dv]
        ds = None if dq is None else dq @ k.mT
        if dk is not None:
            ds = q @ dk.mT if ds is None else ds.add_(q @ dk.mT)
        if ds is not None:
            terms.append(_through_softmax(ds.mul_(ctx.scale), p) @ v)
        return (terms[0] if len(terms) == 1 else terms[0].add_(terms[1])), None

    @staticmethod
    def backward(ctx: Any, delta: Tensor, _: Any) -> tuple[Any, ...]:
        q, k, v, p = ctx.saved_tensors
        ds = _through_softmax(delta @ v.mT, p).mul_(ctx.scale)
        return ds @ k, ds.mT @ q, p.mT @ delta, None, None


def _through_softmax(d: Tensor, p: Tensor) -> Tensor:
    """The softmax's Jacobian, which is symmetric: p (d - sum p d)."""
    found: Tensor = torch._softmax_backward_data(d, p, -1, p.dtype)
    return found


def _attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """The product of v with the softmax of q k^T s."""
    found: Tensor = _Attention.apply(q, k, v, is_causal, q.shape[-1] ** -0.5 if scale is None else scale)[0]  # type: ignore[no-untyped-call]  # untyped in torch
    return found


def _of_data(given: dict[str, Any]) -> bool:
    """Whether the input is no function of parameters, and everything else is."""
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    return not _is_traced(x) and not x.requires_grad and _is_traced(weight) and (bias is None or _is_traced(bias))


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values
