"""Forward and backward of the sparse products, tensor in, tensor out: what autograd and compiled code both call.

V are the alive values [groups, G, k] (in a convolution [groups * G, k, *kernel]); `index` holds the columns, readers
and starts of `Index`. With gradients enabled (`create_graph`) everything is written in operations that can be
differentiated any number of times.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

_Result = TypeVar("_Result")
_Given = ParamSpec("_Given")


def constant_in_graphs(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Compiled graphs take what the function returns while they are made.

    This is `torch.compiler.assume_constant_result`, which imports all of torch._dynamo to set the mark.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


PART = 256
"""Rows of a batch that are worked on at a time."""


class Kernel(enum.Enum):
    """How a sparse product is computed."""

    GATHER = "gather"
    """By a gathered copy of the input and batched products of torch."""
    TRITON = "triton"
    """By kernels that gather and multiply in one: linear layers on CUDA, see `fxsparse.nn.shared_triton`."""


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves: sizes along each spatial axis, and the groups of its rows."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def pointwise(self) -> bool:
        """Whether every output reads one place of the input, its own."""
        return set(self.kernel) == {1} == set(self.stride) and not any(self.padding)

    def flat(self) -> list[int]:
        """All numbers in a row."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation, self.groups]

    @staticmethod
    def of(flat: Sequence[int]) -> Geometry:
        """Inverse of `flat`."""
        axes = len(flat) // 4
        kernel, stride, padding, dilation = (tuple(flat[i * axes : (i + 1) * axes]) for i in range(4))
        return Geometry(kernel, stride, padding, dilation, flat[-1])


