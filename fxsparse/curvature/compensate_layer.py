"""One layer: which weights die by what its outputs lose, and what the others become."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from fxsparse.curvature.compensate_elements import best_of_segments, eliminate_elements
from fxsparse.curvature.compensate_grams import Gram
from fxsparse.curvature.compensate_solve import by_columns, change, damped, inverse, obs_scores, restricted
from fxsparse.curvature.compensate_supports import SharedUnits, eliminate
from fxsparse.errors import ConfigError
from fxsparse.sparsity import Layout, Pattern, Pooling, Target, Units
from fxsparse.sparsity.n_by_m import GroupUnits
from fxsparse.sparsity.shared_support import SupportUnits
from fxsparse.sparsity.units import SliceUnits
from fxsparse.training.regroup import new_row_order

_CHEAP = 2e12  # multiply-adds of all factorisations of a layer up to which every row has some of its own


class Solver(enum.Enum):
    """How the alive weights of a given mask are found."""

    EXACT = "exact"
    """Restricted least squares in float64: nothing on this mask is closer to the outputs."""
    COLUMNS = "by columns"
    """The sweep over the columns of SparseGPT: cheaper where every row has a support of its own."""


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """A weight, what it was multiplied by, and which masks are legal.

    Attributes:
        weight: Its effective values, of its shape; dead entries 0.
        gram: What it was multiplied by.
        layout: Its output and input axes.
        pattern: Its legal masks.
    """

    weight: Tensor
    gram: Gram
    layout: Layout
    pattern: Pattern

    @property
    def rows(self) -> Float64[Tensor, "rows n"]:
        """The weight as rows, in float64."""
        return self.layout.to_rows(self.weight.detach().double()).flatten(1).to(self.gram.matrices.device)

    def shaped(self, rows: Tensor) -> Tensor:
        """Rows in the weight's shape."""
        sizes = self.layout.matrix_shape(self.weight.shape)
        return self.layout.from_rows(rows.reshape(sizes), self.weight.shape)


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """What a layer becomes.

    Attributes:
        mask: Bool, of the weight's shape.
        weight: The new values, float64, of the weight's shape.
        row_order: The row order of a `SharedSupport` mask, or None for the one that the weight has.
        solver: How the values were found.
        before: ||(W - W M) X||^2 / ||W X||^2: the mask alone.
        after: ||(W - V) X||^2 / ||W X||^2: with the new values.
    """

    mask: Bool[Tensor, "*shape"]
    weight: Float64[Tensor, "*shape"]
    row_order: Int64[Tensor, " rows"] | None
    solver: Solver
    before: float
    after: float


def solve_layer(
    problem: LayerProblem,
    target: Target | None,
    *,
    mask: Bool[Tensor, "*shape"] | None = None,
    row_order: Tensor | None = None,
    solver: Solver | None = None,
    damping: float = 0.01,
    block: int = 128,
    rounds: int = 12,
) -> LayerSolution:
    """Choose a mask by OBS costs unless one is given, and compensate.

    Args:
        problem: The layer.
        target: What it should keep, where no mask is given.
        mask: A mask to compensate.
        row_order: The row order of a `SharedSupport` mask.
        solver: None = exact where that is cheap.
        damping: lambda over the mean of diag(H).
        block: Columns whose updates are made together.
        rounds: Steps in which shared units are removed.

    Raises:
        ConfigError: neither target nor mask, or a pattern that does not fit.
        DataError: H is not positive definite.
    """
    weight, of_row = problem.rows, problem.gram.of_row
    gram = damped(problem.gram.matrices, damping)
    order = None if row_order is None else row_order.to(weight.device)
    if mask is not None:
        chosen = problem.layout.to_rows(mask).flatten(1).to(weight.device)
    elif target is not None:
        chosen = _chosen(problem, weight, gram, target, order, block, rounds)
    else:
        raise ConfigError("`target` (=None) must be given where `mask` is not")
    solver = _fitting(chosen) if solver is None else solver
    if bool(chosen.all()):
        new = weight
    elif solver is Solver.EXACT:
        new = restricted(weight, gram, of_row, chosen)
    else:
        new = _swept(weight, gram, of_row, chosen, block)
    scale = change(weight, torch.zeros_like(weight), problem.gram.matrices, of_row)
    before = change(weight, torch.where(chosen, weight, 0.0), problem.gram.matrices, of_row)
    after = change(weight, new, problem.gram.matrices, of_row)
    return LayerSolution(
        problem.shaped(chosen),
        problem.shaped(new),
        row_order,
        solver,
        before / scale if scale else 0.0,
        after / scale if scale else 0.0,
    )


