"""The parameters that a curvature operator acts on, as one flat vector, and the part of it that is its support."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from fxsparse.curvature.dense_storage import check_stored_dense
from fxsparse.errors import ConfigError
from fxsparse.graph.taps import CONTAINER
from fxsparse.nn import check_mask_edit, mask_name
from fxsparse.sparsity import Mask

Selection = Iterable[str] | Iterable[nn.Parameter] | Mapping[str, Tensor] | None
"""Names or parameters; None = all that require a gradient, or all where none does."""


class Support(enum.Enum):
    """Which coordinates of masked weights an operator keeps; parameters without a mask are always whole."""

    ON = "on"
    """The alive weights: the curvature that pruning meets."""
    OFF = "off"
    """The dead weights, seen through opened masks: the curvature that regrowth meets. Nothing of other parameters."""
    DENSE = "dense"
    """All weights, seen through opened masks."""


@dataclass(frozen=True, eq=False)
class ParameterSpace:
    """Chosen parameters in the model's order, laid out one after the other.

    Attributes:
        shapes: First name of each parameter -> its shape.
        dtype: The common dtype.
        device: The common device.
        support: Which of the P coordinates take part, flat; None = all.
        opened: Buffers of masks -> what they must hold so that dead weights are seen.
    """

    shapes: Mapping[str, torch.Size]
    dtype: torch.dtype
    device: torch.device
    support: Bool[Tensor, " P"] | None = None
    opened: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """First names, in order."""
        return tuple(self.shapes)

    @property
    def size(self) -> int:
        """Number of coordinates P."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def active(self) -> int:
        """Number of coordinates of the support."""
        return self.size if self.support is None else int(self.support.sum())

    def flat(self, tensors: Mapping[str, Shaped[Tensor, "*shape"]]) -> Shaped[Tensor, " P"]:
        """One vector; every name must be there, in its shape.

        Raises:
            ConfigError: a name is missing or unknown, or a shape differs.
        """
        for name in tensors:
            if name not in self.shapes:
                raise ConfigError(f"`{name}` is no parameter of this operator; it has {', '.join(self.names[:5])}")
        for name, shape in self.shapes.items():
            if name not in tensors or tensors[name].shape != shape:
                found = tuple(tensors[name].shape) if name in tensors else None
                raise ConfigError(f"`{name}` (={found}) must be a tensor of shape {tuple(shape)}")
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.shapes])

    def split(self, vector: Shaped[Tensor, "P ..."]) -> dict[str, Shaped[Tensor, "k ..."]]:
        """The parts of a vector, or of several side by side, in the parameters' shapes (the k axis comes first)."""
        parts = torch.split(vector, [shape.numel() for shape in self.shapes.values()])
        if vector.ndim == 1:
            return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        return {
            name: part.mT.reshape(vector.shape[1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def project(self, vector: Shaped[Tensor, "P ..."]) -> Shaped[Tensor, "P ..."]:
        """The vector with exact zeros outside the support."""
        if self.support is None:
            return vector
        keep = self.support if vector.ndim == 1 else self.support[:, None]
        return torch.where(keep, vector, 0.0)

    def slice_of(self, name: str) -> slice:
        """Where a parameter stands in the flat vector."""
        start = 0
        for each, shape in self.shapes.items():
            if each == name:
                return slice(start, start + shape.numel())
            start += shape.numel()
        raise ConfigError(f"`{name}` is no parameter of this operator; it has {', '.join(self.names[:5])}")


def parameter_space(
    model: nn.Module,
    params: Selection = None,
    mask: Support | str | Mapping[str, Tensor | Mask] | Bool[Tensor, " P"] | None = None,
) -> ParameterSpace:
    """The space of some parameters of a model.

    Args:
        model: Any module.
        params: See `Selection`; a tied parameter has one place, whichever of its names is given.
        mask: The support: a `Support` for the model's own masks, bool tensors by parameter name (those not named
            stay whole), or one flat bool tensor of all coordinates. None = every coordinate, masks as they are.

    Raises:
        ConfigError: an unknown parameter, several dtypes or devices, complex parameters, or a mask of another shape.
    """
    firsts = own_parameters(model)
    ids = {id(parameter) for parameter in firsts.values()}
    aliases = {n: each for n, each in model.named_parameters(remove_duplicate=False) if id(each) in ids}
    chosen = _chosen(firsts, aliases, params)
    kinds = {(firsts[name].dtype, firsts[name].device) for name in chosen}
    if len(kinds) != 1 or not next(iter(kinds))[0].is_floating_point:
        shown = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
        raise ConfigError(f"`params` (={shown}) must be parameters of one floating-point dtype on one device")
    dtype, device = next(iter(kinds))
    shapes = {name: firsts[name].shape for name in chosen}
    space = ParameterSpace(shapes, dtype, device)
    if mask is None:
        return space
    if isinstance(mask, str):
        mask = _support(mask)
    if isinstance(mask, Support):
        return _of_own_masks(model, space, mask)
    flat = mask if isinstance(mask, Tensor) else _flat_mask(space, aliases, firsts, mask)
    if flat.dtype is not torch.bool or flat.shape != (space.size,):
        raise ConfigError(f"`mask` (={flat.dtype}, {tuple(flat.shape)}) must be bool of shape ({space.size},)")
    return ParameterSpace(shapes, dtype, device, flat.to(device).clone())


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by first name, without the statistics of Fisher taps, whose gradients are none."""
    held = [module for path, module in model.named_modules() if path.rpartition(".")[2] == CONTAINER]
    taken = {id(parameter) for holder in held for parameter in holder._parameters.values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in taken}


def _support(value: str) -> Support:
    try:
        return Support(value)
    except ValueError:
        raise ConfigError(f"`mask` (={value!r}) must be one of {', '.join(each.value for each in Support)}") from None


def _chosen(firsts: Mapping[str, Tensor], aliases: Mapping[str, Tensor], params: Selection) -> list[str]:
    if params is None:
        wanted = [name for name, parameter in firsts.items() if parameter.requires_grad] or list(firsts)
        return wanted
    if isinstance(params, str):
        raise ConfigError(f"`params` (={params!r}) must be an iterable of names: give [{params!r}]")
    ids = {id(parameter): name for name, parameter in firsts.items()}
    found = set()
    for each in params:
        parameter = aliases.get(each) if isinstance(each, str) else each
        if id(parameter) not in ids:
            raise ConfigError(
                f"`params` names `{each if isinstance(each, str) else type(each).__name__}`, which the "
                f"model does not have; it has {', '.join(list(firsts)[:5])}"
            )
        found.add(ids[id(parameter)])
    return [name for name in firsts if name in found]


def _flat_mask(
    space: ParameterSpace,
    aliases: Mapping[str, Tensor],
    firsts: Mapping[str, Tensor],
    mask: Mapping[str, Tensor | Mask],
) -> Tensor:
    ids = {id(parameter): name for name, parameter in firsts.items()}
    whole = {n: torch.ones(s, dtype=torch.bool, device=space.device) for n, s in space.shapes.items()}
    for name, given in mask.items():
        own = ids.get(id(aliases.get(name)))
        if own is None:
            raise ConfigError(f"`mask` names `{name}`, which the model does not have")
        tensor = given.tensor if isinstance(given, Mask) else given
        if own in whole:
            if tensor.dtype is not torch.bool or tensor.shape != whole[own].shape:
                shape = tuple(whole[own].shape)
                raise ConfigError(f"`mask` of `{name}` (={tensor.dtype}, {tuple(tensor.shape)}) must be bool {shape}")
            whole[own] = tensor.to(space.device)
    return space.flat(whole)


def _of_own_masks(model: nn.Module, space: ParameterSpace, support: Support) -> ParameterSpace:
    weights = {name: each for name, each in check_stored_dense(model, space.shapes).items() if name in space.shapes}
    if not weights:
        raise ConfigError(f"`mask` (={support}) needs masks, and the chosen parameters have none; use mask=None")
    if support is Support.ON:
        alive = {name: weight.mask for name, weight in weights.items()}
        return ParameterSpace(space.shapes, space.dtype, space.device, _fill(space, alive, True))
    paths = {id(module): path for path, module in model.named_modules()}
    opened = {}
    for weight in weights.values():
        for module, attribute in weight.owners:
            check_mask_edit(module)  # raises in a resurrection phase: what stands at dead entries is not zero there
            path, name = paths[id(module)], mask_name(attribute)
            opened[f"{path}.{name}" if path else name] = torch.ones_like(weight.mask)
    dead = {name: ~weight.mask for name, weight in weights.items()}
    flat = _fill(space, dead, False) if support is Support.OFF else None
    return ParameterSpace(space.shapes, space.dtype, space.device, flat, opened)


def _fill(space: ParameterSpace, given: Mapping[str, Tensor], otherwise: bool) -> Tensor:
    return space.flat(
        {
            n: given.get(n, torch.full(s, otherwise, dtype=torch.bool, device=space.device))
            for n, s in space.shapes.items()
        }
    )
