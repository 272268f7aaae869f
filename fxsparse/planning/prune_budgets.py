"""Budgets of structured pruning: how much of a model may stay."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

from fxsparse.errors import ConfigError
from fxsparse.planning.latency_table import LatencyTable
from fxsparse.planning.prune_costs import Bools, Costs


@dataclass(frozen=True)
class Budget(abc.ABC):
    """At most a fraction `density` of a cost stays.

    Attributes:
        density: in (0, 1].

    Raises:
        ConfigError: `density` is out of range.
    """

    density: float
    unit: ClassVar[str]
    """What is counted."""

    def __post_init__(self) -> None:
        number = isinstance(self.density, int | float) and not isinstance(self.density, bool)
        if not number or not math.isfinite(self.density) or not 0 < self.density <= 1:
            raise ConfigError(
                f"`density` (={self.density!r}) of {type(self).__name__} must be in (0, 1]: what may stay"
            )

    def check(self, costs: Costs) -> None:  # noqa: B027  (most costs need no check)
        """Raise ConfigError where the model has no such cost."""

    @abc.abstractmethod
    def cost(self, costs: Costs, removed: Bools) -> float:
        """The cost when these classes of channels go."""


@dataclass(frozen=True)
class ParameterBudget(Budget):
    """Elements of all parameters."""

    unit: ClassVar[str] = "parameters"

    def cost(self, costs: Costs, removed: Bools) -> float:
        """Elements of all parameters."""
        return costs.parameters(removed)


@dataclass(frozen=True)
class MacBudget(Budget):
    """Multiply-accumulates of the products with weights, on the example inputs; as `graph.count` counts them.

    Products of two activations (attention scores) are not counted, nor what is inside operators that are barriers.
    """

    unit: ClassVar[str] = "MACs"

    def cost(self, costs: Costs, removed: Bools) -> float:
        """Multiply-accumulates."""
        return costs.macs(removed)

    def check(self, costs: Costs) -> None:
        """Raise ConfigError for a model without products."""
        if not costs.products:
            raise ConfigError(f"`budget` (={self}): the model has no product with a weight; use a ParameterBudget")


@dataclass(frozen=True)
class LatencyBudget(Budget):
    """The sum of the measured latencies of the products with weights, on the example inputs.

    Attributes:
        table: what was measured, by `fxsparse.exporters.measure_latency_table`.
    """

    table: LatencyTable
    unit: ClassVar[str] = "seconds"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.table, LatencyTable):
            raise ConfigError(
                f"`table` (={type(self.table).__name__}) must be a LatencyTable: "
                "fxsparse.exporters.latency_table.measure_latency_table makes one"
            )

    def cost(self, costs: Costs, removed: Bools) -> float:
        """Seconds."""
        return costs.latency(removed, self.table)

    def check(self, costs: Costs) -> None:
        """Raise ConfigError for a table of another model."""
        costs.check(self.table)


@dataclass(frozen=True)
class ChannelBudget(Budget):
    """Channels that could be pruned, counted once each however many weights they are coupled through."""

    unit: ClassVar[str] = "channels"

    def cost(self, costs: Costs, removed: Bools) -> float:
        """Channels that stay."""
        return costs.prunable(removed)
