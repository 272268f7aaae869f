"""Percolation: a fixed energy of perturbation, on fewer and more important groups; which are stressed, what it costs.

The predicted risk of a group is R_g = mean F_g |delta_g|^2 / 2; a group is stressed where R_g reaches a threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from jaxtyping import Float64
from torch import Generator, Tensor, nn

from fxsparse.curvature.arguments import (
    check_callable,
    check_integer,
    check_kind,
    check_kinds,
    check_listed,
    check_number,
)
from fxsparse.curvature.damage_compare import spearman
from fxsparse.curvature.damage_tensors import check_tensors
from fxsparse.curvature.percolation_groups import GroupTable, kept_tensors
from fxsparse.curvature.percolation_rules import (
    Direction,
    Energy,
    Pick,
    concentrated,
    group_energies,
    member,
    perturbation,
    picked,
)
from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity.counts import check_count
from fxsparse.sparsity.random import generator as keyed_generator

Loss = Callable[[], float | Tensor]
"""The model's loss on held-out batches, as it is now: a number, or a tensor of one."""
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Shock:
    """One perturbation and what it did.

    Attributes:
        concentration: C.
        groups: Numbers of the k groups that were perturbed.
        risks: R_g of every group; 0 where nothing was perturbed.
        stressed: The share of all groups whose risk reaches the threshold.
        predicted: The sum of R_g.
        measured: Change of the loss: of theta + delta, or the mean of both signs; NaN where nothing was measured.
        norm: |delta|.
    """

    concentration: float
    groups: tuple[int, ...]
    risks: Float64[Tensor, " groups"]
    stressed: float
    predicted: float
    measured: float
    norm: float


