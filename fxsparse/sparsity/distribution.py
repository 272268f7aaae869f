"""Distributions: one global sparsity into one target per weight."""

from __future__ import annotations

import abc
import enum
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import Target as Target
from fxsparse.sparsity.counts import check_sparsity, keep_count
from fxsparse.sparsity.erk import ERKSolution, solve_erk
from fxsparse.sparsity.layout import Layout
from fxsparse.sparsity.pattern import Pattern, Unstructured
from fxsparse.sparsity.top_k import order_scores, top_k
from fxsparse.sparsity.units import BlockUnits, SliceUnits


@dataclass(frozen=True)
class WeightSpec:
    """A weight as distributions and patterns see it.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        layout: Its output and input axes.
        pattern: Its legal masks.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout = Layout()
    pattern: Pattern = Unstructured()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Distribution(abc.ABC):
    """A rule that shares a global sparsity among weights."""

    def targets(
        self, weights: Sequence[WeightSpec], sparsity: float, scores: Mapping[str, Tensor] | None = None
    ) -> dict[str, Target]:
        """The target of every weight; each keeps at least one element.

        Args:
            weights: In the model's order.
            sparsity: Global dead fraction in [0, 1).
            scores: Saliency by name, for distributions that rank weights against each other.

        Raises:
            ConfigError: the sparsity cannot be shared so, or a weight's pattern excludes its target; the message
                names the weight.
        """
        check_sparsity(sparsity)
        names = [weight.name for weight in weights]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"weight `{twice}` is listed twice; list a shared parameter once, under one name")
        for weight in weights:
            _fitted(weight, Target.dense(weight.numel))
        shared = self._share(weights, sparsity, scores) if weights else []
        return {weight.name: _fitted(weight, target) for weight, target in zip(weights, shared, strict=True)}

    @abc.abstractmethod
    def _share(
        self, weights: Sequence[WeightSpec], sparsity: float, scores: Mapping[str, Tensor] | None
    ) -> list[Target]:
        """One target per weight, before patterns restrict it."""


@dataclass(frozen=True)
class Uniform(Distribution):
    """The same sparsity everywhere.

    Attributes:
        dense_first: Leave the first weight dense.
        rebalance: Raise the sparsity of the others so that the global one is still met; otherwise dense weights do
            not count towards it (the convention of RigL).
    """

    dense_first: bool = False
    rebalance: bool = False

    def _share(
        self, weights: Sequence[WeightSpec], sparsity: float, scores: Mapping[str, Tensor] | None
    ) -> list[Target]:
        _check_patterns(weights, sparsity)
        dense, sparse = (weights[:1], weights[1:]) if self.dense_first else ([], weights)
        share = self._raised(weights, sparse, sparsity) if self.rebalance and sparsity else sparsity
        return [Target.dense(w.numel) for w in dense] + [Target.of(w.numel, share) for w in sparse]

    def _raised(self, weights: Sequence[WeightSpec], sparse: Sequence[WeightSpec], sparsity: float) -> float:
        free = sum(weight.numel for weight in sparse)
        raised = sparsity * sum(weight.numel for weight in weights) / free if free else math.inf
        if raised >= 1:
            raise ConfigError(
                f"`sparsity` (={sparsity}) cannot be met with `{weights[0].name}` dense: the other weights would need "
                f"{raised:.4g}; lower it, or set `dense_first` or `rebalance` to False"
            )
        return raised


@dataclass(frozen=True)
class ERK(Distribution):
    """Erdős–Rényi–Kernel: density proportional to (sum of dims / product of dims)^power (arXiv 1911.11134).

    Attributes:
        power: Exponent.
        dense: Names of weights to keep dense; their elements are paid by the others.
        kernel: Whether kernel dims enter; False is plain Erdős–Rényi.
    """

    power: float = 1.0
    dense: tuple[str, ...] = ()
    kernel: bool = True

    def solve(self, weights: Sequence[WeightSpec], sparsity: float) -> ERKSolution:
        """The densities before patterns restrict them, by position in `weights`.

        Raises:
            ConfigError: a name in `dense` is unknown, or the dense weights exceed the budget.
        """
        names = [weight.name for weight in weights]
        for name in self.dense:
            if name not in names:
                raise ConfigError(f"`dense` names the unknown weight `{name}`; known are {', '.join(names)}")
        forced = [names.index(name) for name in self.dense]
        return solve_erk([weight.shape for weight in weights], sparsity, self.power, forced, self.kernel)

    def _share(
        self, weights: Sequence[WeightSpec], sparsity: float, scores: Mapping[str, Tensor] | None
    ) -> list[Target]:
        _check_patterns(weights, sparsity)
        solution = self.solve(weights, sparsity)
        return [
            _realised(weight.numel, alive, density)
            for weight, alive, density in zip(weights, solution.alive, solution.densities, strict=True)
        ]


class Normalize(enum.Enum):
    """How scores of different weights are made comparable."""

    L2 = "l2"  # divided by their Euclidean norm


@dataclass(frozen=True)
class Global(Distribution):
    """One ranking over all weights.

    For `Unstructured`, `Block` and `Channel` the units themselves are ranked and counted: the sparsity is that of
    elements, blocks or slices, whatever their sizes. The other patterns need equal counts in their segments; each
    weight takes the density that the ranking of its elements gives.

    Attributes:
        normalize: How scores of different weights are made comparable; None = as they are.
        min_alive: The best so many of each weight are kept first.
    """

    normalize: Normalize | None = None
    min_alive: int = 1

    def __post_init__(self) -> None:
        if self.min_alive < 1:
            raise ConfigError(f"`min_alive` (={self.min_alive}) must be at least 1")

    def _share(
        self, weights: Sequence[WeightSpec], sparsity: float, scores: Mapping[str, Tensor] | None
    ) -> list[Target]:
        _check_patterns(weights, sparsity)
        if sparsity == 0.0:
            return [Target.dense(weight.numel) for weight in weights]
        ranked = [self._ranked(weight, scores) for weight in weights]
        sizes = [len(each) for each in ranked]
        forced = torch.cat([top_k(each, min(self.min_alive, len(each))) for each in ranked])
        total = keep_count(sum(sizes), sparsity)
        free = total - int(forced.sum())
        if free < 0:
            raise ConfigError(
                f"`sparsity` (={sparsity}) keeps {total} in all, fewer than `min_alive` (={self.min_alive}) in each of "
                f"{len(weights)} weights; lower the sparsity or `min_alive`"
            )
        kept = top_k(torch.cat(ranked), free, ~forced) | forced
        counts = [int(part.sum()) for part in torch.split(kept, sizes)]
        return [
            _of_units(weight.numel, count, size) for weight, count, size in zip(weights, counts, sizes, strict=True)
        ]

    def _ranked(self, weight: WeightSpec, scores: Mapping[str, Tensor] | None) -> Tensor:
        if scores is None or weight.name not in scores:
            raise ConfigError(f"{self} ranks all weights together: `scores` of weight `{weight.name}` must be given")
        given = scores[weight.name]
        if given.shape != weight.shape:
            raise ConfigError(
                f"`scores` of weight `{weight.name}` have shape (={tuple(given.shape)}), not (={weight.shape})"
            )
        units = weight.pattern.units(weight.shape, weight.layout)
        whole = isinstance(units, BlockUnits | SliceUnits)
        ranked = units.pool(given)[0] if whole else order_scores(given).reshape(-1)
        if self.normalize is None:
            return ranked
        norm = ranked.double().norm()
        return ranked.double() / norm if norm > 0 else ranked.double()


@dataclass(frozen=True)
class Custom(Distribution):
    """Sparsities by name.

    Attributes:
        rules: Sparsity by weight name or by regular expression (matched against the whole name).
        default: Sparsity of unlisted weights; None = the global one.
    """

    rules: Mapping[str, float] = field(hash=False)
    default: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Mapping):
            raise ConfigError(f"`rules` (={self.rules!r}) must be a mapping of weight names to sparsities")
        for rule, sparsity in self.rules.items():
            check_sparsity(sparsity, rule)
        if self.default is not None:
            check_sparsity(self.default, "default")

    def _share(
        self, weights: Sequence[WeightSpec], sparsity: float, scores: Mapping[str, Tensor] | None
    ) -> list[Target]:
        names = [weight.name for weight in weights]
        matched: dict[str, str] = {}
        for rule in self.rules:
            hits = [rule] if rule in names else [name for name in names if _compiled(rule).fullmatch(name)]
            if not hits:
                raise ConfigError(f"rule `{rule}` matches no weight; known are {', '.join(names)}")
            for name in hits:
                if name in matched:
                    raise ConfigError(f"weight `{name}` matches two rules, `{matched[name]}` and `{rule}`; keep one")
                matched[name] = rule
        default = sparsity if self.default is None else self.default
        shared = [self.rules[matched[name]] if name in matched else default for name in names]
        for weight, own in zip(weights, shared, strict=True):
            _check_patterns([weight], own)
        return [Target.of(weight.numel, own) for weight, own in zip(weights, shared, strict=True)]


DISTRIBUTIONS = (Uniform, ERK, Global, Custom)


def _realised(numel: int, alive: int, density: float) -> Target:
    if alive == numel:
        return Target.dense(numel)
    return Target(1 - (density if density < 1 else alive / numel), alive)


def _of_units(numel: int, count: int, size: int) -> Target:
    """Target of a weight of which `count` of `size` ranked units are kept."""
    if count == size:
        return Target.dense(numel)
    sparsity = 1 - count / size
    return Target(sparsity, count if size == numel else keep_count(numel, sparsity))


def _compiled(rule: str) -> re.Pattern[str]:
    try:
        return re.compile(rule)
    except re.error as error:
        raise ConfigError(f"rule `{rule}` is neither a weight's name nor a regular expression: {error}") from error


def _check_patterns(weights: Sequence[WeightSpec], sparsity: float) -> None:
    for weight in weights:
        try:
            weight.pattern.check_sparsity(sparsity)
        except ConfigError as error:
            raise ConfigError(f"weight `{weight.name}`: {error}") from error


def _fitted(weight: WeightSpec, target: Target) -> Target:
    try:
        fitted = weight.pattern.target(weight.shape, weight.layout, target)
        weight.pattern.units(weight.shape, weight.layout).alive_elements(fitted)
    except ConfigError as error:
        raise ConfigError(f"weight `{weight.name}`: {error}") from error
    return fitted
