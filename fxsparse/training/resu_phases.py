"""The phases of RESU over the steps of a training."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_fraction, fraction_count


class Phase(enum.Enum):
    """Where a cycle stands: TRAIN -> PRUNE -> STABILIZE -> RESU -> COMMIT, over cycles, then FINAL."""

    TRAIN = "train"
    """Masks fixed, alive weights train."""
    PRUNE = "prune"
    """An event: masks shrink among the alive."""
    STABILIZE = "stabilize"
    """As TRAIN, under the smaller masks."""
    RESU = "resu"
    """The dead positions train."""
    COMMIT = "commit"
    """An event: the tournament chooses the new masks."""
    FINAL = "final"
    """As TRAIN, after the last cycle."""


@dataclass(frozen=True)
class Cycle:
    """One cycle in optimizer steps; a phase is the steps after its first number up to its last.

    Attributes:
        index: Number of the cycle, from 0.
        start: Completed steps before it.
        prune: Completed steps after TRAIN.
        enter: Completed steps after STABILIZE.
        end: Completed steps after RESU, when the tournament is held.
        sparsity: What PRUNE leads to, or None where the cycle prunes nothing.
        committed: Sparsity after the tournament.
        phase: Number j of its RESU phase among those that there are, or None without one.
    """

    index: int
    start: int
    prune: int
    enter: int
    end: int
    sparsity: float | None
    committed: float
    phase: int | None


@dataclass(frozen=True)
class Lengths:
    """How the steps of a cycle are shared among its phases.

    Attributes:
        train: Fraction of TRAIN.
        stabilize: Fraction of STABILIZE.
        resu: Fraction of RESU; the three sum to 1. With 0 cycles only prune.

    Raises:
        ConfigError: a fraction outside [0, 1], another sum, or no TRAIN.
    """

    train: float = 0.6
    stabilize: float = 0.1
    resu: float = 0.3

    def __post_init__(self) -> None:
        for name in ("train", "stabilize", "resu"):
            check_fraction(getattr(self, name), name)
        total = self.train + self.stabilize + self.resu
        if abs(total - 1) > 1e-6:
            raise ConfigError(f"`train` + `stabilize` + `resu` (={total:.6g}) must be 1: the fractions of a cycle")
        if self.train == 0:
            raise ConfigError("`train` (=0) must be positive: a cycle prunes after a phase of training")


@dataclass(frozen=True)
class Timeline:
    """Every phase of a training.

    Attributes:
        cycles: One after another, from step 0.
    """

    cycles: tuple[Cycle, ...]

    @cached_property
    def phases(self) -> int:
        """Number J of RESU phases."""
        return sum(cycle.phase is not None for cycle in self.cycles)

    @cached_property
    def _events(self) -> dict[int, tuple[tuple[Phase, Cycle], ...]]:
        found: dict[int, tuple[tuple[Phase, Cycle], ...]] = {}
        for cycle in self.cycles:
            events = [(cycle.prune, Phase.PRUNE)] if cycle.sparsity is not None else []
            if cycle.phase is not None:
                events += [(cycle.enter, Phase.RESU), (cycle.end, Phase.COMMIT)]
            for step, event in events:
                found[step] = (*found.get(step, ()), (event, cycle))
        return found

    def events(self, step: int) -> tuple[tuple[Phase, Cycle], ...]:
        """What happens after this many completed steps, in order: PRUNE, the entry into RESU, COMMIT."""
        return self._events.get(step, ())

    def phase(self, step: int) -> tuple[Phase, Cycle | None]:
        """The phase in which the optimizer takes this step (the first is 1), and its cycle; FINAL has none."""
        for cycle in self.cycles:
            if step <= cycle.end:
                if cycle.phase is not None and step > cycle.enter:
                    return Phase.RESU, cycle
                return (Phase.TRAIN if step <= cycle.prune else Phase.STABILIZE), cycle
        return Phase.FINAL, None

    def sparsity(self, step: int, initial: float) -> float:
        """The target after this many completed steps."""
        now = initial
        for cycle in self.cycles:
            if cycle.sparsity is not None and step >= cycle.prune:
                now = cycle.sparsity
            if cycle.phase is not None and step >= cycle.end:
                now = cycle.committed
        return now

    def calibrates(self, step: int, steps: int, event: Phase) -> bool:
        """Whether this step is among the last `steps` of the phase that ends with the event."""
        for cycle in self.cycles:
            if event is Phase.PRUNE and cycle.sparsity is not None:
                first, last = cycle.start, cycle.prune
            elif event is Phase.COMMIT and cycle.phase is not None:
                first, last = cycle.enter, cycle.end
            else:
                continue
            if max(first, last - steps) < step <= last:
                return True
        return False


def prune_cycles(sparsities: Sequence[float], lengths: Lengths, ends: Sequence[int]) -> Timeline:
    """Cycles that prune to each sparsity and commit at it; a cycle of sparsity 0 only trains.

    Args:
        sparsities: s_c of each cycle.
        lengths: Shares of the phases.
        ends: Completed steps after each cycle.

    Raises:
        ConfigError: a cycle is too short for its phases.
    """
    made: list[Cycle] = []
    for index, (sparsity, start, end) in enumerate(zip(sparsities, (0, *ends[:-1]), ends, strict=True)):
        if sparsity == 0.0:
            made.append(Cycle(index, start, end, end, end, None, 0.0, None))
            continue
        prune, enter = _cut(lengths, start, end)
        number = sum(cycle.phase is not None for cycle in made) if lengths.resu else None
        made.append(Cycle(index, start, prune, enter, end, sparsity, sparsity, number))
    return Timeline(tuple(made))


def grow_cycles(sparsities: Sequence[float], lengths: Lengths, ends: Sequence[int]) -> Timeline:
    """Cycles that start at each sparsity but the last and commit at the next one; nothing is pruned."""
    made = []
    for index, (following, start, end) in enumerate(zip(sparsities[1:], (0, *ends[:-1]), ends, strict=True)):
        prune, enter = _cut(lengths, start, end)
        made.append(Cycle(index, start, prune, enter, end, None, following, index))
    return Timeline(tuple(made))


def _cut(lengths: Lengths, start: int, end: int) -> tuple[int, int]:
    train = fraction_count(lengths.train, end - start)
    stabilize = fraction_count(lengths.stabilize, end - start) if lengths.resu else end - start - train
    if train < 1 or (lengths.resu and end - start - train - stabilize < 1):
        raise ConfigError(
            f"a cycle of {end - start} steps is too short for `train` (={lengths.train}) and `resu` (={lengths.resu}); "
            "train longer, or take fewer cycles"
        )
    return start + train, start + train + stabilize


def cycle_ends(cycles: int, cycle_steps: int | None, final_fraction: float, total_steps: int | None) -> tuple[int, ...]:
    """Completed steps after each cycle.

    Raises:
        ConfigError: the length is not known, or the cycles are longer than the training.
    """
    if cycle_steps is not None:
        ends = tuple(cycle_steps * (index + 1) for index in range(cycles))
        if total_steps is not None and ends[-1] > total_steps:
            raise ConfigError(f"`total_steps` (={total_steps}) must be at least cycles * cycle_steps (={ends[-1]})")
        return ends
    if total_steps is None:
        raise ConfigError("`total_steps` (=None) must be given to attach with RESU, or `cycle_steps` to RESU(...)")
    shared = total_steps - fraction_count(final_fraction, total_steps)
    return tuple(shared * (index + 1) // cycles for index in range(cycles))
