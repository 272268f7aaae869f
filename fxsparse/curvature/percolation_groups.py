"""Groups of weights with their Fisher, for percolation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor, nn

from fxsparse.curvature.arguments import check_axis, check_kind
from fxsparse.curvature.damage_tensors import Tensors, check_tensors, checked
from fxsparse.errors import ConfigError
from fxsparse.nn import masked_weights


@dataclass(frozen=True, eq=False)
class GroupTable:
    """Groups g = 1..G over several parameters.

    Attributes:
        ids: Parameter name -> the group of each entry; -1 = in none, never perturbed.
        fisher: F_g, the sum over the group.
        alive: n_g, the number of entries of each.
        elements: Fisher of the entries by name, where it is known; else it is the group's mean.
    """

    ids: Mapping[str, Int64[Tensor, "*shape"]]
    fisher: Float64[Tensor, " groups"]
    alive: Int64[Tensor, " groups"]
    elements: Mapping[str, Float64[Tensor, "*shape"]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_tensors(self.ids, "ids")
        check_tensors(self.elements, "elements")
        for name, each in (("fisher", self.fisher), ("alive", self.alive)):
            check_kind(each, name, Tensor)
            if each.ndim != 1 or each.shape != self.fisher.shape:
                raise ConfigError(f"`{name}` (={tuple(each.shape)}) must have one entry for each group")

    @property
    def count(self) -> int:
        """G."""
        return len(self.fisher)

    @property
    def means(self) -> Float64[Tensor, " groups"]:
        """F_g / n_g; 0 where a group has no alive entry."""
        return self.fisher / self.alive.clamp_min(1)

    @classmethod
    def of(cls, fisher: Tensors, model: nn.Module | None = None, axis: int = 0) -> GroupTable:
        """Groups that are slices of each parameter along an axis, from a Fisher of its entries.

        Args:
            fisher: Diagonal by parameter name.
            model: Where it has masks, dead entries are in no group.
            axis: The axis whose indices are groups, such as 0 for output channels.

        Raises:
            ConfigError: no entry, a tensor without that axis or of another shape than its mask, what a collector's
                `get` returns, or an argument of another type.
            DataError: a Fisher is negative or not finite.
        """
        check_kind(model, "model", nn.Module, type(None))
        check_tensors(fisher, "fisher")
        masks = {} if model is None else {name: weight.mask for name, weight in masked_weights(model).items()}
        ids, start = {}, 0
        for name, each in fisher.items():
            if "|" in name:
                raise ConfigError(
                    f"`{name}` is a key of a collector, not a parameter, and its values may be sums of groups: give "
                    "what `FisherCollector.parameters` returns"
                )
            check_axis(axis, each, name)
            if name in masks and masks[name].shape != each.shape:
                raise ConfigError(f"`{name}` (={tuple(each.shape)}) must be like its mask, {tuple(masks[name].shape)}")
            view = [1] * each.ndim
            view[axis] = -1
            index = torch.arange(each.shape[axis]).reshape(view).expand(each.shape) + start
            ids[name] = torch.where(masks[name].cpu(), index, -1) if name in masks else index.clone()
            start += each.shape[axis]
        return cls.by_ids(fisher, ids)

    @classmethod
    def by_ids(cls, fisher: Tensors, ids: Mapping[str, Int64[Tensor, "*shape"]]) -> GroupTable:
        """Any groups, numbered from 0, from a Fisher of the entries.

        Raises:
            ConfigError: names or shapes that differ, no group, or groups that are not int64 from -1 on.
            DataError: a Fisher is negative or not finite.
        """
        check_tensors(fisher, "fisher")
        check_tensors(ids, "ids")
        for name, index in ids.items():
            if index.dtype is not torch.int64 or (index.numel() and int(index.min()) < -1):
                raise ConfigError(f"`ids` of `{name}` (={index.dtype}) must be int64: a group's number, or -1 for none")
            if name not in fisher or fisher[name].shape != index.shape:
                raise ConfigError(f"`ids` of `{name}` (={tuple(index.shape)}) must have a Fisher of that shape")
        count = max((int(index.max()) + 1 for index in ids.values() if index.numel()), default=0)
        if not count:
            raise ConfigError("`ids` (=no group) must put some entries into groups")
        elements = {name: checked(name, fisher[name]).cpu() for name in ids}
        sums = torch.zeros(count + 1, dtype=torch.float64)
        sizes = torch.zeros(count + 1, dtype=torch.int64)
        for name, index in ids.items():
            flat = torch.where(index < 0, count, index).reshape(-1).cpu()
            sums.index_add_(0, flat, elements[name].reshape(-1))
            sizes.index_add_(0, flat, torch.ones_like(flat))
        return cls({name: index.cpu() for name, index in ids.items()}, sums[:-1], sizes[:-1], elements)

    def risks(self, delta: Mapping[str, Float64[Tensor, "*shape"]]) -> Float64[Tensor, " groups"]:
        """R_g = sum F_i delta_i^2 / 2 over each group, with the group's mean where the entries' Fisher is not known."""
        found = torch.zeros(self.count + 1, dtype=torch.float64)
        for name, index in self.ids.items():
            flat = torch.where(index < 0, self.count, index).reshape(-1)
            means = torch.cat([self.means, torch.zeros(1, dtype=torch.float64)])
            own = self.elements[name].reshape(-1) if name in self.elements else means[flat]
            found.index_add_(0, flat, 0.5 * own * delta[name].reshape(-1).square())
        return found[:-1]

    def weights(self, model: nn.Module) -> dict[str, Shaped[Tensor, "*shape"]]:
        """The parameters of the groups, detached.

        Raises:
            ConfigError: the model lacks one, or it has another shape.
        """
        parameters = dict(model.named_parameters())
        for name, index in self.ids.items():
            if name not in parameters or parameters[name].shape != index.shape:
                raise ConfigError(f"`model` has no parameter `{name}` of shape {tuple(index.shape)}")
        return {name: parameters[name].detach().cpu() for name in self.ids}


@contextlib.contextmanager
def kept_tensors(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Copies of parameters or buffers, from which they are put back bit by bit, always."""
    held = list(tensors)
    before = [parameter.detach().clone() for parameter in held]
    try:
        yield before
    finally:
        with torch.no_grad():
            for parameter, old in zip(held, before, strict=True):
                parameter.copy_(old)
