"""How compensated pruning solves, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxsparse.curvature.arguments import check_kinds, check_number
from fxsparse.curvature.compensate_layer import Solver
from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_count


@dataclass(frozen=True)
class Compensation:
    """How `compensate` solves.

    Attributes:
        damping: lambda over the mean of diag(H), for inputs that depend on each other.
        solver: How values are found on a mask; None = exact where the factorisations are cheap, else by columns.
        sequential: Each layer sees the inputs that the pruned layers before it give, at one pass over the data for
            each weight; False measures all inputs in one pass, before anything is pruned.
        permute: Put the rows of `SharedSupport` weights into groups that lose less together.
        block: Columns whose updates are made together in the sweep by columns.
        rounds: Steps in which shared positions are removed; more are slower and closer to one at a time.
        min_samples: Input vectors that a weight must have met; None = as many as a row keeps weights.

    Raises:
        ConfigError: an option out of range, or of another type.
    """

    damping: float = 0.01
    solver: Solver | None = None
    sequential: bool = True
    permute: bool = False
    block: int = 128
    rounds: int = 12
    min_samples: int | None = None

    def __post_init__(self) -> None:
        check_number(self.damping, "damping", 0)
        check_kinds(bool, sequential=self.sequential, permute=self.permute)
        if self.solver is not None and not isinstance(self.solver, Solver):
            raise ConfigError(f"`solver` (={self.solver!r}) must be Solver.EXACT, Solver.COLUMNS or None")
        check_count(self.block, "block", 1)
        check_count(self.rounds, "rounds", 1)
        if self.min_samples is not None:
            check_count(self.min_samples, "min_samples", 1)


@dataclass(frozen=True)
class CompensatedLayer:
    """One weight of a `CompensationReport`.

    Attributes:
        name: The parameter's name.
        shape: Its shape.
        pattern: Its pattern.
        alive: Alive elements.
        samples: Input vectors that it met, the fewest of all its rows.
        solver: How the values were found.
        before: ||(W - W M) X||^2 / ||W X||^2 of the mask alone, on the calibration data.
        after: The same with the compensated weights.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    alive: int
    samples: int
    solver: Solver
    before: float
    after: float

    @property
    def density(self) -> float:
        """Alive fraction in [0, 1]."""
        return self.alive / torch.Size(self.shape).numel()


@dataclass(frozen=True)
class CompensationReport:
    """What `compensate` did; `str()` of it is a table.

    Attributes:
        layers: In the order in which they were solved.
        batches: Calibration batches.
    """

    layers: tuple[CompensatedLayer, ...]
    batches: int

    def __str__(self) -> str:
        rows = [("weight", "shape", "pattern", "density", "inputs", "solved", "error, masked", "compensated")]
        for each in self.layers:
            shape = "x".join(map(str, each.shape))
            errors = (f"{each.before:.4f}", f"{each.after:.4f}")
            rows.append(
                (each.name, shape, each.pattern, f"{each.density:.4f}", str(each.samples), each.solver.value, *errors)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )
