"""Compensated pruning, weight by weight: what is measured, what is solved, and the way back after an error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.arguments import shown
from fxsparse.curvature.compensate_grams import Gram, InputGrams
from fxsparse.curvature.compensate_layer import (
    LayerProblem,
    LayerSolution,
    element_scores,
    grouped,
    solve_layer,
)
from fxsparse.curvature.compensate_options import CompensatedLayer, Compensation
from fxsparse.errors import ConfigError, DataError, FxSparseError
from fxsparse.nn import MaskedWeight, check_mask_edit
from fxsparse.sparsity import Distribution, Global, Pattern, Target, WeightSpec
from fxsparse.training.batches import call
from fxsparse.training.initial import start_from


@dataclass(frozen=True, eq=False)
class CompensationPlan:
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
        self._run(found, batches[:1])
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
        self._run(found, batches)
        return {name: found.gram(name) for name in watched}

    def _run(self, found: InputGrams, batches: Iterable[Any]) -> None:
        """Watch the model on batches; raises DataError where it cannot run on one, watched or not."""
        for number, batch in enumerate(batches):
            try:
                with found:
                    call(self.model, _inputs(batch))
            except (FxSparseError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:
                self._check_runs(number, batch)
                raise

    def _check_runs(self, number: int, batch: Any) -> None:
        try:
            call(self.model, _inputs(batch))
        except Exception as error:
            raise DataError(
                f"`calibration` (={shown(batch)}, batch {number}) is no batch that the model can run on: "
                f"{type(error).__name__}: {error}"
            ) from error

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
