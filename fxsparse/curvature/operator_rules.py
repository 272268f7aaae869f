"""Forward-mode rules that are cheaper than torch's own, as one function for each of some layers.

1. Linear layers and convolutions: no product of a weight with the zeros that torch takes for the tangent of data, which
   costs as much as the layer itself; the terms of a tangent are added where they are made.
2. Layer norm: both terms of the tangent by the kernel of the reverse pass; the normalisation's Jacobian is symmetric.
3. Attention without a mask: a plain softmax, without the search for rows that are masked as a whole.
4. Embeddings with a padding row, whose tangent torch keeps and whose gradient it drops: here both are dropped.
5. Weight norm by its formula: the derivative of torch's own reverse pass is wrong.

Tangents are made without a graph: nobody differentiates them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

unpack_dual: Any = forward_ad.unpack_dual  # untyped in torch


class _Linear(torch.autograd.Function):
    """X W^T + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        ctx.set_materialize_grads(False)
        found: Tensor = torch.ops.aten._unsafe_view(F.linear(x, weight, bias), (*x.shape[:-1], weight.shape[0]))
        return found

    @staticmethod
    @torch.no_grad()
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        shape = (*x.shape[:-1], weight.shape[0])
        found: Tensor | None = None
        if dw is not None:
            found = F.linear(x, dw, db).view(-1, shape[-1])
        if dx is not None:
            rows = dx.reshape(-1, dx.shape[-1])
            if found is not None:
                found.addmm_(rows, weight.mT)
            else:
                found = F.linear(rows, weight, db)
        if found is None:
            assert db is not None
            return db.expand(shape).clone()
        own: Tensor = torch.ops.aten._unsafe_view(found, shape)  # models write into parts of it
        return own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        rows = delta.reshape(-1, delta.shape[-1])
        return (
            (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


class _Conv(torch.autograd.Function):
    """A convolution of a batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.outputs = options, weight.shape[0]
        return _convolved(x, weight, bias, options)

    @staticmethod
    @torch.no_grad()
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, _: None) -> Tensor:
        x, weight = ctx.saved_tensors
        if dw is not None:
            found = _convolved(x, dw, db, ctx.options)
            return found if dx is None else found.add_(_convolved(dx, weight, None, ctx.options))
        return _convolved(torch.zeros_like(x) if dx is None else dx, weight, db, ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        stride, padding, dilation, groups = ctx.options
        nothing = (0,) * len(stride)
        wanted = ctx.needs_input_grad[:3]
        found = torch.ops.aten.convolution_backward(
            delta, *ctx.saved_tensors, [ctx.outputs], stride, padding, dilation, False, nothing, groups, wanted
        )
        return *found, None


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    stride, padding, dilation, groups = options
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)


class _Norm(torch.autograd.Function):
    """Layer norm over the last axes: g (x - m) r + b, m the mean and r the inverse of the deviation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        found, mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.save_for_forward(x, weight, bias, mean, scale)
        ctx.set_materialize_grads(False)
        ctx.shape = shape
        return found

    @staticmethod
    @torch.no_grad()
    def jvp(ctx: Any, dx: Tensor | None, _: None, dw: Tensor | None, db: Tensor | None, __: None) -> Tensor:
        x, weight, _, mean, scale = ctx.saved_tensors
        found: Tensor | None = None
        if dx is not None:  # J dx is J^T dx
            found = torch.ops.aten.native_layer_norm_backward(
                dx.contiguous(), x, ctx.shape, mean, scale, weight=None, bias=None, output_mask=(True, False, False)
            )[0]
            found = found if weight is None else found.mul_(weight)
        if dw is not None:
            centred = (x - mean).mul_(scale)
            found = centred.mul_(dw) if found is None else found.addcmul_(centred, dw)
        if db is not None:
            found = db.expand_as(x).clone() if found is None else found.add_(db)
        assert found is not None
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[at] for at in (0, 2, 3)]
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            delta.contiguous(), x, ctx.shape, mean, scale, weight, bias, wanted
        )
        return dx, None, dw, db, None


class _Attention(torch.autograd.Function):
    """The product P v with the softmax P of q k^T s."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
        scores = (q * scale) @ k.mT
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        p = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.save_for_forward(q, k, v, p)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        return p @ v

    @staticmethod
    @torch.no_grad()
    def jvp(ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *_: None) -> Tensor:
        q, k, v, p = ctx.saved_tensors
        terms: list[Tensor] = [] if dv is None else [p @ dv]
        ds = None if dq is None else dq @ k.mT
        if dk is not None:
            ds = q @ dk.mT if ds is None else ds.add_(q @ dk.mT)
        if ds is not None:
            terms.append(_through_softmax(ds.mul_(ctx.scale), p) @ v)
        return terms[0] if len(terms) == 1 else terms[0].add_(terms[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        q, k, v, p = ctx.saved_tensors
        ds = _through_softmax(delta @ v.mT, p).mul_(ctx.scale)
        return ds @ k, ds.mT @ q, p.mT @ delta, None, None


class _Padded(torch.autograd.Function):
    """The identity, whose derivative is 1 or 0 of each entry."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, keep: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, dy: Tensor, _: None) -> Tensor:
        (keep,) = ctx.saved_tensors
        found: Tensor = dy * keep
        return found

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None]:
        return delta * ctx.saved_tensors[0], None