def output_size(space: Sequence[int], geometry: Geometry) -> list[int]:
    """Spatial size of a convolution's output."""
    moves = zip(space, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    return [(size + 2 * added - wide * (kernel - 1) - 1) // step + 1 for size, kernel, step, added, wide in moves]


def forward(
    input: Tensor, values: Tensor, bias: Tensor | None, columns: Tensor, geometry: Geometry | None, kernel: Kernel
) -> Tensor:
    """The outputs of the groups' rows: [B, groups * G] or [N, groups * G, *space']; a bias needs gradients off."""
    if kernel is Kernel.TRITON and not _recorded(input, values):
        from fxsparse.nn import shared_triton

        return shared_triton.linear_forward(input, values, columns, bias)
    if geometry is None:
        made = linear_forward(input, values, columns)
    else:
        made = convolution_forward(input, values, columns, geometry)
    return made if bias is None else made.add_(bias.view(-1, *(1,) * (made.ndim - 2)))


def backward(
    gradient: Tensor,
    input: Tensor,
    values: Tensor,
    index: Triple,
    geometry: Geometry | None,
    kernel: Kernel,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and values."""
    if kernel is Kernel.TRITON and not _recorded(gradient, input, values):
        from fxsparse.nn import shared_triton

        return shared_triton.linear_backward(gradient, input, values, index, needs)
    if geometry is None:
        return linear_backward(gradient.contiguous(), input, values, index, needs)
    return convolution_backward(gradient, input, values, index, geometry, needs)


def _recorded(*tensors: Tensor) -> bool:
    """Whether autograd follows what is done with these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def linear_forward(input: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    """[B, F] -> [B, groups * G]."""
    groups, group, _ = values.shape
    turned = values.transpose(1, 2)
    if torch.is_grad_enabled():
        return torch.bmm(_gathered(input, columns, values), turned).transpose(0, 1).reshape(-1, groups * group)
    output = input.new_empty(len(input), groups * group)
    for part, made in zip(_parts(input), _parts(output), strict=True):
        gathered = _gathered(part, columns, values)
        torch.bmm(gathered, turned, out=made.view(-1, groups, group).transpose(0, 1))
    return output


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Parts of a long batch on the CPU, small enough for its caches."""
    if len(rows) <= 2 * PART or rows.device.type != "cpu":
        return (rows,)
    return tuple(rows[start : start + PART] for start in range(0, len(rows), PART))


def linear_backward(
    gradient: Tensor, input: Tensor, values: Tensor, index: Triple, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and values."""
    groups, group, k = values.shape
    gradient = gradient.reshape(-1, groups, group)
    of_values = of_input = None
    if needs[1]:
        of_values = torch.bmm(gradient.permute(1, 2, 0), _gathered(input, index[0], values))
    if needs[0]:
        turned, found = values.transpose(1, 2), []
        for part in _parts(gradient):
            spread = torch.bmm(turned, part.permute(1, 2, 0)).view(groups * k, -1)
            found.append(_summed_rows(spread, index).t().contiguous())
        of_input = found[0] if len(found) == 1 else torch.cat(found)
    return of_input, of_values


def _gathered(input: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """x[S_g] of every group, [groups, B, k], a view of [B, groups * k]."""
    return input.index_select(1, columns).view(len(input), values.shape[0], values.shape[2]).transpose(0, 1)


def _summed_rows(spread: Tensor, index: Triple) -> Tensor:
    """Sums of the rows that belong to one position, [groups * k, B] -> [F, B]; half precision is summed in float32."""
    columns, readers, starts = index
    wide = spread.float() if spread.dtype in (torch.float16, torch.bfloat16) else spread
    if torch.is_grad_enabled():
        summed = wide.new_zeros(starts.numel(), spread.shape[1]).index_add(0, columns, wide)
    else:
        summed = F.embedding_bag(readers, wide, starts, mode="sum")
    return summed.to(spread.dtype)


def convolution_forward(input: Tensor, values: Tensor, columns: Tensor, geometry: Geometry) -> Tensor:
    """[N, F, *space] -> [N, groups * G, *space']."""
    if geometry.pointwise:
        return _pointwise(input, values.flatten(1), columns, geometry.groups)
    gathered = _gathered_space(input, columns)
    convolve = _CONVOLUTIONS[len(geometry.kernel)]
    return convolve(gathered, values, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def _in_rows(input: Tensor) -> bool:
    """Whether the memory of [N, F, H, W] is rows of channels."""
    last = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last)
    return last and not input.is_contiguous()


def _as_rows(input: Tensor) -> Tensor:
    return input.permute(0, 2, 3, 1).reshape(-1, input.shape[1])


def _from_rows(rows: Tensor, space: Sequence[int]) -> Tensor:
    return rows.view(-1, *space, rows.shape[1]).permute(0, 3, 1, 2)


def _gathered_space(input: Tensor, columns: Tensor) -> Tensor:
    """[N, F, *space] -> [N, groups * k, *space], in the memory format of the input."""
    if _in_rows(input):
        return _from_rows(_as_rows(input).index_select(1, columns), input.shape[2:])
    return input.index_select(1, columns)


def _pointwise(input: Tensor, values: Tensor, columns: Tensor, groups: int) -> Tensor:
    cut = values.view(groups, -1, values.shape[1])
    if _in_rows(input) and _has_grouped(input):
        return F.conv2d(_gathered_space(input, columns), values[:, :, None, None], groups=groups)
    if _in_rows(input):
        return _from_rows(linear_forward(_as_rows(input), cut, columns), input.shape[2:])
    gathered = _gathered_channels(input, columns, groups)
    return _channels(cut, gathered).view(len(input), -1, *input.shape[2:])


def _gathered_channels(input: Tensor, columns: Tensor, groups: int) -> Tensor:
    """[N, F, *space] -> [N, groups, k, L]."""
    gathered = input.flatten(2).index_select(1, columns)
    return gathered.view(len(input), groups, len(columns) // groups, gathered.shape[2])


def _channels(left: Tensor, right: Tensor) -> Tensor:
    """Left [groups, a, b] times right [N, groups, b, L] -> [N, groups * a, L]."""
    batch, groups, _, length = right.shape
    if torch.is_grad_enabled():
        return torch.matmul(left, right).reshape(batch, -1, length)
    output = right.new_empty(batch, groups, left.shape[1], length)
    for sample, made in zip(right, output, strict=True):
        torch.bmm(left, sample, out=made)
    return output.view(batch, -1, length)


def convolution_backward(
    gradient: Tensor, input: Tensor, values: Tensor, index: Triple, geometry: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and values."""
    if geometry.pointwise:
        return _pointwise_backward(gradient, input, values, index, geometry.groups, needs)
    gathered = _gathered_space(input, index[0])
    step = (geometry.stride, geometry.padding, geometry.dilation, False, [0] * len(geometry.kernel), geometry.groups)
    spread, of_values, _ = torch.ops.aten.convolution_backward(
        gradient, gathered, values, None, *step, (needs[0], needs[1], False)
    )
    return _summed_channels(spread, index, input) if needs[0] else None, of_values if needs[1] else None


def _pointwise_backward(
    gradient: Tensor, input: Tensor, values: Tensor, index: Triple, groups: int, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    cut = values.flatten(1).view(groups, -1, values.shape[1])
    if _in_rows(input):
        found = _rows_backward(gradient, input, cut, index, needs)
        of_input = None if found[0] is None else _from_rows(found[0], input.shape[2:])
        return of_input, None if found[1] is None else found[1].view(values.shape)
    flat = gradient.flatten(2)
    of_rows = flat.reshape(len(flat), groups, flat.shape[1] // groups, flat.shape[2])  # [N, groups, G, L]
    of_input = of_values = None
    if needs[1]:
        gathered = _gathered_channels(input, index[0], groups).transpose(2, 3)
        of_values = _summed_products(of_rows, gathered).view(values.shape)
    if needs[0]:
        of_input = _summed_channels(_channels(cut.transpose(1, 2), of_rows), index, input).view(input.shape)
    return of_input, of_values


def _rows_backward(
    gradient: Tensor, input: Tensor, cut: Tensor, index: Triple, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """`linear_backward` for rows of channels; where that is fast, with a grouped convolution for the values."""
    rows, groups = _as_rows(gradient), len(cut)
    if not (needs[1] and _has_grouped(input)):
        return linear_backward(rows, _as_rows(input), cut, index, needs)
    of_input, _ = linear_backward(rows, _as_rows(input), cut, index, (needs[0], False))
    filters = cut.reshape(-1, cut.shape[2], 1, 1)
    step = ([1, 1], [0, 0], [1, 1], False, [0, 0], groups)
    gathered = _gathered_space(input, index[0])
    found = torch.ops.aten.convolution_backward(gradient, gathered, filters, None, *step, (False, True, False))[1]
    return of_input, found.view(cut.shape)


def _has_grouped(input: Tensor) -> bool:
    """Whether grouped convolutions over rows of channels have kernels of their own here."""
    single = input.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return single and input.device.type == "cpu" and torch._C._has_mkldnn


def _summed_products(left: Tensor, right: Tensor) -> Tensor:
    """sum_n left[n, g] right[n, g], [groups, G, k]."""
    if torch.is_grad_enabled():
        return torch.matmul(left, right).sum(0)
    summed = torch.bmm(left[0], right[0])
    for i in range(1, len(left)):
        summed.baddbmm_(left[i], right[i])
    return summed


def _summed_channels(spread: Tensor, index: Triple, input: Tensor) -> Tensor:
    """[N, groups * k, *space] -> [N, F, *space], sums of the channels that belong to one position."""
    columns, readers, starts = index
    wide = spread.float() if spread.dtype in (torch.float16, torch.bfloat16) else spread
    if torch.is_grad_enabled():
        zeros = wide.new_zeros(len(wide), starts.numel(), *wide.shape[2:])
        return zeros.index_add(1, columns, wide).to(spread.dtype)
    if _in_rows(spread):
        rows = _summed_rows(_as_rows(spread).t(), index).t().contiguous()
        return _from_rows(rows, spread.shape[2:])
    batch, count = spread.shape[:2]
    shift = torch.arange(0, batch * count, count, dtype=torch.int32, device=spread.device)[:, None]
    flat = wide.reshape(batch * count, -1)
    summed = F.embedding_bag((readers + shift).flatten(), flat, (starts + shift).flatten(), mode="sum")
    return summed.view(batch, starts.numel(), *spread.shape[2:]).to(spread.dtype)


def outer_gradient(input: Tensor, gradient: Tensor, geometry: Geometry | None) -> Tensor:
    """The gradient for every row and position, dead ones included: one dense product."""
    if geometry is None:
        return gradient.t() @ input
    anything = input.new_empty(1).expand(gradient.shape[1], input.shape[1], *geometry.kernel)
    step = (geometry.stride, geometry.padding, geometry.dilation, False, [0] * len(geometry.kernel), 1)
    found: Tensor = torch.ops.aten.convolution_backward(gradient, input, anything, None, *step, (False, True, False))[1]
    return found
