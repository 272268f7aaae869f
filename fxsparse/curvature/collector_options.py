"""What a collector is asked for: parameters, options, and what is told of a key."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from fxsparse.curvature.groups_types import aliases_of
from fxsparse.errors import ConfigError


@dataclass(frozen=True, eq=False)
class GroupInfo:
    """What belongs to a key.

    Attributes:
        members: n_g, the number of entries of each group (float64, the shape of the values).
        axis: along which axis groups are slices; None for single entries, "leading" for an index over several axes.
        shape: of the parameter.
        aliases: all names of the parameter.
        units: M, the units seen.
        slow: why the parameter is collected without taps; "" where it has them.
    """

    members: Tensor
    axis: int | str | None
    shape: tuple[int, ...]
    aliases: tuple[str, ...]
    units: float
    slow: str


def chosen_parameters(model: nn.Module, wanted: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters by first name that are wanted, or all that require gradients.

    Raises:
        ConfigError: a name that is no parameter's, or nothing is left.
    """
    named = dict(model.named_parameters())
    if wanted is None:
        found = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    else:
        first = {alias: names[0] for names in aliases_of(model).values() for alias in names}
        unknown = [name for name in wanted if name not in first]
        if unknown:
            raise ConfigError(f"`parameters` (={unknown[0]!r}) is no parameter of the model")
        found = {first[name]: named[first[name]] for name in wanted}
    floating = {name: parameter for name, parameter in found.items() if parameter.is_floating_point()}
    if not floating:
        raise ConfigError(
            "the model has no floating-point parameter that requires gradients: name them in `parameters`"
        )
    return floating


def check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError for an option that does not exist."""
    if value not in known:
        raise ConfigError(f"`{name}` (={value!r}) must be one of {', '.join(map(repr, known))}")
