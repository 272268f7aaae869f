"""Quantities over optimizer steps: sparsity, drop fraction, and when to update.

A step is the number of completed optimizer steps: 1 after the first.
"""

from __future__ import annotations

import abc
import bisect
import enum
import math
from dataclasses import dataclass

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_fraction, check_sparsity, check_step, check_steps


def progress(step: int, start: int, end: int) -> float:
    """Progress u = clamp((step - start) / (end - start), 0, 1); a jump at `start` when both are equal."""
    if step >= end:
        return 1.0
    return 0.0 if step <= start else (step - start) / (end - start)


def _check_span(start: int, end: int) -> None:
    check_step(start, "start")
    check_step(end, "end")
    if not 0 <= start <= end:
        raise ConfigError(f"`start` (={start}) and `end` (={end}) must be steps with 0 <= start <= end")


@dataclass(frozen=True)
class SparsitySchedule(abc.ABC):
    """Sparsity from `initial` (up to step `start`) to `final` (from step `end` on, exactly).

    Attributes:
        initial: Sparsity s_i in [0, 1).
        final: Sparsity s_f in [0, 1).
        start: Step t0.
        end: Step t1 >= t0; equal steps make one shot at t0.
    """

    initial: float
    final: float
    start: int
    end: int

    def __post_init__(self) -> None:
        check_sparsity(self.initial, "initial")
        check_sparsity(self.final, "final")
        _check_span(self.start, self.end)

    def __call__(self, step: int) -> float:
        """Sparsity at a step."""
        return self.at(progress(step, self.start, self.end))

    def at(self, u: float) -> float:
        """Sparsity at progress u in [0, 1]."""
        if u <= 0.0:
            return self.initial
        return self.final if u >= 1.0 else self.initial + (self.final - self.initial) * self._shape(u)

    def at_cycle(self, cycle: int, cycles: int) -> float:
        """Sparsity of one of several cycles, counted from 0: the last one is `final`, a single one too."""
        if not 0 <= cycle < cycles:
            raise ConfigError(f"`cycle` (={cycle}) must be from 0 to `cycles` - 1 (={cycles - 1})")
        return self.at(cycle / (cycles - 1) if cycles > 1 else 1.0)

    @abc.abstractmethod
    def _shape(self, u: float) -> float:
        """Part of the way that is done at progress u, from 0 to 1."""


@dataclass(frozen=True)
class ConstantSparsity(SparsitySchedule):
    """`final` at every step; `initial` is ignored."""

    def at(self, u: float) -> float:
        """`final`."""
        return self.final

    def _shape(self, u: float) -> float:
        return 1.0


@dataclass(frozen=True)
class LinearSparsity(SparsitySchedule):
    """s_i + (s_f - s_i) u."""

    def _shape(self, u: float) -> float:
        return u


@dataclass(frozen=True)
class QuadraticOutSparsity(SparsitySchedule):
    """s_i + (s_f - s_i) (1 - (1 - u)^2)."""

    def _shape(self, u: float) -> float:
        return 1 - (1 - u) ** 2


@dataclass(frozen=True)
class CosineSparsity(SparsitySchedule):
    """s_i + (s_f - s_i) (1 - cos(pi u)) / 2."""

    def _shape(self, u: float) -> float:
        return (1 - math.cos(math.pi * u)) / 2


@dataclass(frozen=True)
class CubicSparsity(SparsitySchedule):
    """s_f + (s_i - s_f) (1 - u)^3 (Zhu and Gupta, arXiv 1710.01878)."""

    def _shape(self, u: float) -> float:
        return 1 - (1 - u) ** 3


@dataclass(frozen=True)
class CustomSparsity:
    """A list of (step, sparsity): each sparsity holds from its step on, `initial` before the first.

    Attributes:
        points: Steps strictly increasing.
        initial: Sparsity before the first step.
    """

    points: tuple[tuple[int, float], ...]
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_sparsity(self.initial, "initial")
        steps = [step for step, _ in self.points]
        for _, sparsity in self.points:
            check_sparsity(sparsity, "points")
        if not steps or steps[0] < 0 or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
            raise ConfigError(f"`points` (={self.points}) must list (step, sparsity) with steps from 0, increasing")

    @property
    def start(self) -> int:
        """Step of the first change."""
        return self.points[0][0]

    @property
    def end(self) -> int:
        """Step of the last change."""
        return self.points[-1][0]

    @property
    def final(self) -> float:
        """Sparsity from `end` on."""
        return self.points[-1][1]

    def __call__(self, step: int) -> float:
        """Sparsity at a step."""
        return next((sparsity for at, sparsity in reversed(self.points) if step >= at), self.initial)


