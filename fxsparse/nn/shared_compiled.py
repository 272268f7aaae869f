"""The sparse product in compiled code: one call that compilers leave as it is, with the gradient of all positions.

A graph fits any set of collectors, because its backward pass asks for them each time it runs; masks change by writing
the index in place. Nothing is compiled anew while k stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxsparse.nn.functional import collecting
from fxsparse.nn.shared_kernels import Geometry, Kernel, backward, forward, outer_gradient, output_size


def compiled_product(
    input: Tensor,
    values: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    places: Tensor | None,
    sink: Tensor,
    width: int,
    geometry: Geometry | None,
    kernel: Kernel,
) -> Tensor:
    """The outputs of the groups' rows, [B, groups * G] or [N, groups * G, *space].

    Args:
        input: [B, F], or [N, F, *space] with a geometry.
        values: Alive values [groups, G, k], or [groups * G, k, *kernel] with a geometry.
        index: Columns, readers and starts.
        places: Where each row of the weight is among the rows of the groups; None for the natural order.
        sink: The tensor under which collectors file the dense gradient.
        width: Rows R of the weight.
        geometry: How a convolution moves; None for a linear layer.
        kernel: How it is computed.
    """
    flat = [] if geometry is None else geometry.flat()
    made: Tensor = _forward(input, values, *index, places, sink, width, flat, kernel is Kernel.TRITON)
    return made


@torch.library.custom_op("fxsparse::shared_product", mutates_args=())
def _forward(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    readers: Tensor,
    starts: Tensor,
    places: Tensor | None,
    sink: Tensor,
    width: int,
    geometry: list[int],
    triton: bool,
) -> Tensor:
    return forward(input, values, None, columns, Geometry.of(geometry) if geometry else None, _kernel(triton))


def _kernel(triton: bool) -> Kernel:
    return Kernel.TRITON if triton else Kernel.GATHER


@_forward.register_fake
def _fake_forward(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    readers: Tensor,
    starts: Tensor,
    places: Tensor | None,
    sink: Tensor,
    width: int,
    geometry: list[int],
    triton: bool,
) -> Tensor:
    if not geometry:
        return input.new_empty(input.shape[0], values.shape[0] * values.shape[1])
    space = output_size(input.shape[2:], Geometry.of(geometry))
    return input.new_empty(input.shape[0], values.shape[0], *space)


@torch.library.custom_op("fxsparse::shared_product_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    readers: Tensor,
    starts: Tensor,
    places: Tensor | None,
    sink: Tensor,
    width: int,
    geometry: list[int],
    triton: bool,
) -> tuple[Tensor, Tensor]:
    index = (columns, readers, starts)
    gradient = gradient.contiguous()
    shape = Geometry.of(geometry) if geometry else None
    collectors = collecting()
    if collectors:
        of_rows = outer_gradient(input, gradient, shape)
        dense = of_rows[:width] if places is None else of_rows.index_select(0, places)
        for collector in collectors:
            collector.add_by_storage(sink, dense.float() if dense.dtype != torch.float64 else dense)
    of_input, of_values = backward(gradient, input, values, index, shape, _kernel(triton), (True, True))
    assert of_input is not None and of_values is not None
    return of_input.contiguous(), of_values.contiguous()


@_backward.register_fake
def _fake_backward(
    gradient: Tensor,
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    readers: Tensor,
    starts: Tensor,
    places: Tensor | None,
    sink: Tensor,
    width: int,
    geometry: list[int],
    triton: bool,
) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), values.new_empty(values.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(each for each in inputs[:7] if each is not None))
    ctx.natural, ctx.rest = inputs[5] is None, inputs[7:]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    saved = list(ctx.saved_tensors)
    if ctx.natural:
        saved.insert(5, None)
    return (*_backward(gradient, *saved, *ctx.rest), *(None,) * 8)


_forward.register_autograd(_differentiate, setup_context=_keep)
