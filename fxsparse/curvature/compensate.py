"""OBS-compensated pruning of a trained model in one call."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.compensate_grams import Gram, InputGrams
from fxsparse.curvature.compensate_layer import (
    LayerProblem,
    LayerSolution,
    Solver,
    element_scores,
    grouped,
    solve_layer,
)
from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import MaskedWeight, check_mask_edit, masked_weights
from fxsparse.nn.masked import check_mask
from fxsparse.sparsity import Distribution, Global, Pattern, SharedSupport, Target, Uniform, WeightSpec
from fxsparse.sparsity.counts import check_count
from fxsparse.sparsity.grouping import support_order
from fxsparse.training.batches import call
from fxsparse.training.calibration import Calibration
from fxsparse.training.distributed import check_not_sharded, unwrap
from fxsparse.training.initial import start_from


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
    """

    damping: float = 0.01
    solver: Solver | None = None
    sequential: bool = True
    permute: bool = False
    block: int = 128
    rounds: int = 12
    min_samples: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise ConfigError(f"`damping` (={self.damping}) must be at least 0 and finite")
        if self.solver is not None and not isinstance(self.solver, Solver):
            raise ConfigError(f"`solver` (={self.solver!r}) must be Solver.EXACT, Solver.COLUMNS or None")
        check_count(self.block, "block", 1)
        check_count(self.rounds, "rounds", 1)
        if self.min_samples is not None:
            check_count(self.min_samples, "min_samples", 1)


UNIFORM, DEFAULT = Uniform(), Compensation()


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


def compensate(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    distribution: Distribution = UNIFORM,
    masks: Mapping[str, Tensor] | None = None,
    names: Iterable[str] | None = None,
    how: Compensation = DEFAULT,
) -> CompensationReport:
    """Prune a trained model and let the weights that stay make good what the others did.

    For each weight the second moments H = X X^T of its inputs are measured on the calibration data; a mask is chosen by
    what removing weights costs, w_Q ([H^-1]_QQ)^-1 w_Q^T / 2 (optimal brain surgeon), summed over the rows of a shared
    support; the alive weights become those whose outputs are closest to the present ones. Masks that the model has may
    change: dead weights count as zeros, which cost nothing to remove. A mask given by `masks` is taken as it is.

    Every masked weight that is multiplied by matrix products or convolutions can be compensated: linear layers, all
    kinds of convolutions, attention projections, functional uses. Gradients, other parameters, buffers, train/eval
    flags and random state are as before afterwards.

    Args:
        model: A model with masks, as `fxsparse.transform` returns it, trained.
        calibration: Batches, each `(inputs, targets)` or inputs alone; a tensor, a tuple of positional or a mapping of
            keyword arguments. Some hundred samples are usual.
        sparsity: Dead fraction in [0, 1) that the masks are chosen for.
        pattern: Which masks are legal; None = the pattern that each weight carries.
        distribution: How the sparsity is shared among the weights; `Global` ranks by OBS scores.
        masks: Instead of `sparsity`: the masks, by parameter name. `SharedSupport` masks bring their row order along.
        names: Weights to prune; all masked ones, or those of `masks`, by default.
        how: Settings of the solve.

    Returns:
        What was done to each weight, with its reconstruction error before and after.

    Raises:
        ConfigError: no masks, an unknown name, neither or both of `sparsity` and `masks`, a pattern or sparsity that a
            weight excludes, or a weight whose inputs are not known. Nothing has changed.
        DataError: no calibration data, too few of them, or inputs or weights that are not finite. Nothing has changed.

    >>> from fxsparse.nn import Linear
    >>> torch.manual_seed(0)
    <torch._C.Generator ...>
    >>> layer = Linear(8, 4)
    >>> report = compensate(layer, [torch.randn(64, 8)], sparsity=0.5)
    >>> report.layers[0].after < report.layers[0].before
    True
    """
    check_not_sharded(model)
    plan = _plan(unwrap(model), sparsity, pattern, distribution, masks, names, how)
    batches = tuple(calibration)
    if not batches:
        raise DataError("`calibration` (=none) must hold at least one batch of inputs")
    with Calibration(model, plan.weights, batches), plan.unmasked(), torch.no_grad():
        rows = tuple(plan.solve(batches))
    return CompensationReport(rows, len(batches))


