"""Values where a mask is True, else zero: fast on the CPU, and equal bit for bit.

torch's `where` and `masked_fill_` take one entry after the other there. The bits of a number, read as an integer, times
1 or 0 are the same selection, whatever the number (NaN, infinities and -0.0 too), and that product is vectorised.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fxsparse.nn.sharded import part, part_like

_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}  # wider gains nothing
_PLAIN = (Tensor, nn.Parameter)
_BLOCK = 1 << 18  # entries that a temporary of the product may have
_SMALL = 512  # entries below which a call costs more than it saves


def selected(values: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """where(mask, values, 0), of the strides of `values`; differentiable as often as torch's."""
    if _traced() or not _fast(values, mask):
        return torch.where(mask, values, 0.0)
    if torch.is_grad_enabled() and values.requires_grad:
        result: Tensor = _Selected.apply(values, mask)  # type: ignore[no-untyped-call]  # untyped in torch
        return result
    return _product(values, mask)


@torch.no_grad()
def keep_(tensor: Tensor, mask: Bool[Tensor, "*shape"]) -> None:
    """Write zeros where the mask, whole on every rank, is False."""
    values, mask = part(tensor), part_like(mask, tensor)
    if not _traced() and _fast(values, mask):
        _multiply(values, mask, values)
    else:
        values.masked_fill_(~mask, 0)


class _Selected(torch.autograd.Function):
    """The selection; the gradient is selected alike, so that it has a gradient in turn."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor) -> Tensor:
        """Select."""
        ctx.save_for_backward(mask)
        ctx.set_materialize_grads(False)
        return _product(values, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        """Select what comes back."""
        (mask,) = ctx.saved_tensors
        return None if gradient is None else selected(gradient, mask), None


def _product(values: Tensor, mask: Tensor) -> Tensor:
    kind = _BITS[values.dtype]
    if values.numel() <= _BLOCK:
        return (values.detach().view(kind) * mask).view(values.dtype)
    result = torch.empty_like(values, requires_grad=False)
    _multiply(values.detach(), mask, result)
    return result


def _multiply(values: Tensor, mask: Tensor, result: Tensor) -> None:
    """In blocks where all three lie alike in memory: torch makes integers of the mask first, of all of it at once."""
    read, written = values.view(_BITS[values.dtype]), result.view(_BITS[values.dtype])
    alike = values.stride() == mask.stride() == result.stride()
    lines = [_line(each) for each in (read, mask, written)] if alike and values.numel() > _BLOCK else [None]
    if any(line is None for line in lines):
        torch.mul(read, mask, out=written)
        return
    parts = (torch.split(line, _BLOCK) for line in lines if line is not None)
    for source, kept, target in zip(*parts, strict=True):
        torch.mul(source, kept, out=target)


def _line(tensor: Tensor) -> Tensor | None:
    """The entries in the order of memory, or None where there is no such view."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    turned = tensor.permute(order)
    return turned.view(-1) if turned.is_contiguous() else None


def _fast(values: Tensor, mask: Tensor) -> bool:
    return (
        type(values) in _PLAIN
        and type(mask) in _PLAIN
        and values.dtype in _BITS
        and values.device.type == mask.device.type == "cpu"
        and values.layout is torch.strided
        and values.numel() >= _SMALL
        and values.shape == mask.shape
        and mask.dtype is torch.bool
        and not values.is_neg()
    )


def functions_are_seen() -> bool:
    """Whether a mode sees calls of torch's functions, beyond one that only chooses their device."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]  # untyped in torch
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def _traced() -> bool:
    """Whether somebody records operators, or transforms them."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or functions_are_seen()
        or torch.autograd.forward_ad._current_level >= 0
    )
