"""All the masks of a model, by parameter name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.nn.masked import (
    alive_of,
    beside_mask,
    bind_guard,
    check_mask,
    check_phase,
    install_mask,
    mask_name,
    mask_of,
    row_order_of,
    set_guard,
    share_mask,
    write_row_order_,
    zero_dead_,
)
from fxsparse.nn.sharded import part, part_like, whole
from fxsparse.nn.shared import path_of
from fxsparse.nn.shared_gradient import sink_of
from fxsparse.nn.shared_index import held_index
from fxsparse.nn.shared_packed import packed_path, write_packed_mask_
from fxsparse.nn.shared_product import write_alive_
from fxsparse.nn.slot import slots_of
from fxsparse.nn.spec import Guard, MaskSpec, Route
from fxsparse.sparsity import Mask


@dataclass(frozen=True, eq=False)
class MaskedWeight:
    """One masked parameter of a model, however many names it has.

    Attributes:
        name: Its first name, the one of `named_parameters`.
        names: All its names.
        owners: The modules that hold a mask for it, each with the parameter's attribute there.
    """

    name: str
    names: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...]

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        module, attribute = self.owners[0]
        parameter = module._parameters[attribute]
        assert parameter is not None
        return parameter

    @property
    def packed(self) -> bool:
        """Whether the parameter holds the alive values alone."""
        return packed_path(self.owners[0][0]) is not None

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense weight."""
        path = packed_path(self.owners[0][0])
        return self.weight.shape if path is None else path.shape

    @property
    def has_masked_gradient(self) -> bool:
        """Whether the gradient is known to be zero at dead entries without looking."""
        gradient, path = self.weight.grad, path_of(self.owners[0][0])
        if gradient is None or path is None:
            return gradient is None
        return path.packed or path.reused.lent(gradient)

    def dense(self, tensor: Tensor) -> Tensor:
        """A tensor stored as the parameter is (itself, its gradient), in the shape of the dense weight."""
        path = packed_path(self.owners[0][0])
        if path is None:
            return whole(tensor)
        if tensor.requires_grad and torch.is_grad_enabled():
            return path.spread(self.owners[0][0], tensor)
        dense = tensor.new_zeros(path.shape)
        self.write_alive_(dense, tensor)
        return dense

    @torch.no_grad()
    def write_(self, values: Tensor) -> None:
        """Set the parameter to dense values, which are zero at dead entries."""
        module = self.owners[0][0]
        path = packed_path(module)
        if path is None:
            part(self.weight).copy_(part_like(values, self.weight))
        else:
            self.weight.copy_(path.pack(module, values))

    @torch.no_grad()
    def write_alive_(self, dense: Tensor, values: Tensor) -> None:
        """Write what is stored as a packed parameter is into a contiguous dense tensor; dead entries stay."""
        module = self.owners[0][0]
        path, index = packed_path(module), held_index(module)
        assert path is not None
        write_alive_(dense, values, index.positions, index.rows, path.rows)

    @property
    def sink(self) -> Tensor:
        """The tensor under which `DenseGradients` files the gradient: the mask, where there is one."""
        module = self.owners[0][0]
        return self.mask if packed_path(module) is None else sink_of(module)

    @property
    def mask(self) -> Tensor:
        """Which entries are alive, bool, the shape of the weight: a live buffer; read it, write it with `set_mask_`."""
        return alive_of(*self.owners[0])

    @property
    def open(self) -> bool:
        """Whether a resurrection phase has opened the mask, so that the model reads dead entries too."""
        return any(slots_of(module)[attribute].open for module, attribute in self.owners)

    @property
    def spec(self) -> MaskSpec:
        """The spec of the mask at its first owner."""
        module, attribute = self.owners[0]
        return slots_of(module)[attribute].spec

    @property
    def row_order(self) -> Tensor | None:
        """The row order of a `SharedSupport` mask, int64, or None for the natural order."""
        return row_order_of(*self.owners[0])

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Every buffer that belongs to the mask: the mask itself, its row order, what a resurrection phase holds."""
        named = ((m, name) for m, a in self.owners for name in (mask_name(a), *beside_mask(slots_of(m)[a])))
        found = (module._buffers.get(name) for module, name in named)  # alive-only storage has no mask
        return tuple(buffer for buffer in found if buffer is not None)

    def check(self, mask: object, row_order: Tensor | None = None) -> None:
        """Raise ConfigError unless `set_mask_` would take this mask; the row order is the present one by default."""
        like = torch.empty(self.shape, device="meta") if self.packed else self.weight
        check_mask(self.name, like, self.spec, mask, self.row_order if row_order is None else row_order)
        for module, _ in self.owners:
            check_phase(module)

    def set_mask_(self, mask: Tensor, row_order: Tensor | None = None) -> None:
        """Set the mask's values in place, and the row order where one is given; newly dead weights become zero.

        Raises:
            ConfigError: a mask of the wrong dtype, shape or pattern, or a module in a resurrection phase. Nothing has
                changed then.
        """
        self.check(mask, row_order)
        if self.packed:
            module, attribute = self.owners[0]
            if row_order is not None:
                write_row_order_(module, attribute, row_order)
            write_packed_mask_(module, mask.to(self.weight.device), row_order)
            return
        for module, attribute in self.owners:
            mask_of(module, attribute).copy_(mask)
            if row_order is not None:
                write_row_order_(module, attribute, row_order)
            bind_guard(module, attribute)
        self.apply_()

    def apply_(self) -> None:
        """Write zeros to the dead entries of the weight."""
        for module, attribute in self.owners:
            zero_dead_(module, attribute)


def masked_weights(model: nn.Module) -> dict[str, MaskedWeight]:
    """The masked parameters of a model by name, in the order of `named_parameters`, a tied one once.

    Raises:
        ConfigError: no module, or one parameter has different masks under its names; `tie_masks` says how to mend it.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
    if not any(slots_of(module) for module in model.modules()):
        return {}
    found = {}
    for places in _places(model):
        owners = _masked_owners(places)
        if owners:
            _share(places[0][0], owners)
            names = tuple(dict.fromkeys(name for name, _, _ in places))
            found[names[0]] = MaskedWeight(names[0], names, tuple(owners))
    return found


