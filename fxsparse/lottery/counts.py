"""How many weights are alive after each round of iterative magnitude pruning, exactly.

Rates are rationals read from their decimal text, never binary floats: 0.8 to the power 10 is 0.1074, so ten rounds of
20 % do not reach a sparsity of 0.9, and rounding errors must not hide that. Source: Frankle & Carbin, ICLR 2019
(arXiv 1803.03635); the last round is clipped so that the target is hit to the weight.
"""

from __future__ import annotations

import decimal
import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from fxsparse.errors import ConfigError
from fxsparse.sparsity import keep_count

Rate = str | int | float | Fraction
"""A number in [0, 1] as its decimal text; a float counts as its shortest decimal text."""


class FinalRound(enum.Enum):
    """What the last round does when `num_rounds` rounds of the rate do not end exactly on the target."""

    CLIP = "clip"
    """Prunes less than the rate; too few rounds are an error."""
    STRETCH = "stretch"
    """Prunes more than the rate where the rounds are too few."""


def rational(value: Rate, name: str = "rate") -> Fraction:
    """`value` as an exact rational.

    Raises:
        ConfigError: when the text is not a finite decimal number.

    Examples:
        >>> rational("0.2"), rational(0.1)
        (Fraction(1, 5), Fraction(1, 10))
    """
    if isinstance(value, Fraction):
        return value
    try:
        number = decimal.Decimal(repr(value) if isinstance(value, float) else str(value).strip())
        return Fraction(number)
    except (decimal.InvalidOperation, ValueError, OverflowError):
        raise ConfigError(f"`{name}` (={value!r}) must be a decimal number such as 0.2") from None


def _between(value: Rate, name: str, *, top: bool = False) -> Fraction:
    number = rational(value, name)
    if not (0 < number < 1 or (top and number == 1)):
        raise ConfigError(f"`{name}` (={value}) must lie in (0, 1{']' if top else ')'}")
    return number


def target_alive(numel: int, target: Rate) -> int:
    """A* = K(N, s*): the weights alive at the target sparsity (the library's only count rule).

    Examples:
        >>> target_alive(266_200, "0.9")
        26620
    """
    return keep_count(numel, float(_between(target, "target_sparsity")))


def half_up(value: Fraction) -> int:
    """The nearest integer, halves upwards: floor(value + 1/2)."""
    return math.floor(value + Fraction(1, 2))


@dataclass(frozen=True)
class Counts:
    """The weights alive after each round.

    Attributes:
        names: the prunable weights in model order.
        alive: `alive[r][l]` of weight l after round r; round 0 is dense. For a global scope the split over weights is
            decided by the ranking, so there is one column, the total.
        layerwise: whether the columns are weights.
    """

    names: tuple[str, ...]
    alive: tuple[tuple[int, ...], ...]
    layerwise: bool

    @property
    def totals(self) -> tuple[int, ...]:
        """Weights alive after round 0, 1, ..."""
        return tuple(sum(row) for row in self.alive)

    @property
    def rounds(self) -> int:
        """The number of pruning rounds (round 0 not counted)."""
        return len(self.alive) - 1


@dataclass(frozen=True)
class CountRule:
    """The numbers that decide the counts of a run.

    Attributes:
        rate: fraction of the alive weights pruned in a round, in (0, 1).
        target: target sparsity, in (0, 1).
        num_rounds: rounds to run at most, None for as many as the target needs.
        final_round: clip or stretch.
        factors: by name, in (0, 1]: the rate of a weight is rate * factor (layerwise only).
        min_alive: alive weights that every layer keeps at least.
    """

    rate: Rate = "0.2"
    target: Rate = "0.9"
    num_rounds: int | None = None
    final_round: FinalRound = FinalRound.CLIP
    factors: Mapping[str, Rate] = field(default_factory=dict)
    min_alive: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        _between(self.rate, "prune_rate_per_round")
        _between(self.target, "target_sparsity")
        for name, factor in self.factors.items():
            _between(factor, f"rate_factors.{name}", top=True)
        if self.num_rounds is not None and self.num_rounds < 1:
            raise ConfigError(f"`num_rounds` (={self.num_rounds}) must be at least 1, or null for as many as needed")
        if self.min_alive < 0:
            raise ConfigError(f"`min_alive_per_layer` (={self.min_alive}) must be at least 0")

    def counts(self, sizes: Mapping[str, int], layerwise: bool = False) -> Counts:
        """The weights alive after every round, from round 0 to the round that reaches the target.

        Args:
            sizes: elements of each prunable weight, in model order.
            layerwise: rank inside each weight instead of over all of them.

        Raises:
            ConfigError: nothing to prune, a factor for an unknown weight or with a global scope, a target that the
                layers' minima forbid, or too few rounds (the message names the number needed).
        """
        total = sum(sizes.values())
        if total == 0:
            raise ConfigError("`sizes` (={}) holds no weight to prune; widen `prunable_layers`")
        if unknown := sorted(set(self.factors) - set(sizes)):
            raise ConfigError(f"`rate_factors` (={unknown[0]}) names no prunable weight; known: {', '.join(sizes)}")
        if self.factors and not layerwise:
            raise ConfigError("`rate_factors` needs `scope: layerwise`; a global ranking has one rate")
        goal = target_alive(total, self.target)
        if (least := sum(min(self.min_alive, size) for size in sizes.values())) > goal:
            raise ConfigError(
                f"`target_sparsity` (={self.target}) leaves {goal} of {total} weights, fewer than the {least} that "
                f"`min_alive_per_layer` (={self.min_alive}) protects; lower one of the two"
            )
        rows = self._layerwise(sizes, goal) if layerwise else self._global(total, goal)
        return Counts(tuple(sizes), tuple(self._limit(rows, sizes, goal, layerwise)), layerwise)

    def _global(self, total: int, goal: int) -> list[tuple[int, ...]]:
        rate, alive = rational(self.rate), total
        rows: list[tuple[int, ...]] = [(alive,)]
        while alive > goal:
            alive = max(goal, alive - max(1, half_up(rate * alive)))
            rows.append((alive,))
        return rows

    def _layerwise(self, sizes: Mapping[str, int], goal: int) -> list[tuple[int, ...]]:
        rates = [rational(self.rate) * rational(self.factors.get(name, 1)) for name in sizes]
        alive = tuple(sizes.values())
        rows = [alive]
        while sum(alive) > goal:
            room = [max(0, count - self.min_alive) for count in alive]
            wanted = [min(half_up(p * a), r) for p, a, r in zip(rates, alive, room, strict=True)]
            if not any(wanted):
                first = max((p * a, -i) for i, (p, a, r) in enumerate(zip(rates, alive, room, strict=True)) if r)
                wanted[-first[1]] = 1
            pruned = shrink(wanted, min(sum(wanted), sum(alive) - goal))
            alive = tuple(a - n for a, n in zip(alive, pruned, strict=True))
            rows.append(alive)
        return rows

    def _limit(
        self, rows: list[tuple[int, ...]], sizes: Mapping[str, int], goal: int, layerwise: bool
    ) -> list[tuple[int, ...]]:
        needed = len(rows) - 1
        if self.num_rounds is None or self.num_rounds >= needed:
            return rows
        if self.final_round is FinalRound.CLIP:
            raise ConfigError(
                f"`num_rounds` (={self.num_rounds}) is too small: a target sparsity of {self.target} at a rate of "
                f"{self.rate} needs {needed} rounds; set `num_rounds` to {needed} or null, or `final_round` to stretch"
            )
        kept = rows[: self.num_rounds]
        excess = sum(kept[-1]) - goal
        if not layerwise:
            return [*kept, (goal,)]
        rates = [rational(self.rate) * rational(self.factors.get(name, 1)) for name in sizes]
        return [*kept, _stretch(kept[-1], rates, excess, self.min_alive)]


def shrink(wanted: Sequence[int], total: int) -> list[int]:
    """`wanted` in proportion, so that it sums to `total` <= sum(wanted); largest remainder first, then the lower index.

    Examples:
        >>> shrink([4, 3, 3], 5)
        [2, 2, 1]
    """
    full = sum(wanted)
    if total >= full:
        return list(wanted)
    shares = [Fraction(count * total, full) for count in wanted]
    result = [math.floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (result[i] - shares[i], i))
    for index in order[: total - sum(result)]:
        result[index] += 1
    return result


def _stretch(alive: Sequence[int], rates: Sequence[Fraction], excess: int, min_alive: int) -> tuple[int, ...]:
    """Prune `excess` in proportion to the rates; a layer that reaches its minimum leaves, the others share the rest."""
    room = [max(0, a - min_alive) for a in alive]
    pruned = [0] * len(alive)
    while excess:
        open_ = [i for i in range(len(alive)) if pruned[i] < room[i]]
        weights = [rates[i] * alive[i] for i in open_]
        scale = Fraction(excess) / sum(weights)
        shares = [min(Fraction(room[i] - pruned[i]), w * scale) for i, w in zip(open_, weights, strict=True)]
        whole = [math.floor(share) for share in shares]
        order = sorted(range(len(open_)), key=lambda j: (whole[j] - shares[j], j))
        capped = sum(shares) < excess
        for j in [] if capped else order[: excess - sum(whole)]:
            whole[j] += 1
        if not any(whole):
            whole[order[0]] = 1
        for i, count in zip(open_, whole, strict=True):
            pruned[i] += count
        excess -= sum(whole)
    return tuple(a - n for a, n in zip(alive, pruned, strict=True))


def rounds_needed(rate: Rate, target: Rate) -> int:
    """ceil(ln(1 - target) / ln(1 - rate)) exactly: the rounds that a large model needs.

    Examples:
        >>> rounds_needed("0.2", "0.9")
        11
    """
    keep, goal = 1 - _between(rate, "prune_rate_per_round"), 1 - _between(target, "target_sparsity")
    rounds = max(1, math.ceil(math.log(goal) / math.log(keep)) - 1)
    while keep**rounds > goal:
        rounds += 1
    return rounds