def _plan(
    model: nn.Module,
    sparsity: float | None,
    pattern: Pattern | None,
    distribution: Distribution,
    masks: Mapping[str, Tensor] | None,
    names: Iterable[str] | None,
    how: Compensation,
) -> _Plan:
    if (sparsity is None) == (masks is None):
        raise ConfigError(f"give either `sparsity` (={sparsity}) or `masks`, which are then only compensated")
    known = masked_weights(model)
    if not known:
        raise ConfigError(f"`model` (={type(model).__name__}) has no masks; call fxsparse.transform on it first")
    wanted = list(names) if names is not None else list(known if masks is None else masks)
    if not wanted:
        raise ConfigError("`names` (=none) must name at least one masked weight")
    for name in (*wanted, *(masks or {})):
        if name not in known:
            raise ConfigError(f"`{name}` is not a masked parameter; there are {', '.join(known)}")
    if missing := [name for name in wanted if masks is not None and name not in masks]:
        raise ConfigError(f"`masks` lack `{missing[0]}`; give its mask, or leave it out of `names`")
    weights = {name: masked for name, masked in known.items() if name in wanted}
    patterns = {name: masked.spec.pattern if pattern is None else pattern for name, masked in weights.items()}
    for name, masked in weights.items():
        if bad := int((~masked.weight.isfinite()).sum()):
            raise DataError(f"`{name}` holds NaN or Inf (={bad} values); it cannot be pruned")
    orders = {} if masks is None else _row_orders(weights, patterns, masks)
    return _Plan(model, weights, patterns, sparsity, distribution, masks, orders, how)