def masks(model: nn.Module) -> Mapping[str, Tensor]:
    """The model's masks by original parameter name: a view of the live buffers; read them, do not write them."""
    return MappingProxyType({name: weight.mask for name, weight in masked_weights(model).items()})


def set_masks(model: nn.Module, masks: Mapping[str, Tensor | Mask]) -> None:
    """Set the values of the model's masks, in place; newly dead weights become zero.

    Args:
        model: A model with masks.
        masks: Bool tensors by parameter name (any of a tied parameter's names); masks that are not named stay.

    Raises:
        ConfigError: an unknown name, or a mask of the wrong dtype, shape or pattern. Nothing has changed then.
    """
    weights = masked_weights(model)
    if not isinstance(masks, Mapping):
        raise ConfigError(f"`masks` (={type(masks).__name__}) must be a mapping of parameter names to bool tensors")
    by_name = {alias: weight for weight in weights.values() for alias in weight.names}
    chosen: dict[str, tuple[MaskedWeight, Tensor]] = {}
    for name, given in masks.items():
        if name not in by_name:
            close = difflib.get_close_matches(name, by_name) or list(by_name)[:3] or ["none, the model has no masks"]
            raise ConfigError(f"`{name}` is not a masked parameter; close names: {', '.join(close)}")
        mask = given.tensor if isinstance(given, Mask) else given
        weight = by_name[name]
        weight.check(mask)
        _, earlier = chosen.setdefault(weight.name, (weight, mask))
        if not torch.equal(earlier, mask):
            raise ConfigError(f"`{name}` is tied to `{weight.name}`: give both the same mask, or only one of them")
    for weight, mask in chosen.values():
        weight.set_mask_(mask)


def tie_masks(model: nn.Module) -> None:
    """Give each masked parameter that has several names one shared mask buffer at every module that holds it.

    Where a module without a mask holds it too, that module gets one at the parameter, and the gradient is guarded at
    all of them, because readers outside the sparse modules see the parameter as it is. A full mask yields to another.

    Raises:
        ConfigError: two names carry different masks; nothing has changed then.
    """
    groups = [places for places in _places(model) if len(places) > 1 and _masked_owners(places)]
    chosen = [_common_mask(places) for places in groups]
    for places, mask in zip(groups, chosen, strict=True):
        owners = _masked_owners(places)
        spec = slots_of(owners[0][0])[owners[0][1]].spec
        outside = MaskSpec(spec.pattern, spec.layout, Route.PARAMETER, Guard.GRADIENT)
        for _, module, attribute in places:
            if attribute not in slots_of(module):
                install_mask(module, attribute, outside, mask, row_order_of(*owners[0]))
        owners = _masked_owners(places)
        guarded = any(slots_of(module)[attribute].spec.guard is Guard.GRADIENT for module, attribute in owners)
        for module, attribute in owners:
            share_mask(module, attribute, mask)
            if guarded:
                set_guard(module, attribute, Guard.GRADIENT)
            zero_dead_(module, attribute)


def _places(model: nn.Module) -> list[list[tuple[str, nn.Module, str]]]:
    """For each parameter, in the order of `named_parameters`: every (name, module, attribute) where it is held."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{attribute}" if path else attribute
                places.setdefault(id(parameter), []).append((name, module, attribute))
    return list(places.values())


def _masked_owners(places: list[tuple[str, nn.Module, str]]) -> list[tuple[nn.Module, str]]:
    owners = {(id(module), attribute): (module, attribute) for _, module, attribute in places}
    return [(module, attribute) for module, attribute in owners.values() if attribute in slots_of(module)]


def _common_mask(places: list[tuple[str, nn.Module, str]]) -> Tensor:
    owned = [mask_of(module, attribute) for module, attribute in _masked_owners(places)]
    chosen = next((mask for mask in owned if not mask.is_meta and not bool(mask.all())), owned[0])
    for mask in owned:
        if mask is not chosen and not mask.is_meta and not bool(mask.all()) and not torch.equal(mask, chosen):
            names = ", ".join(f"`{name}`" for name, _, _ in places)
            raise ConfigError(f"{names} are one parameter with different masks; keep one of the masks")
    return chosen


def _share(name: str, owners: list[tuple[nn.Module, str]]) -> None:
    """Make the owners' equal masks one tensor again: moving a module to another device gives each its own."""
    if packed_path(owners[0][0]) is not None:
        return
    first = mask_of(*owners[0])
    for module, attribute in owners:
        mask = mask_of(module, attribute)
        if mask is not first and not (mask.is_meta or first.is_meta) and not torch.equal(mask, first):
            raise ConfigError(f"`{name}` has several different masks; call tie_masks after installing")
        share_mask(module, attribute, first)