def _swept(weight: Tensor, gram: Tensor, of_row: Tensor, mask: Tensor, block: int) -> Float64[Tensor, "rows n"]:
    """The sweep by columns; where it ends farther off than the mask alone, which it can, a row keeps its values."""
    swept, _ = by_columns(weight, gram, of_row, lambda _, places: mask[:, places], block=block)
    plain, worse = torch.where(mask, weight, 0.0), torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    for place, matrix in enumerate(gram):
        own = of_row == place
        costs = [((rows[own] @ matrix) * rows[own]).sum(1) for rows in (weight - swept, weight - plain)]
        worse[own] = costs[0] > costs[1]
    return torch.where(worse[:, None], plain, swept)


def element_scores(problem: LayerProblem, damping: float) -> Float64[Tensor, "*shape"]:
    """The OBS score of every element alone, of the weight's shape."""
    inverses = inverse(damped(problem.gram.matrices, damping))
    return problem.shaped(obs_scores(problem.rows, inverses, problem.gram.of_row))


def _chosen(
    problem: LayerProblem,
    weight: Tensor,
    gram: Tensor,
    target: Target,
    row_order: Tensor | None,
    block: int,
    rounds: int,
) -> Bool[Tensor, "rows n"]:
    """The mask, as rows: by shared elimination, by columns, or by the scores of single elements."""
    units = problem.pattern.units(problem.weight.shape, problem.layout, row_order)
    if units.is_dense(target):
        return torch.ones_like(weight, dtype=torch.bool)
    shared = SharedUnits.of(units, problem.layout, weight.device)
    if shared is not None and (len(shared.segment) > units.segments or shared.positions.shape[2] > 1):
        counts = units.counts(target)
        return eliminate(weight, gram, problem.gram.of_row, shared, int(counts[0]), rounds)
    scores = obs_scores(weight, inverse(gram), problem.gram.of_row)
    if _whole_rows(units, problem.layout):  # nothing is left in a row to make good what it loses: w H w
        scores = torch.zeros_like(weight)
        for place, matrix in enumerate(gram):
            own = problem.gram.of_row == place
            scores[own] = ((weight[own] @ matrix) * weight[own]).sum(1, keepdim=True) / (2 * weight.shape[1])
    first = problem.pattern.mask(problem.shaped(scores), target, problem.layout, Pooling.MEAN, row_order)
    chosen = problem.layout.to_rows(first).flatten(1)
    single = isinstance(units, GroupUnits) or units.segments * units.width == units.numel
    if not single or getattr(problem.pattern, "exact", True) is False:
        return chosen
    segment = _segments(units, problem.layout, weight.device)
    if len(weight) * float(weight.shape[1]) ** 3 <= _CHEAP:
        counts = units.counts(target).to(weight.device)
        return eliminate_elements(weight, gram, problem.gram.of_row, segment, counts, rounds)
    order = segment[0].sort(stable=True).indices
    select = units.width if isinstance(units, GroupUnits) else max(1, min(block, weight.shape[1] // 16))
    _, found = by_columns(
        weight, gram, problem.gram.of_row, _chooser(chosen, segment), block=block, select=select, order=order
    )
    return found


def _whole_rows(units: Units, layout: Layout) -> bool:
    return isinstance(units, SliceUnits) and units.axis == layout.out_axis


def _segments(units: Units, layout: Layout, device: torch.device) -> Int64[Tensor, "rows n"]:
    numbers = torch.arange(units.segments, device=device)[:, None].expand(-1, units.width)
    return layout.to_rows(units.spread(numbers)).flatten(1)


def _chooser(
    first: Bool[Tensor, "rows n"], segment: Int64[Tensor, "rows n"]
) -> Callable[[Tensor, Tensor], Bool[Tensor, "rows columns"]]:
    """As many alive in every segment, among the columns at hand, as `first` has there; the best by present scores."""

    def choose(scores: Tensor, places: Tensor) -> Tensor:
        numbers, of = torch.unique(segment[:, places], return_inverse=True)
        counts = torch.zeros(len(numbers), dtype=torch.int64, device=of.device)
        counts.index_add_(0, of.flatten(), first[:, places].flatten().long())
        return best_of_segments(scores, of, counts)

    return choose


def _fitting(mask: Bool[Tensor, "rows n"]) -> Solver:
    supports = torch.unique(mask, dim=0)
    work = float((supports.sum(1).double() ** 3).sum()) / 3
    return Solver.EXACT if work <= _CHEAP else Solver.COLUMNS


def grouped(
    problem: LayerProblem, target: Target, row_order: Tensor | None, damping: float
) -> Int64[Tensor, " rows"] | None:
    """A row order in which the groups of a `SharedSupport` weight lose less, or None where the present one stays."""
    units = problem.pattern.units(problem.weight.shape, problem.layout, row_order)
    if not isinstance(units, SupportUnits) or units.is_dense(target):
        return None
    roots = element_scores(problem, damping).sqrt()  # whose squares are what each element costs
    return new_row_order(units, roots, int(units.counts(target)[0]), Pooling.RMS)