def _through_softmax(d: Tensor, p: Tensor) -> Tensor:
    """The softmax's Jacobian, which is symmetric: p (d - sum p d)."""
    found: Tensor = torch._softmax_backward_data(d, p, -1, p.dtype)
    return found


class CheapRules(TorchFunctionMode):
    """Calls of these layers on what has a tangent, inside a dual level, go through these rules."""

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is None or torch._C._functorch.peek_interpreter_stack() is not None:
            return func(*args, **kwargs)
        names, apply = rule
        found = None
        if len(args) <= len(names) and set(kwargs) <= set(names):
            given = dict(zip(names, args, strict=False)) | kwargs
            tensors = [each for each in given.values() if isinstance(each, Tensor)]
            if all(type(each) in _PLAIN for each in tensors) and any(map(_is_dual, tensors)):
                found = apply(given)
        return func(*args, **kwargs) if found is None else found


class RightRules(TorchFunctionMode):
    """Rules 4 and 5 alone, for the transforms of `torch.func` and second derivatives."""

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        names, rule = _RIGHT.get(func, ((), None))
        found = None if rule is None else rule(dict(zip(names, args, strict=False)) | kwargs)
        return func(*args, **kwargs) if found is None else found


def _linear(given: Mapping[str, Any]) -> Any:
    x, weight = given["input"], given["weight"]
    if x.ndim < 2 or weight.ndim != 2 or x.dtype is not weight.dtype or not x.is_floating_point():
        return None
    return _Linear.apply(x, weight, given.get("bias"))  # type: ignore[no-untyped-call]  # untyped in torch


def _conv(dims: int, given: Mapping[str, Any]) -> Any:
    x, weight = given["input"], given["weight"]
    if x.ndim != dims + 2 or isinstance(given.get("padding", 0), str) or not x.is_floating_point():
        return None
    each = [_each(given.get(name, value), dims) for name, value in (("stride", 1), ("padding", 0), ("dilation", 1))]
    return _Conv.apply(x, weight, given.get("bias"), (*each, given.get("groups", 1)))  # type: ignore[no-untyped-call]  # untyped in torch


def _norm(given: Mapping[str, Any]) -> Any:
    x, shape, weight, bias = given["input"], tuple(given["normalized_shape"]), given.get("weight"), given.get("bias")
    if tuple(x.shape[x.ndim - len(shape) :]) != shape or not x.is_floating_point():
        return None
    return _Norm.apply(x, shape, weight, bias, given.get("eps", 1e-5))  # type: ignore[no-untyped-call]  # untyped in torch


def _attention(given: Mapping[str, Any]) -> Any:
    q, k, v = given["query"], given["key"], given["value"]
    if given.get("attn_mask") is not None or given.get("dropout_p", 0.0) or given.get("enable_gqa", False):
        return None
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return None
    scale = given.get("scale")
    return _Attention.apply(  # type: ignore[no-untyped-call]  # untyped in torch
        q, k, v, given.get("is_causal", False), q.shape[-1] ** -0.5 if scale is None else scale
    )


def _embedding(given: Mapping[str, Any]) -> Any:
    ids, weight, padding = given["input"], given["weight"], given.get("padding_idx")
    if padding is None or given.get("max_norm") is not None or given.get("scale_grad_by_freq", False):
        return None
    keep = (ids != padding % weight.shape[0])[..., None].to(weight.dtype)
    return _Padded.apply(F.embedding(ids, weight), keep)  # type: ignore[no-untyped-call]  # untyped in torch


def _weight_norm(given: Mapping[str, Any]) -> Tensor:
    v: Tensor = given["v"]
    g: Tensor = given["g"]
    dim = given.get("dim", 0)
    others = list(range(v.ndim)) if dim == -1 else [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    norm: Tensor = v.norm(dim=others, keepdim=dim != -1)
    return v * (g / norm)


_PLAIN = (Tensor, torch.nn.Parameter)
_WEIGHTS = ("input", "weight", "bias")
_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_RIGHT: dict[Any, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Any]]] = {
    F.embedding: (_EMBEDDING, _embedding),
    torch._weight_norm: (("v", "g", "dim"), _weight_norm),
}
_RULES: dict[Any, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Any]]] = {
    F.linear: (_WEIGHTS, _linear),
    F.embedding: (_EMBEDDING, _embedding),
    F.layer_norm: (("input", "normalized_shape", "weight", "bias", "eps"), _norm),
    F.scaled_dot_product_attention: (_ATTENTION, _attention),
    **{
        function: ((*_WEIGHTS, "stride", "padding", "dilation", "groups"), partial(_conv, dims))
        for dims, function in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d))
    },
}


def _is_dual(value: Tensor) -> bool:
    return unpack_dual(value).tangent is not None


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values
