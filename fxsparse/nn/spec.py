"""What is known about a mask besides its values."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from fxsparse.errors import ConfigError
from fxsparse.sparsity import Layout, Pattern, Unstructured


class Route(enum.Enum):
    """Where a mask takes effect."""

    MODULE = "module"
    """In a sparse module, which reads its own weight through the mask."""
    MASK_NODE = "mask node"
    """In a graph node `masked_weight(weight, mask)`."""
    EFFECTIVE = "effective weight"
    """Behind the computation that makes the weight which is used (weight norm, parametrizations, standardisation)."""
    PARAMETER = "parameter"
    """At the parameter itself: dead entries are zero and their gradient is masked."""


class Guard(enum.Enum):
    """What keeps the dead entries out of the training."""

    FORWARD = "forward"
    """Every reader goes through `masked_weight`: whatever stands at dead entries is never seen."""
    GRADIENT = "gradient"
    """Readers see the parameter as it is, zero at dead entries; a hook masks its gradient after each backward pass."""


@dataclass(frozen=True)
class MaskSpec:
    """The description of one mask.

    Attributes:
        pattern: Which masks are legal; the mask that is all True always is.
        layout: Which axes of the weight are outputs and inputs.
        route: Where the mask takes effect.
        guard: What keeps the dead entries out of the training.
        row_order: Name of the int64 buffer, beside the mask, that holds the row order of a `SharedSupport` mask.

    Raises:
        ConfigError: `Route.PARAMETER` or `Route.EFFECTIVE` without `Guard.GRADIENT`: dead entries of the parameter
            would be trained.
    """

    pattern: Pattern = field(default_factory=Unstructured)
    layout: Layout = field(default_factory=Layout)
    route: Route = Route.MODULE
    guard: Guard = Guard.FORWARD
    row_order: str | None = None

    def __post_init__(self) -> None:
        if self.route in (Route.PARAMETER, Route.EFFECTIVE) and self.guard is not Guard.GRADIENT:
            raise ConfigError(f"`guard` (={self.guard}) must be Guard.GRADIENT for `route` (={self.route})")

    @property
    def hides_gradient(self) -> bool:
        """Whether readers go through `masked_weight`: dead entries get no gradient from what uses the weight."""
        return self.guard is Guard.FORWARD or self.route is Route.EFFECTIVE
