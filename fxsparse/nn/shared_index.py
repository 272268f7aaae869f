"""Where alive values stand: buffers beside a mask with shared support, written in place while their shapes stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from fxsparse.errors import ConfigError
from fxsparse.nn.shared_product import Index, Rows
from fxsparse.nn.slot import slots_of
from fxsparse.nn.spec import Guard, MaskSpec, Route
from fxsparse.sparsity import Positions, SharedSupport
from fxsparse.sparsity.shared_support import SupportUnits

NAMES = tuple(f"weight_{field}" for field in Index._fields)


def eligible(module: nn.Module, mask: Tensor) -> str | None:
    """Why a layer has no sparse product; None where it has one. The mask may still have no dead entry."""
    spec = slots_of(module)["weight"].spec
    if not isinstance(spec.pattern, SharedSupport):
        return f"its pattern is {spec.pattern}, no SharedSupport"
    if isinstance(module, _ConvTransposeNd):
        return "a transposed convolution has no sparse product"
    if spec.layout.groups > 1 or spec.layout.blocks > 1 or spec.layout.batch:
        return "its weight has several parts or groups"
    if spec.pattern.positions is not Positions.CHANNEL and mask[0, 0].numel() > 1:
        return "its positions are single elements of the kernel"
    if spec.route is not Route.MODULE or spec.guard is not Guard.FORWARD:
        return "others read its weight too, so its dense gradient is always needed"
    if mask.is_meta:
        return "it is on the meta device"
    return "its mask is full" if bool(mask.all()) else None


def write_index_(module: nn.Module, spec: MaskSpec, mask: Tensor, order: Tensor | None) -> tuple[Rows, float]:
    """Write the index of a mask into the module's buffers; how groups share the rows, and the sparsity.

    Raises:
        ConfigError: the mask breaks its pattern.
    """
    spec.pattern.check(mask, spec.layout, order)
    units = spec.pattern.units(mask.shape, spec.layout, order)
    assert isinstance(units, SupportUnits)
    chosen = units.collect(mask)
    positions = chosen.nonzero()[:, 1].reshape(units.segments, -1)
    rows = Rows(mask.shape[0], units.segments, units.group, order is None)
    place_index_(module, index_of(positions, units.width, rows, order))
    return rows, 1 - positions.shape[1] / units.width


def index_of(positions: Tensor, width: int, rows: Rows, order: Tensor | None) -> Index:
    """The index of these positions of each group, [groups, k], among `width` positions."""
    flat = positions.flatten()
    readers = flat.argsort(stable=True)
    starts = torch.searchsorted(flat[readers], torch.arange(width, device=flat.device))
    natural = torch.arange(rows.size, device=flat.device)
    given = natural if order is None else order.to(flat.device)
    missing = rows.groups * rows.group - rows.size
    return Index(
        positions.clone(memory_format=torch.contiguous_format),  # no part of a larger tensor
        flat.to(torch.int32),
        readers.to(torch.int32),
        starts.to(torch.int32),
        torch.cat([given, given.new_zeros(missing)]),
        given.argsort(),
    )


def place_index_(module: nn.Module, index: Index) -> None:
    """Write an index into the module's buffers, in place where shapes and device stay."""
    for name, value in zip(NAMES, index, strict=True):
        present = module._buffers.get(name)
        if present is not None and present.shape == value.shape and present.device == value.device:
            present.copy_(value)
            continue
        if present is None and hasattr(module, name):
            raise ConfigError(f"`{name}` of {type(module).__name__} is taken; rename that attribute")
        module.register_buffer(name, value, persistent=False)


def held_index(module: nn.Module) -> Index:
    """The index in the module's buffers."""
    return Index(*(module._buffers[name] for name in NAMES))  # type: ignore[arg-type]  # present once written


def holds_index(module: nn.Module) -> bool:
    """Whether the module has an index."""
    return NAMES[0] in module._buffers


def drop_index(module: nn.Module) -> None:
    """Remove the buffers."""
    for name in NAMES:
        if name in module._buffers:
            delattr(module, name)
