"""A plan of the channels that go: to be read, and carried out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxsparse.errors import PassError
from fxsparse.passes.compact_again import again, state_of
from fxsparse.passes.compact_channels import Compacted, compact_channels
from fxsparse.passes.compact_classes import Place
from fxsparse.passes.compact_verify import owned_copy
from fxsparse.planning.compaction import Moves, captured_form, check_compactable, folded_form
from fxsparse.planning.prune_budgets import Budget
from fxsparse.planning.prune_groups import Excluded, Indices, zero_
from fxsparse.planning.table import format_table


@dataclass(frozen=True)
class PlannedGroup:
    """What a plan does to one channel group.

    Attributes:
        id: the group's number.
        places: what gets shorter: (parameter or buffer, dimension).
        channels: how many channels it has.
        removed: those that go, by number, ascending.
        highest_removed: the highest score of a channel that goes; None where none goes.
        lowest_kept: the lowest score of a channel that stays.
    """

    id: int
    places: tuple[Place, ...]
    channels: int
    removed: tuple[int, ...]
    highest_removed: float | None
    lowest_kept: float

    @property
    def kept(self) -> int:
        """Channels that stay."""
        return self.channels - len(self.removed)

    @property
    def row(self) -> tuple[str, ...]:
        """Its cells in the table of a plan."""
        shown = ", ".join(f"{name}[{dim}]" for name, dim in self.places[:3])
        more = f" and {len(self.places) - 3} more" if len(self.places) > 3 else ""
        highest = "-" if self.highest_removed is None else f"{self.highest_removed:.3g}"
        return str(self.id), str(self.channels), str(self.kept), highest, f"{self.lowest_kept:.3g}", shown + more


@dataclass(frozen=True, eq=False)
class Trial:
    """A plan carried out on a copy and found to be exact.

    Attributes:
        state: of the model and its inputs then, as `state_of` tells it.
        found: what was removed, without the module.
    """

    state: str
    found: Compacted = field(repr=False)


@dataclass(frozen=True, eq=False)
class ChannelPlan:
    """Which channels of a model go, decided but not done; `str()` of it is a table.

    Attributes:
        groups: every channel group that may be pruned.
        removed: what goes: (parameter or buffer, dimension) -> indices, ascending.
        budget: the budget that the plan meets.
        cost: what the budget counts, before and after.
        parameters: elements of all parameters, before and after.
        macs: multiply-accumulates of products with weights on the example inputs, before and after.
        excluded: channel groups that stay whole, with reasons.
        model: the model that was planned.
        example_inputs: the example inputs.
        spared: of `removed`, directions of normalised weights, which go but cannot become zero.
        specialize: whether the model became a graph for inputs like the example's only.
        norms: whether features of layer norms were free to go, because the rest could not meet the budget.
        trial: what the plan was found to do to the model; None where nothing goes.
    """

    groups: tuple[PlannedGroup, ...]
    removed: Indices
    budget: Budget
    cost: tuple[float, float]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    excluded: tuple[Excluded, ...]
    model: nn.Module = field(repr=False)
    example_inputs: Any = field(repr=False)
    spared: frozenset[Place] = frozenset()
    specialize: bool = False
    norms: bool = False
    trial: Trial | None = field(default=None, repr=False)

    def masked(self) -> nn.Module:
        """A copy of the model in which everything that goes with the planned channels is zero, at the old sizes.

        What `apply` returns computes the same.

        Raises:
            ConfigError: the model has other parameters or sizes than when it was planned.
        """
        result = owned_copy(captured_form(self.model, self.example_inputs, self.specialize))
        zero_(result, self.removed, self.spared)
        return result

    def apply(
        self, optimizer: Optimizer | None = None, *, followers: nn.Module | Iterable[nn.Module] = ()
    ) -> nn.Module:
        """Take the channels out, with the values that the model has now; the model stays as it is.

        What the plan was shown to do is not shown anew where the model and the inputs are as they were then.

        Args:
            optimizer: any torch.optim optimizer of the model's parameters; it is moved to the result as by `compact`.
            followers: averages of the model, which lose the same channels, as by `compact`.

        Returns:
            A smaller model that trains on, as `compact` returns one; `compaction_report` tells what was done. In eval
            mode it equals `masked()` in float64 to 1e-12 of the outputs' scale.

        Raises:
            ConfigError: the model has other parameters or sizes than when it was planned, or the optimizer or a
                follower does not fit.
            CaptureError, DataError: as `compact`.
            PassError: something that was planned cannot go any more.
        """
        check_compactable(self.model)
        moves = Moves(self.model, self.example_inputs, optimizer, followers, self.specialize)
        trial = self.trial
        same = trial is not None and trial.state == state_of(self.model, self.example_inputs)
        masked = self.masked()
        if same and trial is not None:
            found = again(masked, trial.found)
        else:
            found = compact_channels(masked, folded_form(masked), self.example_inputs, only=self.removed)
        left = left_whole(found, self.removed)
        if left:
            name, dim = left[0]
            reasons = "; ".join(map(str, found.refused)) or "something needs it"
            raise PassError(f"prune_channels: `{name}`[{dim}] was planned to be shorter, but {reasons}; plan anew")
        return moves.finish(found, partial(zero_, removed=self.removed, spared=self.spared))

    def __str__(self) -> str:
        header = ("group", "channels", "kept", "highest score removed", "lowest kept", "dimensions")
        rows = [group.row for group in self.groups if group.removed]
        lines = [format_table(header, rows) if rows else "no channel goes"]
        whole = len(self.groups) - len(rows)
        lines += [f"{whole} further groups keep all their channels"] if whole else []
        lines += [f"{len(self.excluded)} groups stay whole, `explain()` says why"] if self.excluded else []
        unit = "" if self.budget.unit in ("parameters", "MACs") else self.budget.unit
        pairs = [("parameters", self.parameters), ("MACs", self.macs), *([(unit, self.cost)] if unit else [])]
        lines += [f"{name}: {_number(a)} -> {_number(b)} ({b / a if a else 1:.1%})" for name, (a, b) in pairs]
        lines.append(f"budget: at most {self.budget.density:.1%} of the {self.budget.unit} stay")
        lines += ["layer norms that lose features count them as zeros (`SizedLayerNorm`)"] if self.norms else []
        lines += ["what `apply` returns takes inputs like the example's only (`specialize`)"] if self.specialize else []
        return "\n".join(lines)

    def explain(self) -> str:
        """The table, why groups stay whole, and the indices that every dimension loses."""
        lines = [str(self), "", *map(str, self.excluded), ""]
        lines += [f"{name}[{dim}] loses {_runs(indices)}" for (name, dim), indices in self.removed.items()]
        return "\n".join(lines).strip()


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _runs(indices: Sequence[int]) -> str:
    """``0-3, 7`` for (0, 1, 2, 3, 7)."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def left_whole(found: Compacted, removed: Indices) -> list[Place]:
    """The dimensions that did not get as short as planned."""
    assert found.channels is not None or found.refused
    kept = found.solution.kept
    return [
        place for place, indices in removed.items() if place not in kept or set(indices) & set(kept[place].tolist())
    ]
