"""Products of weights with shared support as gathers and batched small dense products, with their gradients.

A weight of R rows in groups of G reads k of F positions in each group: y_g = V_g x[S_g] for the alive values
V [groups, G, k] and the positions S [groups, k]. Per input the product costs R k instead of R F.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Int32, Int64, Shaped
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.nn.functional import is_wrapped
from fxsparse.nn.shared_compiled import compiled_product
from fxsparse.nn.shared_kernels import Geometry, Kernel, backward, forward

Watcher = Callable[[Tensor, Tensor, Geometry | None], None]
"""Gets the input of a product, the gradient of the weight's rows, and how a convolution moved."""


class Index(NamedTuple):
    """Where the alive values of a weight stand, in the forms that gathers need; fixed shapes while k stays.

    Attributes:
        positions: S, ascending in each group.
        columns: The same, flat, for gathers of the input.
        readers: Flat indices into `columns`, sorted by the position that stands there.
        starts: For each position, where its readers begin in `readers`.
        rows: The weight's row at each row of the groups; rows missing in the last group repeat row 0.
        places: Where each row of the weight is among the rows of the groups.
    """

    positions: Int64[Tensor, "groups k"]
    columns: Int32[Tensor, " groups*k"]
    readers: Int32[Tensor, " groups*k"]
    starts: Int32[Tensor, " F"]
    rows: Int64[Tensor, " groups*G"]
    places: Int64[Tensor, " R"]


class Rows(NamedTuple):
    """How the groups share the rows of a weight.

    Attributes:
        size: R.
        groups: ceil(R / G).
        group: G.
        natural: Whether the groups take the rows in their natural order.
    """

    size: int
    groups: int
    group: int
    natural: bool

    @property
    def even(self) -> bool:
        """Whether the groups are the weight itself, cut."""
        return self.natural and self.size == self.groups * self.group


def alive_values(
    weight: Shaped[Tensor, "R F *kernel"], index: Index, rows: Rows, reused: ReusedGradient | None = None
) -> Shaped[Tensor, "groups G k *E"]:
    """The alive values of a weight, [groups, G, k] or [groups, G, k, kernel]; rows missing in the last group are 0.

    The gradient of the weight is dense and zero outside; on the CPU its memory is used again where `reused` is given
    and nobody holds the last one any more.
    """
    values: Tensor = _Alive.apply(weight, index.positions, index.rows, rows, reused)  # type: ignore[no-untyped-call]  # untyped in torch
    return values