@dataclass(frozen=True, eq=False)
class PercolationCurve:
    """Shocks over concentrations, and their means over repeats.

    Attributes:
        shocks: All of them.
        concentrations: The grid.
        stressed: Mean stressed share at each concentration.
        predicted: Mean predicted change of the loss.
        measured: Mean measured change.
        standard_errors: Of the measured means over repeats; NaN for a single one.
        crossing: The smallest concentration whose stressed share is at least half of the largest.
    """

    shocks: tuple[Shock, ...]
    concentrations: tuple[float, ...]
    stressed: tuple[float, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    standard_errors: tuple[float, ...]
    crossing: float


@dataclass(frozen=True)
class Percolation:
    """The experiment.

    Attributes:
        budget: |delta|; with `relative` a share of the norm of the eligible weights.
        threshold: tau, the risk from which a group counts as stressed.
        pick: Which groups are perturbed.
        temperature: T of `Pick.SAMPLE`, p_g proportional to F_g^(1/T).
        mean_fisher: Rank groups by their mean Fisher, not by its sum.
        energy: How the budget is shared among the groups.
        direction: Along what each group moves.
        antithetic: Measure both signs and take the mean, which cancels the gradient's term that risks leave out.
        relative: Whether the budget is a share.
        seed: Seed of all draws.

    Raises:
        ConfigError: an option out of range, or of another type.
    """

    budget: float
    threshold: float
    pick: Pick = Pick.TOPK
    temperature: float = 1.0
    mean_fisher: bool = False
    energy: Energy = Energy.EQUAL
    direction: Direction = Direction.GAUSSIAN
    antithetic: bool = True
    relative: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self.budget, "budget", 0, above=True)
        check_number(self.threshold, "threshold", 0)
        check_number(self.temperature, "temperature", 0, above=True)
        check_integer(self.seed, "seed")
        check_kinds(bool, mean_fisher=self.mean_fisher, antithetic=self.antithetic, relative=self.relative)
        for name, kind in (("pick", Pick), ("energy", Energy), ("direction", Direction)):
            object.__setattr__(self, name, member(kind, getattr(self, name), name))

    def shock(
        self,
        model: nn.Module,
        table: GroupTable,
        concentration: float,
        loss: Loss | None = None,
        *,
        repeat: int = 0,
        gradient: Mapping[str, Tensor] | None = None,
    ) -> Shock:
        """Perturb once, measure, and put every parameter and buffer back bit by bit, also after an exception.

        Args:
            model: The model; it is perturbed in place while `loss` runs.
            table: The groups with their Fisher.
            concentration: C in (0, 1]: the share of groups that carry the energy, at least one.
            loss: Where the change of the loss is to be measured.
            repeat: Number of the repeat, part of the key of all draws.
            gradient: dL/dw by name, for `Direction.GRADIENT`.

        Raises:
            ConfigError: a concentration out of range, no gradient where it is needed, a loss that is no number, or an
                argument of another type.
            DataError: a chosen group has no energy of its own: nothing alive, zero weights or a zero gradient.
        """
        check_count(repeat, "repeat", 0)
        _check_concentration(concentration)
        _check_experiment(model, table, loss, gradient)
        source = keyed_generator(self.seed, repeat, round(concentration * 2**20), "percolation")
        chosen = self._chosen(table, concentration, source)
        delta, squares = self._delta(model, table, chosen, source, gradient)
        risks = table.risks(delta)
        measured = float("nan") if loss is None else self._measured(model, delta, loss)
        stressed = self._stressed(risks)
        norm = float(squares.sum().sqrt())
        return Shock(concentration, tuple(chosen.tolist()), risks, stressed, float(risks.sum()), measured, norm)

    def predicted(self, table: GroupTable, concentration: float) -> tuple[float, float]:
        """(S, predicted change) of isotropic perturbations, without a model: R_g = mean F_g e_g / 2.

        Raises:
            ConfigError: a budget relative to weights, a concentration out of range, or no table.
        """
        if self.relative:
            raise ConfigError("`relative` (=True) needs the model's weights; call `shock`")
        check_kind(table, "table", GroupTable)
        _check_concentration(concentration)
        source = keyed_generator(self.seed, 0, round(concentration * 2**20), "percolation")
        chosen = self._chosen(table, concentration, source)
        risks = torch.zeros(table.count, dtype=torch.float64)
        risks[chosen] = 0.5 * table.means[chosen] * group_energies(self.energy, table.alive[chosen], self.budget**2)
        return self._stressed(risks), float(risks.sum())

    def curve(
        self,
        model: nn.Module,
        table: GroupTable,
        loss: Loss | None = None,
        concentrations: Sequence[float] = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0),
        repeats: int = 1,
        *,
        gradient: Mapping[str, Tensor] | None = None,
    ) -> PercolationCurve:
        """Shocks over a grid of concentrations, `repeats` of each.

        Raises:
            ConfigError: as `shock`, an empty grid or no repeats.
        """
        check_count(repeats, "repeats", 1)
        concentrations = check_listed(concentrations, "concentrations", Real)
        if not concentrations:
            raise ConfigError("`concentrations` (=()) must hold at least one")
        for each in concentrations:
            _check_concentration(each)
        _check_experiment(model, table, loss, gradient)
        rows = [
            [self.shock(model, table, c, loss, repeat=r, gradient=gradient) for r in range(repeats)]
            for c in concentrations
        ]
        stressed = tuple(_mean([shock.stressed for shock in row]) for row in rows)
        half = 0.5 * max(stressed)
        crossing = min(c for c, s in zip(concentrations, stressed, strict=True) if s >= half)
        return PercolationCurve(
            tuple(shock for row in rows for shock in row),
            concentrations,
            stressed,
            tuple(_mean([shock.predicted for shock in row]) for row in rows),
            tuple(_mean([shock.measured for shock in row]) for row in rows),
            tuple(_error([shock.measured for shock in row]) for row in rows),
            crossing,
        )

    def single_groups(
        self, model: nn.Module, table: GroupTable, loss: Loss, repeats: int = 1
    ) -> tuple[Float64[Tensor, " groups"], Float64[Tensor, " groups"], float]:
        """(R_g, mean measured change, their rank correlation) of each group perturbed alone with the whole budget.

        Raises:
            ConfigError: as `shock`, no loss or no repeats.
            DataError: as `shock`.
        """
        check_count(repeats, "repeats", 1)
        check_callable(loss, "loss")
        _check_experiment(model, table, loss, None)
        risks = torch.zeros(table.count, dtype=torch.float64)
        changes = torch.zeros(table.count, dtype=torch.float64)
        with kept_tensors(model.buffers()):
            start = _number(loss())
        for group in range(table.count):
            for repeat in range(repeats):
                source = keyed_generator(self.seed, repeat, group, "percolation_single")
                chosen = torch.tensor([group])
                delta, squares = self._delta(model, table, chosen, source, None)
                risks[group] += 0.5 * float(table.means[group] * squares.sum()) / repeats
                changes[group] += self._measured(model, delta, loss, start) / repeats
        return risks, changes, spearman(risks, changes)

    def _stressed(self, risks: Float64[Tensor, " groups"]) -> float:
        return float((risks >= self.threshold * (1 - _ROUNDING)).sum()) / len(risks)

    def _chosen(self, table: GroupTable, concentration: float, source: Generator) -> Tensor:
        scores = table.means if self.mean_fisher else table.fisher
        return picked(self.pick, scores, concentrated(concentration, table.count), self.temperature, source)

    def _delta(
        self,
        model: nn.Module,
        table: GroupTable,
        chosen: Tensor,
        source: Generator,
        gradient: Mapping[str, Tensor] | None,
    ) -> tuple[dict[str, Float64[Tensor, "*shape"]], Float64[Tensor, " k"]]:
        weights = table.weights(model)
        budget = self.budget
        if self.relative:
            budget *= float(
                torch.stack([w[table.ids[n] >= 0].double().square().sum() for n, w in weights.items()]).sum().sqrt()
            )
        squares = group_energies(self.energy, table.alive[chosen], budget**2)
        return perturbation(self.direction, table, weights, chosen, squares, source, gradient), squares

    def _measured(self, model: nn.Module, delta: Mapping[str, Tensor], loss: Loss, start: float | None = None) -> float:
        weights = {name: parameter for name, parameter in model.named_parameters() if name in delta}
        with kept_tensors(model.buffers()), kept_tensors(weights.values()) as before:
            before_loss = _number(loss()) if start is None else start
            ends = []
            for sign in (1.0, -1.0) if self.antithetic else (1.0,):
                with torch.no_grad():
                    for (name, weight), old in zip(weights.items(), before, strict=True):
                        weight.copy_(old.double() + sign * delta[name].to(weight.device))
                ends.append(_number(loss()))
        change = _mean(ends) - before_loss
        if not abs(change) < float("inf"):
            raise DataError(
                f"the loss changes by {change} under a perturbation of {self.budget}; make the budget smaller"
            )
        return change


def _check_concentration(concentration: object) -> None:
    check_number(concentration, "concentration", 0, above=True)
    if not concentration <= 1:  # type: ignore[operator]  # it is a number
        raise ConfigError(f"`concentration` (={concentration}) must be in (0, 1]")


def _check_experiment(model: object, table: object, loss: object, gradient: object) -> None:
    check_kind(model, "model", nn.Module)
    check_kind(table, "table", GroupTable)
    if loss is not None:
        check_callable(loss, "loss")
    if gradient is not None:
        check_tensors(gradient, "gradient")


def _number(value: object) -> float:
    """The loss as a number, without its graph."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach())
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        shown = f"{type(value).__name__} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"`loss` (={shown}) must return a number, or a tensor of one")
    return float(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[float]) -> float:
    count = len(values)
    if count < 2:
        return float("nan")
    return float((torch.tensor(values, dtype=torch.float64).var() / count).sqrt())
