"""From cells to arms: means over seeds with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxsparse.comparison.cell import Cell
from fxsparse.comparison.config import Reference
from fxsparse.report import Summary, summarise


@dataclass(frozen=True)
class Arm:
    """One method at one pattern and sparsity, over seeds.

    Attributes:
        label: The arm's name.
        pattern: Its pattern, in words.
        sparsity: What was asked for.
        accuracy: Test accuracy in [0, 1].
        reached: Mean sparsity reached.
        steps: Optimizer steps.
        longer: Whether it trained longer, to spend the FLOPs of dense training.
        flops: Mean training FLOPs over those of dense training with the configuration's steps.
        memory: Mean peak memory over that of dense training.
        explored: Mean R_s.
        against: Difference of the test accuracy to the reference arm, paired by seed; None without one.
    """

    label: str
    pattern: str
    sparsity: float
    accuracy: Summary
    reached: float
    steps: int
    longer: bool
    flops: float
    memory: float
    explored: float
    against: Summary | None


def summarise_cells(cells: Mapping[Cell, Mapping[str, Any]], reference: Reference | None = None) -> list[Arm]:
    """One row per arm, pattern and sparsity, in order of appearance.

    Args:
        cells: Results by cell.
        reference: The arm that others are compared with, seed by seed; those that trained longer, with one that did.
    """
    groups: dict[tuple[str, str, float, bool], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.label, cell.pattern, cell.sparsity, cell.steps is not None), []).append(cell)
    twins = {(c.label, c.pattern, c.sparsity, c.seed, c.steps is not None): c for c in cells}
    arms = []
    for (label, pattern, sparsity, longer), members in groups.items():
        mean = {key: sum(float(cells[c][key]) for c in members) / len(members) for key in _MEANS}
        twin = None if reference is None else (reference.method, reference.pattern or pattern)
        paired = [
            cells[cell]["test_accuracy"] - cells[other]["test_accuracy"]
            for cell in members
            if twin is not None
            and twin != (label, pattern)
            and (other := twins.get((*twin, sparsity, cell.seed, longer))) is not None
        ]
        arms.append(
            Arm(
                label,
                pattern,
                sparsity,
                summarise([cells[cell]["test_accuracy"] for cell in members]),
                mean["sparsity"],
                round(mean["steps"]),
                longer,
                mean["flops"],
                mean["memory"],
                mean["explored"],
                summarise(paired) if paired else None,
            )
        )
    return arms


_MEANS = ("sparsity", "steps", "flops", "memory", "explored")


def lines(arms: Sequence[Arm]) -> list[tuple[str, ...]]:
    """The table's cells as text: accuracy in percent with its 95 % interval."""
    return [
        (
            arm.label,
            arm.pattern,
            f"{arm.sparsity:g}",
            f"{arm.reached:.3f}",
            _percent(arm.accuracy),
            "" if arm.against is None else _percent(arm.against, sign=True),
            str(arm.steps),
            f"{arm.flops:.3f}",
            f"{arm.memory:.3f}",
            f"{arm.explored:.3f}",
            str(arm.accuracy.count),
        )
        for arm in arms
    ]


def columns(reference: Reference | None = None) -> tuple[str, ...]:
    """The headings; `reference` as in `summarise_cells`."""
    name = "" if reference is None else f" {reference.method}{f' {reference.pattern}' if reference.pattern else ''}"
    return (
        "method",
        "pattern",
        "sparsity",
        "reached",
        "test accuracy %",
        f"against{name}",
        "steps",
        "FLOPs",
        "memory",
        "R_s",
        "seeds",
    )


def markdown(arms: Sequence[Arm], reference: Reference | None = None) -> str:
    """The table in Markdown."""
    rows = [columns(reference), tuple("---" for _ in columns()), *lines(arms)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _percent(summary: Summary, sign: bool = False) -> str:
    mean = f"{100 * summary.mean:{'+' if sign else ''}.2f}"
    return mean if summary.half_width is None else f"{mean} ± {100 * summary.half_width:.2f}"