class _Alive(torch.autograd.Function):
    """Dense weight -> alive values."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, positions: Tensor, order: Tensor, rows: Rows, reused: ReusedGradient | None
    ) -> Tensor:
        ctx.save_for_backward(positions, order)
        ctx.rows, ctx.reused, ctx.shape = rows, reused, weight.shape
        ctx.format = format_of(weight)
        return read_alive(weight, positions, order, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        positions, order = ctx.saved_tensors
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_wrapped(gradient)
        if ctx.reused is None or recorded or gradient.device.type != "cpu":
            target = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=ctx.format)
            return _written(target.zero_(), gradient, positions, order, ctx.rows), None, None, None, None
        target = ctx.reused.take(ctx.shape, gradient.dtype, ctx.format)
        write_alive_(target, gradient, positions, order, ctx.rows)
        return ctx.reused.lend(target), None, None, None, None


def format_of(weight: Tensor) -> torch.memory_format:
    """The memory format of a tensor, contiguous where it has none."""
    for form, axes in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if weight.ndim == axes and not weight.is_contiguous() and weight.is_contiguous(memory_format=form):
            return form
    return torch.contiguous_format


def _rows_first(weight: Tensor) -> Tensor:
    """[R, F, *kernel] -> [R, F] or [R, F, E], without a copy."""
    return weight.flatten(2) if weight.ndim > 2 else weight


def read_alive(weight: Tensor, positions: Tensor, order: Tensor, rows: Rows) -> Tensor:
    """The alive values of a weight."""
    flat = _rows_first(weight)
    if rows.even:
        where = positions[:, None, :] if flat.ndim == 2 else positions[:, None, :, None]
        sizes = (rows.groups, rows.group, positions.shape[1], *flat.shape[2:])
        return flat.view(rows.groups, rows.group, *flat.shape[1:]).gather(2, where.expand(sizes))
    values = flat[order.view(rows.groups, rows.group, 1), positions[:, None, :]]
    number = torch.arange(rows.groups * rows.group, device=values.device)
    missing = (number >= rows.size).view(rows.groups, rows.group, *(1,) * (values.ndim - 2))
    return values.masked_fill(missing, 0)


@torch.no_grad()
def write_alive_(weight: Tensor, values: Tensor, positions: Tensor, order: Tensor, rows: Rows) -> None:
    """Write alive values into a dense weight, whose other entries stay."""
    flat = _rows_first(weight)
    if rows.even:
        where = positions[:, None, :] if flat.ndim == 2 else positions[:, None, :, None]
        flat.view(rows.groups, rows.group, *flat.shape[1:]).scatter_(2, where.expand_as(values), values)
        return
    of_row = positions.repeat_interleave(rows.group, 0)[: rows.size]
    flat[order[: rows.size, None], of_row] = values.flatten(0, 1)[: rows.size]


def _written(zeros: Tensor, values: Tensor, positions: Tensor, order: Tensor, rows: Rows) -> Tensor:
    """`write_alive_` for values that may need a gradient themselves."""
    flat = _rows_first(zeros)
    if rows.even:
        where = positions[:, None, :] if flat.ndim == 2 else positions[:, None, :, None]
        cut = flat.view(rows.groups, rows.group, *flat.shape[1:])
        return cut.scatter(2, where.expand_as(values), values).view(zeros.shape)
    of_row = positions.repeat_interleave(rows.group, 0)[: rows.size]
    kept = values.reshape(-1, *values.shape[2:])[: rows.size]
    return flat.index_put((order[: rows.size, None], of_row), kept).view(zeros.shape)


def spread_values(values: Tensor, index: Index, rows: Rows, shape: torch.Size) -> Tensor:
    """The dense tensor of these alive values, zero elsewhere."""
    zeros = values.new_zeros(shape)
    if torch.is_grad_enabled() and values.requires_grad:
        return _written(zeros, values, index.positions, index.rows, rows)
    write_alive_(zeros, values, index.positions, index.rows, rows)
    return zeros


class ReusedGradient:
    """The memory of one dense gradient of which all but the alive entries stay zero from step to step.

    Fresh zeros cost more than the gradient itself: the operating system hands out large tensors page by page. What
    was lent is taken back only when no tensor shares its memory any more; otherwise fresh zeros are made.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None
        self._version = 0

    def forget(self) -> None:
        """Start from fresh zeros: the alive entries have changed."""
        self._kept = None

    def take(self, shape: torch.Size, dtype: torch.dtype, form: torch.memory_format) -> Tensor:
        """A tensor that holds zeros outside the alive entries."""
        kept = self._kept
        if kept is not None and kept.shape == shape and kept.dtype == dtype and kept.is_contiguous(memory_format=form):
            if _holders(kept) == 1:
                return kept if kept._version == self._version else kept.zero_()
            return torch.empty(shape, dtype=dtype, memory_format=form).zero_()
        self._kept = torch.empty(shape, dtype=dtype, memory_format=form).zero_()
        return self._kept

    def lent(self, gradient: Tensor) -> bool:
        """Whether this is what was lent last, as it was lent: zero at dead entries."""
        kept = self._kept
        if kept is None or type(gradient) is not Tensor or gradient.shape != kept.shape:
            return False
        if gradient.data_ptr() != kept.data_ptr():
            return False
        return gradient._version == self._version

    def lend(self, written: Tensor) -> Tensor:
        """What autograd may keep: a tensor of its own that shares the memory."""
        if written is not self._kept:
            return written
        self._version = written._version
        return written.detach()

    def __reduce__(self) -> tuple[type[ReusedGradient], tuple[()]]:
        return ReusedGradient, ()


def _holders(tensor: Tensor) -> int:
    """How many tensors share the memory of this one, itself included."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1  # without the Python object in hand


def in_row_order(output: Tensor, index: Index, rows: Rows, dim: int) -> Tensor:
    """The outputs of the groups' rows along `dim` as those of the weight's rows."""
    if rows.even:
        return output
    form = format_of(output)
    kept = output.narrow(dim, 0, rows.size) if rows.natural else output.index_select(dim, index.places)
    return kept.contiguous(memory_format=form)


def product(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Index,
    rows: Rows,
    geometry: Geometry | None,
    sink: Tensor,
    kernel: Kernel = Kernel.GATHER,
    watcher: Watcher | None = None,
) -> Tensor:
    """The outputs of the weight's rows: [B, F] -> [B, R], or [N, F, *space] -> [N, R, *space'].

    Args:
        input: The input; with a geometry that of a convolution.
        values: Alive values [groups, G, k], or [groups, G, k, E] with a geometry.
        bias: Added to each row, [R], or None.
        index: Where they are.
        rows: How groups share the rows.
        geometry: How a convolution moves; None for a linear layer.
        sink: The tensor under which collectors file dense gradients; read in compiled code alone.
        kernel: How it is computed.
        watcher: What gets the input and the gradient of the weight's rows in each backward pass; compiled code asks
            the collectors itself.
    """
    if geometry is not None:
        values = values.reshape(rows.groups * rows.group, -1, *geometry.kernel)
    triple = (index.columns, index.readers, index.starts)
    made: Tensor
    if torch.compiler.is_compiling():
        places = None if rows.natural else index.places
        made = compiled_product(input, values, triple, places, sink, rows.size, geometry, kernel)
    else:
        inside = bias if rows.even else None
        told = watcher if watcher is None or rows.even else partial(_told_of_rows, watcher, index, rows)
        made = _Product.apply(input, values, inside, *triple, geometry, kernel, told)  # type: ignore[no-untyped-call]  # untyped in torch
        if rows.even:
            return made
    made = in_row_order(made, index, rows, 1)
    return made if bias is None else made + bias.view(-1, *(1,) * (made.ndim - 2))


def _told_of_rows(
    watcher: Watcher, index: Index, rows: Rows, input: Tensor, gradient: Tensor, geometry: Geometry | None
) -> None:
    watcher(input, in_row_order(gradient, index, rows, 1), geometry)


def _asked_for(node: Any) -> bool:
    """Whether the backward pass that runs now goes on to this node: one for some inputs may leave the weight out."""
    return node is not None and bool(torch._C._will_engine_execute_node(node))


class _Product(torch.autograd.Function):
    """The outputs of the groups' rows, with a bias for each."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        values: Tensor,
        bias: Tensor | None,
        columns: Tensor,
        readers: Tensor,
        starts: Tensor,
        geometry: Geometry | None,
        kernel: Kernel,
        watcher: Watcher | None,
    ) -> Tensor:
        ctx.save_for_backward(input, values, columns, readers, starts)
        ctx.geometry, ctx.kernel, ctx.watcher = geometry, kernel, watcher
        made = forward(input, values, bias, columns, geometry, kernel)
        return made.data if made._is_view() else made  # autograd lets nobody write into views that were made in here

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, values, *index = ctx.saved_tensors
        if ctx.watcher is not None and not is_wrapped(gradient) and _asked_for(ctx.next_functions[1][0]):
            with torch.no_grad():
                ctx.watcher(input.detach(), gradient, ctx.geometry)
        if ctx.geometry is not None and is_wrapped(gradient):
            raise ConfigError(
                "`is_grads_batched` (=True) does not work with the sparse product of a convolution; call "
                "decelerate(model), or ask for one gradient at a time"
            )
        needs, triple = ctx.needs_input_grad[:2], (index[0], index[1], index[2])
        of_bias = (
            gradient.sum([axis for axis in range(gradient.ndim) if axis != 1]) if ctx.needs_input_grad[2] else None
        )
        found = backward(gradient, input, values, triple, ctx.geometry, ctx.kernel, needs)
        if ctx.watcher is not None and found[0] is not None and found[0].requires_grad:
            again = partial(_told_again, ctx.watcher, gradient.detach(), ctx.geometry, values.grad_fn)
            found[0].register_hook(again)  # type: ignore[no-untyped-call]  # untyped in torch
        return (*found, of_bias, *(None,) * 6)


def _told_again(watcher: Watcher, gradient: Tensor, geometry: Geometry | None, node: Any, cotangent: Tensor) -> None:
    """The gradient of the input depends on the weight too: as the output does, with the roles of the two exchanged."""
    if not is_wrapped(cotangent) and _asked_for(node):
        with torch.no_grad():
            watcher(cotangent.detach(), gradient, geometry)
