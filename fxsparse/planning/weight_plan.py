"""What a transform does to one weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fxsparse.nn import Guard, MaskSpec, Route
from fxsparse.sparsity import Layout, Pattern, Target

ROUTES = (Route.MODULE, Route.MASK_NODE, Route.EFFECTIVE, Route.PARAMETER)
"""Routes in the order in which a weight with several names is described by one of them."""

RECORD = "_fxsparse_plan"
"""Attribute of a transformed model that holds the `WeightPlan` of each of its weights."""


@dataclass(frozen=True)
class WeightPlan:
    """What a transform does to one weight.

    Attributes:
        name: Its first name.
        shape: Its shape.
        route: Where its mask takes effect (the first of `ROUTES` among its names); None when it gets no mask.
        guard: What keeps dead entries out of the training; None when it gets no mask.
        layout: Its output and input axes; None when they are not known.
        pattern: Which masks are legal; None when it gets no mask.
        target: What it keeps; None when it gets no mask.
        uses: Where it is used, as "op in module".
        reason: Why it is masked so, or why it is not.
        specs: Each of its names -> the spec of the mask there.
        refused: Whether it could not be masked if it were asked for.
    """

    name: str
    shape: tuple[int, ...]
    route: Route | None
    guard: Guard | None
    layout: Layout | None
    pattern: Pattern | None
    target: Target | None
    uses: tuple[str, ...] = ()
    reason: str = ""
    specs: Mapping[str, MaskSpec] = field(default_factory=dict, repr=False)
    refused: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row(self) -> tuple[str, ...]:
        """Its cells in the table of a plan: `HEADER` names them."""
        shape = "x".join(map(str, self.shape))
        uses = ", ".join(self.uses[:2]) + (f" and {len(self.uses) - 2} more" if len(self.uses) > 2 else "")
        if self.route is None or self.target is None:
            return self.name, shape, "-", "-", "-", "-", uses, self.reason
        outside = self.guard is Guard.GRADIENT and self.route in (Route.MODULE, Route.MASK_NODE)
        route = self.route.value + ("*" if outside else "")
        sparsity, alive = f"{self.target.sparsity:.4g}", str(self.target.alive)
        return self.name, shape, route, str(self.pattern), sparsity, alive, uses, self.reason


HEADER = ("weight", "shape", "route", "pattern", "sparsity", "alive", "uses", "reason")
"""Names of the cells of `WeightPlan.row`."""