def _row_orders(
    weights: Mapping[str, MaskedWeight], patterns: Mapping[str, Pattern], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The row orders in which given masks hold `SharedSupport`; every mask is checked."""
    orders = {}
    for name, masked in weights.items():
        pattern, mask, layout, order = patterns[name], masks[name], masked.spec.layout, masked.row_order
        spec = dataclasses.replace(masked.spec, pattern=pattern)
        if isinstance(pattern, SharedSupport) and mask.dtype is torch.bool and mask.shape == masked.weight.shape:
            found = support_order(mask, pattern.group, layout)
            order = order if found is None else found
        check_mask(name, masked.weight, spec, mask, order)
        if order is not None:
            orders[name] = order
    return orders


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is to be done; nothing is changed outside `unmasked`."""

    model: nn.Module
    weights: dict[str, MaskedWeight]
    patterns: dict[str, Pattern]
    sparsity: float | None
    distribution: Distribution
    masks: Mapping[str, Tensor] | None
    row_orders: Mapping[str, Tensor]
    how: Compensation

    @contextlib.contextmanager
    def unmasked(self) -> Iterator[None]:
        """Open the masks, so that values alone decide; after an error everything is as it was."""
        before = {name: (masked.mask.clone(), masked.weight.detach().clone()) for name, masked in self.weights.items()}
        for masked in self.weights.values():
            for module, _ in masked.owners:
                check_mask_edit(module)
        try:
            for masked in self.weights.values():
                masked.set_mask_(torch.ones_like(masked.mask))
            yield
        except BaseException:
            for name, (mask, value) in before.items():
                with torch.no_grad():
                    self.weights[name].weight.copy_(value)
                self.weights[name].set_mask_(mask)
            raise

    def solve(self, batches: tuple[Any, ...]) -> Iterator[CompensatedLayer]:
        """Solve the weights in the order of their use, then set all masks at once."""
        order = self._order(batches)
        targets = self._targets(batches)
        grams = {} if self.how.sequential else self._grams(order, batches)
        solutions: dict[str, LayerSolution] = {}
        rows = []
        for name in order:
            gram = grams.pop(name) if name in grams else self._grams([name], batches)[name]
            problem = self._problem(name, gram)
            solutions[name] = self._solved(name, problem, targets.get(name))
            if self.how.sequential:
                self.weights[name].weight.copy_(solutions[name].weight)
            rows.append(self._row(name, problem, solutions[name]))
        chosen = {name: solution.mask.to(self.weights[name].weight.device) for name, solution in solutions.items()}
        start_from(self.weights, chosen, self.patterns, {name: each.row_order for name, each in solutions.items()})
        for name, solution in solutions.items():
            self.weights[name].weight.copy_(solution.weight)
        yield from rows

    def _order(self, batches: tuple[Any, ...]) -> list[str]:
        found = InputGrams(self.weights, order_only=True)
        with found:
            call(self.model, _inputs(batches[0]))
        return [*found.order, *(name for name in self.weights if name not in found.order)]

    def _targets(self, batches: tuple[Any, ...]) -> dict[str, Target]:
        if self.sparsity is None:
            return {}
        specs = [
            WeightSpec(name, tuple(masked.weight.shape), masked.spec.layout, self.patterns[name])
            for name, masked in self.weights.items()
        ]
        scores = None
        if isinstance(self.distribution, Global):
            scores = {}
            for name in self.weights:
                problem = self._problem(name, self._grams([name], batches)[name])
                scores[name] = element_scores(problem, self.how.damping).to(problem.weight.device)
        return self.distribution.targets(specs, self.sparsity, scores)

    def _grams(self, names: Iterable[str], batches: tuple[Any, ...]) -> dict[str, Gram]:
        watched = {name: self.weights[name] for name in names}
        found = InputGrams(watched)
        with found:
            for batch in batches:
                call(self.model, _inputs(batch))
        return {name: found.gram(name) for name in watched}

    def _problem(self, name: str, gram: Gram) -> LayerProblem:
        masked = self.weights[name]
        return LayerProblem(masked.weight.detach(), gram, masked.spec.layout, self.patterns[name])

    def _solved(self, name: str, problem: LayerProblem, target: Target | None) -> LayerSolution:
        how, mask = self.how, None if self.masks is None else self.masks[name]
        order = self.row_orders.get(name, self.weights[name].row_order)
        try:
            self._check_samples(problem, mask, target)
            if target is not None and how.permute:
                found = grouped(problem, target, order, how.damping)
                order = order if found is None else found
            return solve_layer(
                problem,
                target,
                mask=mask,
                row_order=order,
                solver=how.solver,
                damping=how.damping,
                block=how.block,
                rounds=how.rounds,
            )
        except (ConfigError, DataError) as error:
            raise type(error)(f"`{name}`: {error}") from error

    def _check_samples(self, problem: LayerProblem, mask: Tensor | None, target: Target | None) -> None:
        alive = int(mask.sum()) if mask is not None else 0 if target is None else target.alive
        if alive == problem.weight.numel():
            return
        needed = self.how.min_samples or math.ceil(alive / len(problem.gram.of_row))
        if (fewest := min(problem.gram.samples)) < needed:
            raise DataError(
                f"`samples` (={fewest}) input vectors are too few to solve for {needed} weights of a row; give more "
                "calibration data, or set `min_samples` to let damping decide"
            )

    def _row(self, name: str, problem: LayerProblem, solution: LayerSolution) -> CompensatedLayer:
        return CompensatedLayer(
            name,
            tuple(problem.weight.shape),
            str(self.patterns[name]),
            int(solution.mask.sum()),
            min(problem.gram.samples),
            solution.solver,
            solution.before,
            solution.after,
        )


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch
