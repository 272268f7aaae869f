"""What a collector is asked for: parameters, options, and what is told of a key."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxsparse.curvature.arguments import (
    check_callable,
    check_kind,
    check_listed,
    check_names,
    check_number,
    check_one_of,
)
from fxsparse.curvature.dense_storage import check_stored_dense
from fxsparse.curvature.groups import Grouping
from fxsparse.curvature.groups_types import Heads, aliases_of
from fxsparse.curvature.operator_space import own_parameters
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

    @classmethod
    def of(cls, grouping: Grouping, aliases: tuple[str, ...], units: float, slow: str) -> GroupInfo:
        """What is known of the groups of a parameter."""
        members = torch.ones(grouping.shape, dtype=torch.float64) if grouping.is_element else grouping.members
        return cls(members, grouping.axis, grouping.shape, aliases, units, slow)


def chosen_parameters(model: nn.Module, wanted: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters by first name that are wanted, or all that require gradients.

    Raises:
        ConfigError: a name that is no parameter's, nothing is left, or a parameter is complex or stored alive only.
    """
    named = own_parameters(model)
    if wanted is None:
        found = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    else:
        first = {alias: names[0] for names in aliases_of(model).values() for alias in names if names[0] in named}
        wanted = check_names(wanted, "parameters")
        if not wanted:
            raise ConfigError("`parameters` (=()) must name at least one; leave it out for all that require gradients")
        unknown = [name for name in wanted if name not in first]
        if unknown:
            raise ConfigError(f"`parameters` (={unknown[0]!r}) is no parameter of the model")
        found = {first[name]: named[first[name]] for name in wanted}
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            kind = "complex" if parameter.is_complex() else "of integers"
            raise ConfigError(
                f"`{name}` (={parameter.dtype}) is {kind}, and squares are those of real gradients: leave it out, "
                "naming the others in `parameters`"
            )
    if not found:
        raise ConfigError(
            "the model has no floating-point parameter that requires gradients: name them in `parameters`"
        )
    check_stored_dense(model, found)
    return found


def check_options(
    unit: str, accumulate: str, support: str, absent: str, beta: float, variance: bool, output: object
) -> None:
    """Raise ConfigError for an option that does not exist, is out of range or of another type."""
    check_one_of(unit, "unit", ("sample", "token"))
    check_one_of(accumulate, "accumulate", ("mean", "ema"))
    check_one_of(support, "support", ("mask", "dense"))
    check_one_of(absent, "absent", ("skip", "zero"))
    check_number(beta, "beta", 0)
    if not beta < 1:
        raise ConfigError(f"`beta` (={beta}) must lie in [0, 1)")
    check_kind(variance, "variance", bool)
    check_callable(output, "output")


def declared_heads(heads: Iterable[Heads]) -> tuple[Heads, ...]:
    """The declared layouts; raises ConfigError for others, or one without a list around it."""
    return check_listed(heads, "heads", Heads)
