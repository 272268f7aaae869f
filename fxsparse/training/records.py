"""What mask updates did, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fxsparse.sparsity.mask import Mask


@dataclass(frozen=True)
class UpdateRecord:
    """One weight at one mask update.

    Attributes:
        step: Completed optimizer steps.
        name: Name of the weight.
        dropped: Elements that died.
        grown: Elements that came alive.
        alive: Elements alive afterwards.
        numel: Elements in all.
    """

    step: int
    name: str
    dropped: int
    grown: int
    alive: int
    numel: int

    @staticmethod
    def of(step: int, name: str, before: Mask, after: Mask) -> UpdateRecord:
        """The record of a change of masks."""
        return UpdateRecord(step, name, (before - after).alive, (after - before).alive, after.alive, after.numel)

    @property
    def density(self) -> float:
        """Alive fraction."""
        return self.alive / self.numel


@dataclass(frozen=True)
class UpdateReport:
    """All mask updates of a training; `print` shows one line per update over all weights.

    Attributes:
        rows: One record per update and weight, in order.
    """

    rows: tuple[UpdateRecord, ...]

    def updates(self) -> tuple[UpdateRecord, ...]:
        """The rows of each update summed over its weights, under the name "all"."""
        sums: dict[int, UpdateRecord] = {}
        for row in self.rows:
            sofar = sums.get(row.step, UpdateRecord(row.step, "all", 0, 0, 0, 0))
            sums[row.step] = UpdateRecord(
                row.step,
                "all",
                sofar.dropped + row.dropped,
                sofar.grown + row.grown,
                sofar.alive + row.alive,
                sofar.numel + row.numel,
            )
        return tuple(sums.values())

    def __iter__(self) -> Iterator[UpdateRecord]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        head = f"{'step':>8} {'dropped':>10} {'grown':>10} {'alive':>12} {'density':>9}"
        lines = [
            f"{row.step:>8} {row.dropped:>10} {row.grown:>10} {row.alive:>12} {row.density:>9.4f}"
            for row in self.updates()
        ]
        return "\n".join([head, *lines])
