"""Exact compaction: channels that are dead, or constant, are taken out of a model that computes the same without them.

1. The model, masks folded, is recorded as an operator graph; its channels and its constants are found.
2. The largest set of channels that nobody misses is solved for; constants are folded into the next bias.
3. Parameters, buffers and masks are shortened, stated sizes follow, and the outputs are compared in float64. What
   differs or fails is searched out by halves and left alone, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import CaptureError, DataError, FxSparseError, PassError
from fxsparse.graph import isolated_clone, split_inputs
from fxsparse.graph.channels import Channels
from fxsparse.graph.mishaps import mishap
from fxsparse.passes.compact_analysis import channels_of, recorded, solver_of
from fxsparse.passes.compact_apply import shorten
from fxsparse.passes.compact_blocks import solve_in_blocks
from fxsparse.passes.compact_classes import Place
from fxsparse.passes.compact_shapes import rewrite
from fxsparse.passes.compact_solve import NOTHING, Solution, Solver
from fxsparse.passes.compact_verify import difference, outputs, own_tensors, owned_copy, release, run_copy, sweep
from fxsparse.passes.compact_widen import worth_streaming

TOLERANCE = 1e-12
"""Permitted difference of an output in float64, relative to its largest value."""
_NATIVE = 2.0**12  # units in the last place of the output's scale, where a model cannot run in float64
_ATTEMPTS = 48

Cluster = tuple[Place, ...]


@dataclass(frozen=True)
class Refused:
    """Dimensions that were left whole, because the model did not run, or not equally, without the dead channels.

    No places means all.
    """

    places: Cluster
    reason: str

    def __str__(self) -> str:
        shown = ", ".join(f"{name}[{dim}]" for name, dim in self.places[:3])
        more = f" and {len(self.places) - 3} more" if len(self.places) > 3 else ""
        return f"{shown or 'everything'}{more} left whole: {self.reason}"


@dataclass(frozen=True, eq=False)
class Compacted:
    """A compacted model.

    Attributes:
        module: the model, with tensors of its own.
        solution: what was removed.
        channels: the analysis; None where it failed.
        refused: what was left whole after a failed comparison.
        loosened: masks that became unstructured because their pattern does not fit the shorter weight.
        dtype: the dtype of the comparison; None = the model's own.
        worst: largest difference of an output found, relative to its scale.
        notes: what was found in train mode, and what could not be compared.
    """

    module: nn.Module
    solution: Solution
    channels: Channels | None = field(repr=False, default=None)
    refused: tuple[Refused, ...] = ()
    loosened: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    worst: float = 0.0
    notes: tuple[str, ...] = ()


def compact_channels(
    model: nn.Module,
    folded: nn.Module,
    example_inputs: Any,
    only: Mapping[Place, Sequence[int]] | None = None,
    channels: Channels | None = None,
    *,
    blocks: bool = False,
) -> Compacted:
    """Take the channels out of `model` that `folded`, the same model without masks, shows to be superfluous.

    Both stay as they are. An error inside the analysis leaves the dimension that it was about whole, or everything,
    with a warning.

    Args:
        model: the model, with masks or without.
        folded: the same without masks.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``.
        only: the only indices of dimensions that may go; None = all.
        channels: the channels, where they have been analysed.
        blocks: whether 2-d convolutions keep whole blocks of channels, dead ones among them (see `solve_in_blocks`).

    Raises:
        CaptureError: when the model cannot be run.
        DataError: when its outputs are not finite, so that nothing can be compared.
        PassError: when the model does not repeat itself.
    """
    args, kwargs = split_inputs(example_inputs)
    graph = recorded(folded, example_inputs) if channels is None else channels.graph
    try:
        found = channels or channels_of(folded, example_inputs, graph)
        solver = solver_of(folded, found, only)
        del folded  # the search needs no second copy of the model
        sweep(model)
        return _Search(model, solver, args, kwargs, blocks).run()
    except FxSparseError:
        raise
    except Exception as error:
        return Compacted(owned_copy(model), NOTHING, refused=(Refused((), mishap("the analysis", error)),))


class _Search:
    def __init__(
        self, model: nn.Module, solver: Solver, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: bool = False
    ) -> None:
        self.model, self.solver, self.inputs, self.blocks = model, solver, (args, kwargs), blocks
        self.filling = 0  # superfluous channels that stay to fill blocks
        self.dtype: torch.dtype | None = torch.float64
        self.writes = False  # whether a run writes into parameters
        self.streamed = worth_streaming(model)  # whether large parameters are cast operator by operator
        self.expected: list[Tensor] = []
        self.attempts, self.worst = 0, 0.0
        self.equal: Solution | None = None  # the last one that was found equal
        self.trained: list[Tensor] | str = ""
        self.train_note = ""
        self.refused: list[Refused] = []

    def _refer(self) -> None:
        """Run the model in float64 where it can, else in its own precision, in both modes."""
        wide = self._wide()
        try:
            self.expected = self._outputs(wide, False)
        except Exception:  # whatever a model raises that fixes its dtype
            if self.streamed:
                raise
            self.dtype = None
            release(wide)
            wide = self._wide()
            self.expected = self._again(wide)
        self._check_finite()
        try:
            self.trained = self._outputs(wide, True)
        except Exception as error:  # a model may have no train mode for these inputs
            self.trained = f"train mode: the model itself raises {type(error).__name__}"
        release(wide)

    def _unsteady(self) -> float:
        """By how much two runs of one copy of the model differ; 0 where that is rounding."""
        wide = self._wide()
        first = self._again(wide)
        worst = max(difference(self.expected, first), difference(first, self._again(wide)))
        release(wide)
        return 0.0 if worst <= self._allowed() else worst

    def _check_finite(self) -> None:
        for index, output in enumerate(self.expected):
            if output.is_floating_point() and not bool(torch.isfinite(output).any()) and output.numel():
                raise DataError(f"output {index} holds no finite number, so equality cannot be shown: mend the model")

    def _wide(self, solution: Solution = NOTHING) -> nn.Module:
        """A copy of the model in the precision of the comparison, to which the solution can be applied."""
        if self.streamed and self.dtype is not None:
            return run_copy(self.model, self.dtype, written(solution))
        return owned_copy(self.model, self.dtype)

    def _again(self, model: nn.Module) -> list[Tensor]:
        """Outputs in eval mode of a model that has run before."""
        try:
            return self._outputs(model, False)
        except Exception as error:
            raise CaptureError(f"the model does not run twice: {type(error).__name__}: {_first_line(error)}") from error

    def _outputs(self, model: nn.Module, training: bool) -> list[Tensor]:
        return outputs(model, *self.inputs, training, self.dtype, self.writes)

    def run(self) -> Compacted:
        """Solve, try, and search for what fails."""
        solution = self._solved()
        if not solution.kept:
            return self._finish(solution)
        error = self._first(solution)
        if error is None:
            return self._finish(solution)
        clusters = solution.clusters
        accepted: list[Cluster] = []
        if len(clusters) == 1:
            self.refused.append(Refused(clusters[0], error))
        else:
            middle = len(clusters) // 2
            self._grow(clusters[:middle], clusters, accepted)
            self._grow(clusters[middle:], clusters, accepted)
        return self._finish(self.equal or dataclasses.replace(NOTHING, blocked=solution.blocked))

    def _solved(self) -> Solution:
        if not self.blocks:
            return self.solver.solve()
        solution, self.filling = solve_in_blocks(self.solver)
        return solution

    def _first(self, solution: Solution) -> str | None:
        """Run the model, and try all at once; with a wide copy of all parameters where it fails without."""
        if self.streamed:
            with suppress(Exception):  # whatever it is, it comes again where it was not for the casts
                self._refer()
                if self._attempt(solution) is None:
                    return None
            self.streamed = False
        worst = 0.0
        for self.writes in (False, True):
            self.attempts = 0
            self._refer()
            error = self._attempt(solution)
            # equal outputs show that the model repeats itself as well; others may be its own doing
            if error is None or not (worst := self._unsteady()):
                return error
        raise PassError(f"compact: the model does not repeat itself from the same seed (by {worst:.3g})")

    def _allowed(self) -> float:
        if self.dtype is not None:
            return TOLERANCE
        found = [output.dtype for output in self.expected if output.is_floating_point()]
        return _NATIVE * max((torch.finfo(dtype).eps for dtype in found), default=0.0)

    def _grow(self, candidates: Sequence[Cluster], clusters: Sequence[Cluster], accepted: list[Cluster]) -> None:
        """Add those of the candidates that keep the model equal."""
        if not candidates:
            return
        if self.attempts >= _ATTEMPTS:
            self.refused += [Refused(cluster, "not tried: too many others failed") for cluster in candidates]
            return
        error = self._attempt_with([*accepted, *candidates], clusters)
        if error is None:
            accepted.extend(candidates)
        elif len(candidates) == 1:
            self.refused.append(Refused(candidates[0], error))
        else:
            middle = len(candidates) // 2
            self._grow(candidates[:middle], clusters, accepted)
            self._grow(candidates[middle:], clusters, accepted)

    def _attempt_with(self, chosen: Sequence[Cluster], clusters: Sequence[Cluster]) -> str | None:
        """The same for the most that can go when all other clusters stay."""
        wanted = {place for cluster in chosen for place in cluster}
        try:
            solution = self.solver.solve({place for cluster in clusters for place in cluster} - wanted)
        except Exception as error:
            return mishap("the search for what can go", error)
        return self._attempt(solution)

    def _attempt(self, solution: Solution) -> str | None:
        """Why the model is not equal without these channels; None where it is."""
        self.attempts += 1
        candidate = self._wide(solution)
        try:
            return self._tried(candidate, solution)
        finally:
            release(candidate)

    def _tried(self, candidate: nn.Module, solution: Solution) -> str | None:
        try:
            self._shorten(candidate, solution)
        except Exception as error:
            return mishap("the shortening", error)
        try:
            worst = difference(self.expected, self._outputs(candidate, False))
        except Exception as error:  # whatever the shortened model raises
            return f"{type(error).__name__} ({_first_line(error)})"
        if not worst <= self._allowed():
            return f"the outputs differ by {worst:.3g}"
        if isinstance(self.trained, list):
            try:
                found = self._outputs(candidate, True)
            except Exception as error:
                return f"train mode: {type(error).__name__} ({_first_line(error)})"
            self.train_note = self._train_note(self.trained, found)
        self.worst, self.equal = worst, solution
        return None

    def _train_note(self, expected: list[Tensor], found: list[Tensor]) -> str:
        """How the two behave in train mode, where constants may be others."""
        try:
            worst = difference(expected, found)
        except PassError as error:
            return f"train mode: {error}"
        if worst <= 1e3 * self._allowed():
            return "train mode: equal"
        return (
            f"train mode: outputs differ by {worst:.3g} of their scale: constants are those of eval mode there (batch "
            "statistics), or random numbers are drawn for fewer channels"
        )

    def _shorten(self, model: nn.Module, solution: Solution) -> tuple[str, ...]:
        rewrite(model, self.solver.channels, solution.removed)
        return shorten(model, solution.kept, solution.folds, solution.merges)

    def _finish(self, solution: Solution) -> Compacted:
        module, loosened = isolated_clone(self.model, copied=written(solution)), tuple[str, ...]()
        try:
            loosened = self._shorten(module, solution) if solution.kept else ()
            own_tensors(module, self.model)
        except Exception as error:
            self.refused = [Refused((), mishap("the last shortening", error))]
            module, solution = owned_copy(self.model), NOTHING
        notes: tuple[str, ...] = ()
        if solution.kept:
            notes = (self.trained if isinstance(self.trained, str) else self.train_note,)
            if self.dtype is None:
                notes = (*notes, "the model does not run in float64; it was compared in its own precision")
        if self.filling:
            said = "onnxruntime convolves blocks of 16 (8) channels"
            notes = (*notes, f"{self.filling} superfluous channels stay, as zeros: {said}")
        return Compacted(
            module=module,
            solution=solution,
            channels=self.solver.channels,
            refused=tuple(self.refused),
            loosened=loosened,
            dtype=self.dtype,
            worst=self.worst,
            notes=notes,
        )


def written(solution: Solution) -> set[str]:
    """The parameters into which constants are folded before anything is shortened."""
    return {*solution.folds, *(merge.weight for merge in solution.merges)}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else "no message"