@dataclass(frozen=True)
class AlternatingSparsity:
    """0 up to `start`, then `final` and 0 in turn for `every` steps each, and `final` from `end` on.

    Attributes:
        final: Sparsity of compressed phases, in [0, 1).
        every: Steps of a phase.
        start: Step at which the first, dense phase ends, at least 1.
        end: First step of the last compressed phase.
    """

    final: float
    every: int
    start: int
    end: int

    def __post_init__(self) -> None:
        check_sparsity(self.final, "final")
        if self.start < 1:
            raise ConfigError(f"`start` (={self.start}) must be at least 1: the first phase is dense")
        UpdateSteps(self.every, self.start, self.end)

    def __call__(self, step: int) -> float:
        """Sparsity at a step."""
        compressed = step >= self.end or (step >= self.start and (step - self.start) // self.every % 2 == 0)
        return self.final if compressed else 0.0


Sparsities = SparsitySchedule | CustomSparsity | AlternatingSparsity


@dataclass(frozen=True)
class Phases:
    """A value for each phase of the training.

    Attributes:
        values: One value a phase.
        ends: Steps (or shares of the training) at which phases end, ascending, one fewer than `values`.
    """

    values: tuple[float, ...]
    ends: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.ends) != len(self.values) - 1 or list(self.ends) != sorted(self.ends):
            raise ConfigError(f"ends (={self.ends}) must ascend and be one fewer than the phases (={self.values})")

    def __call__(self, step: int) -> float:
        """The value at a step; a phase ends where the next one begins."""
        return self.values[bisect.bisect_right(self.ends, step)]


class DropKind(enum.Enum):
    """How the drop fraction falls over time."""

    CONSTANT = "constant"  # alpha
    COSINE = "cosine"  # alpha / 2 (1 + cos(pi u))
    LINEAR = "linear"  # alpha (1 - u)
    POWER = "power"  # alpha (1 - u)^power


@dataclass(frozen=True)
class DropFraction:
    """Fraction of alive elements that an update exchanges; 0 from `end` on, whatever the kind.

    Attributes:
        kind: Shape over time.
        alpha: Fraction at `start`, in [0, 1].
        start: Step t0.
        end: Step T_end from which nothing is exchanged.
        power: Exponent of DropKind.POWER.
    """

    kind: DropKind
    alpha: float
    start: int
    end: int
    power: float = 3.0

    def __post_init__(self) -> None:
        check_fraction(self.alpha, "alpha")
        _check_span(self.start, self.end)
        if not self.power > 0:
            raise ConfigError(f"`power` (={self.power}) must be positive")

    def __call__(self, step: int) -> float:
        """Drop fraction at a step."""
        if step >= self.end:
            return 0.0
        u = progress(step, self.start, self.end)
        match self.kind:
            case DropKind.CONSTANT:
                return self.alpha
            case DropKind.COSINE:
                return self.alpha / 2 * (1 + math.cos(math.pi * u))
            case DropKind.LINEAR:
                return self.alpha * (1 - u)
            case DropKind.POWER:
                return float(self.alpha * (1 - u) ** self.power)


@dataclass(frozen=True)
class UpdateSteps:
    """The steps at which masks are updated: t > 0, t >= start, (t - start) a multiple of `every`, t < end.

    Attributes:
        every: Steps between updates.
        start: First step that may update.
        end: Step from which no update happens.
        inclusive_end: For methods that change the sparsity: `end` itself is an update, forced where `every` does not
            reach it.
    """

    every: int
    start: int
    end: int
    inclusive_end: bool = False

    def __post_init__(self) -> None:
        _check_span(self.start, self.end)
        check_steps(self.every, "every")

    def __call__(self, step: int) -> bool:
        """Whether masks are updated after this many completed optimizer steps."""
        if step <= 0 or step < self.start or step > self.end:
            return False
        if step == self.end:
            return self.inclusive_end
        return (step - self.start) % self.every == 0

    def steps(self) -> list[int]:
        """All update steps."""
        return [step for step in (*range(self.start, self.end, self.every), self.end) if self(step)]
