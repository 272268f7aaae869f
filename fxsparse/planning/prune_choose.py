"""Which channels go: the lowest-ranked ones, as few as meet a budget."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxsparse.errors import ConfigError
from fxsparse.graph.channels_groups import ChannelGroup
from fxsparse.planning.prune_budgets import Budget
from fxsparse.planning.prune_costs import Bools, Costs
from fxsparse.planning.prune_groups import is_run

Floats = npt.NDArray[np.float64]


class Unmet(ConfigError):
    """What is free to go does not meet the budget."""


class Scope(enum.Enum):
    """Which channels compete with each other.

    GLOBAL: all, by their scores. ISOMORPHIC: those of groups with the same structure, by their scores; every structure
    loses the same fraction (Fang et al. 2024, arXiv 2407.04616). LOCAL: those of one group; every group loses the same
    fraction.
    """

    GLOBAL = "global"
    ISOMORPHIC = "isomorphic"
    LOCAL = "local"


@dataclass(frozen=True)
class Limits:
    """What each group keeps whatever its scores.

    Attributes:
        round_to: the sizes of pruned dimensions are multiples of it, as far as the group's channels decide.
        min_channels: channels that stay.
        min_density: fraction of the channels that stays, in [0, 1].
    """

    round_to: int = 1
    min_channels: int = 1
    min_density: float = 0.0

    def __post_init__(self) -> None:
        for name in ("round_to", "min_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"`{name}` (={value!r}) must be an int of at least 1")
        if not isinstance(self.min_density, int | float) or not 0 <= self.min_density <= 1:
            raise ConfigError(f"`min_density` (={self.min_density!r}) must be in [0, 1]")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A channel group that may lose channels.

    Attributes:
        group: the group.
        order: its channels, those that go first in front.
        ranks: their places in the ranking, ascending, comparable between groups.
        steps: the numbers of channels that it may lose, ascending from 0.
    """

    group: ChannelGroup
    order: npt.NDArray[np.int64]
    ranks: Floats
    steps: tuple[int, ...]


def candidates(
    groups: Sequence[ChannelGroup], scores: Mapping[int, Floats], scope: Scope, limits: Limits
) -> list[Candidate]:
    """Groups with their channels ranked; equal scores go in the order of the channels.

    Args:
        groups: the groups.
        scores: the group's number -> its scores.
        scope: which channels compete.
        limits: what each group keeps.
    """
    pools: dict[object, list[ChannelGroup]] = {}
    for group in groups:
        key: object = () if scope is Scope.GLOBAL else group.id if scope is Scope.LOCAL else structure(group)
        pools.setdefault(key, []).append(group)
    found: dict[int, Candidate] = {}
    for pool in pools.values():
        together = np.concatenate([scores[group.id] for group in pool])
        places = np.empty(together.size)
        places[np.argsort(together, kind="stable")] = (np.arange(together.size) + 1) / together.size
        start = 0
        for group in pool:
            own = places[start : start + group.channels]
            order = np.argsort(own, kind="stable")
            found[group.id] = Candidate(group, order, own[order], allowed_losses(group, limits))
            start += group.channels
    return [found[group.id] for group in groups]


def structure(group: ChannelGroup) -> object:
    """What groups of the same structure share: how their members are read, along which dimension, and in which runs."""
    return tuple(sorted((m.role, m.dim, len(m.indices[0]) > 1, is_run(m.indices[0])) for m in group.members))


def allowed_losses(group: ChannelGroup, limits: Limits) -> tuple[int, ...]:
    """The numbers of channels that a group may lose, ascending from 0."""
    step = group.multiple
    for member in group.members:
        width = len(member.indices[0])
        step = math.lcm(step, limits.round_to // math.gcd(limits.round_to, width))
    least = max(limits.min_channels, math.ceil(limits.min_density * group.channels), 1)
    kept = range(group.channels // step * step, least - 1, -step)
    return (0, *(group.channels - count for count in kept if count < group.channels))


class Choice:
    """Searches for the fewest channels that meet a budget.

    Args:
        candidates: the groups, ranked.
        costs: what the model costs.
    """

    def __init__(self, candidates: Sequence[Candidate], costs: Costs) -> None:
        self.candidates, self.costs = candidates, costs
        self._closures = [[c.group.classes[int(i)] for i in c.order] for c in candidates]
        self._flat = [np.concatenate(closure) for closure in self._closures]
        self._ends = [np.cumsum([0, *(len(each) for each in closure)]) for closure in self._closures]
        reached = [c.ranks[np.array(c.steps[1:], dtype=np.int64) - 1] for c in candidates]
        keys = [(rank, number) for number, ranks in enumerate(reached) for rank in ranks]
        self.sequence = [number for _, number in sorted(keys)]
        """The candidates in the order in which they take their next step."""

    def losses(self, steps: int) -> list[int]:
        """How many channels each candidate loses after so many steps of all."""
        taken = np.bincount(np.array(self.sequence[:steps], dtype=np.int64), minlength=len(self.candidates))
        return [c.steps[int(count)] for c, count in zip(self.candidates, taken, strict=True)]

    def removed(self, losses: Sequence[int]) -> Bools:
        """The classes of channels that go."""
        result = np.zeros(self.costs.channels.classes.size, dtype=bool)
        for lost, flat, ends in zip(losses, self._flat, self._ends, strict=True):
            result[flat[: ends[lost]]] = True
        return result

    def search(self, budget: Budget) -> list[int]:
        """The losses that meet the budget; one step less does not.

        Raises:
            ConfigError: it cannot be met.
        """
        whole = budget.cost(self.costs, self.removed([0] * len(self.candidates)))
        limit = budget.density * whole

        def cost(steps: int) -> float:
            return budget.cost(self.costs, self.removed(self.losses(steps)))

        low, high = 0, len(self.sequence)
        least = cost(high)
        if least > limit:
            raise Unmet(
                f"`density` (={budget.density}) of {type(budget).__name__} cannot be met: {least / whole:.1%} of the "
                f"{budget.unit} stay when every channel group that may be pruned keeps its least; raise it, or lower "
                "`min_channels`, `min_density` or `round_to`"
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if cost(middle) <= limit else (middle + 1, high)
        return self.losses(low)
