"""Saliencies by curvature, for the drop and the grow of every method, and for pruning at once."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from fxsparse.curvature.arguments import check_kind, check_number
from fxsparse.curvature.damage_tensors import check_tensors
from fxsparse.curvature.importance_source import CurvatureSource
from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_count
from fxsparse.sparsity.saliency import Given, Saliency
from fxsparse.sparsity.units import Pooling
from fxsparse.training import GMP, RESU
from fxsparse.training.resu_subset import TopSaliency
from fxsparse.training.state import WeightState
from fxsparse.training.updater import Method


@dataclass(frozen=True)
class CurvatureSaliency(Saliency):
    """Base: a score that reads the curvature of the weight that it is given.

    Attributes:
        source: Where the curvature comes from.

    Raises:
        ConfigError: no `CurvatureSource`.
    """

    source: CurvatureSource

    pooling: ClassVar[Pooling] = Pooling.MEAN

    def __post_init__(self) -> None:
        check_kind(self.source, "source", CurvatureSource)

    def score(
        self,
        weight: Float[Tensor, "*shape"],
        gradient: Tensor | None = None,
        generator: Generator | None = None,
        inputs: Tensor | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Scores of the weight's shape, float64; see `Saliency.score`.

        Raises:
            ConfigError: the weight is no parameter of the source's model, or a gradient is needed and missing.
        """
        if self.needs_gradient:
            gradient = self._needed(weight, "gradient", gradient, "a backward pass")
        return self.by_curvature(weight.detach().double(), weight, gradient)

    @abc.abstractmethod
    def by_curvature(
        self, values: Float[Tensor, "*shape"], weight: Tensor, gradient: Tensor | None
    ) -> Float[Tensor, "*shape"]:
        """The score, from the weight's values in float64, the weight itself, and the gradient."""

    def formula(self, given: Given) -> Tensor:
        """Not used: the curvature belongs to a parameter, not to its values.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self} scores parameters of a model: call `score` with the parameter")


@dataclass(frozen=True)
class OBD(CurvatureSaliency):
    """F_qq w_q^2 / 2: the loss of removing one weight (LeCun et al. 1990)."""

    def by_curvature(self, values: Tensor, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """F w^2 / 2."""
        return 0.5 * self.source.diagonal(weight).double() * values.square()


@dataclass(frozen=True)
class WoodFisher(CurvatureSaliency):
    """w_q^2 / (2 [F^-1]_qq) by inverse blocks of the damped empirical Fisher (Singh & Alistarh, arXiv 2004.14340).

    With one block this is OBS. The gradients are those of single samples, N of them, N times the weights in memory;
    `fisher_batch` averages them first, as the authors' code does, which is another matrix: batch means squared vanish
    at a minimum.

    Attributes:
        damping: Added to the diagonal.
        block: Weights per block, in flat order.
        fisher_batch: Samples, in order, whose gradients are averaged before the outer product; the last may be fewer.
    """

    damping: float = 1e-5
    block: int = 64
    fisher_batch: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.damping, "damping", 0, above=True)
        check_count(self.block, "block", 1)
        check_count(self.fisher_batch, "fisher_batch", 1)

    def by_curvature(self, values: Tensor, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """w^2 / (2 [F^-1])."""
        return 0.5 * values.square() / self.source.inverse_diagonal(weight, self.damping, self.block, self.fisher_batch)


@dataclass(frozen=True)
class NewtonGain(CurvatureSaliency):
    """g_q^2 / (2 (F_qq + damping)): what a dead weight's best value would take off the loss; for growing.

    F is read through opened masks, so that dead weights have one; g is the mean gradient of the training batch.

    Attributes:
        damping: Positive.
    """

    damping: float = 1e-3
    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.damping, "damping", 0, above=True)  # F is 0 in places

    def by_curvature(self, values: Tensor, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """g^2 / (2 (F + damping))."""
        assert gradient is not None
        curvature = self.source.diagonal(weight, dense=True).double()
        return gradient.detach().double().square() / (2 * (curvature + self.damping))


@dataclass(frozen=True)
class FisherDiagonal(CurvatureSaliency):
    """F_qq itself; through opened masks, so that it serves for growing too."""

    def by_curvature(self, values: Tensor, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """F."""
        return self.source.diagonal(weight, dense=True).double()


@dataclass(frozen=True, eq=False)
class GivenScores(Saliency):
    """Scores that were computed before, by parameter: of channels, of a collector, of anything.

    They stay as they are while the weights train; compute them anew where they should follow.

    Attributes:
        source: Knows the parameters by their memory.
        scores: Parameter name -> scores of its shape.
        label: What they are, for records.

    Raises:
        ConfigError: no `CurvatureSource`, or no tensors by name.
    """

    source: CurvatureSource
    scores: Mapping[str, Tensor] = field(repr=False)
    label: str = ""

    pooling: ClassVar[Pooling] = Pooling.SUM

    def __post_init__(self) -> None:
        check_kind(self.source, "source", CurvatureSource)
        check_tensors(self.scores, "scores")
        check_kind(self.label, "label", str)

    def score(
        self,
        weight: Tensor,
        gradient: Tensor | None = None,
        generator: Generator | None = None,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """The parameter's scores.

        Raises:
            ConfigError: there are none for it, or of another shape.
        """
        name = self.source.name_of(weight)
        found = self.scores.get(name)
        if found is None or found.shape != weight.shape:
            shape = None if found is None else tuple(found.shape)
            raise ConfigError(
                f"`scores` of `{name}` (={shape}) must have the shape of the weight, {tuple(weight.shape)}"
            )
        return found.detach().to(weight.device).to(torch.promote_types(found.dtype, torch.float32))

    def formula(self, given: Given) -> Tensor:
        """Not used.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self} scores parameters of a model: call `score` with the parameter")


_GRANET = 0.5
"""What share of the alive weights GraNet exchanges."""

CURVATURE_SALIENCIES = (OBD, WoodFisher, NewtonGain, FisherDiagonal, GivenScores)


def with_saliencies(method: Method, drop: Saliency | None = None, grow: Saliency | None = None) -> Method:
    """The same method, its drop or grow by other saliencies.

    Methods that have fields for them (GMP, ACDC) get them there, RESU `drop` as `prune` and `score`, and `grow` as that
    by which the dead weights of a phase are chosen (`TopSaliency`, of its subset's fraction, .2 where that has none).
    Of others, such as SET, RigL, MEST or SNFS, it is a method of a class of its own, with everything else as it was.
    GMP lets weights grow where its `alpha` is positive; there it becomes GraNet's .5 where it was 0.

    Args:
        method: Any method.
        drop: By what alive weights are kept; as before where it is None.
        grow: By what dead weights come alive; as before where it is None.

    Raises:
        ConfigError: neither is given, `grow` for a method in which nothing grows by a score, a method that updates no
            masks (Static, OneShot, SNIP, GraSP, SynFlow), or an argument of another type.
    """
    check_kind(method, "method", Method)
    for name, each in (("drop", drop), ("grow", grow)):
        check_kind(each, name, Saliency, type(None))
    if drop is None and grow is None:
        raise ConfigError("`drop` and `grow` (=None) leave nothing to change; give one of them")
    if isinstance(method, RESU):
        return _resu_by(method, drop, grow)
    if type(method).update_due is Method.update_due:
        name = type(method).__name__
        raise ConfigError(
            f"`method` (={name}) updates no masks, so that it would ignore `drop` and `grow`: prune by a saliency with "
            "OneShot(saliency=...), draw first masks by one with `initial`, or take a method such as RigL"
        )
    fields = {each.name for each in dataclasses.fields(method)}
    if "drop" in fields:
        if grow is not None and "grow" not in fields:
            raise ConfigError(f"{type(method).__name__} has no grow by a score of dead weights; give `drop` only")
        given: dict[str, Any] = {"drop": drop, "grow": grow}
        if isinstance(method, GMP) and grow is not None and not method.alpha:
            given["alpha"] = _GRANET
        return dataclasses.replace(method, **{name: each for name, each in given.items() if each is not None})
    values = {each.name: getattr(method, each.name) for each in dataclasses.fields(method) if each.init}
    kind = type(method)
    if issubclass(kind, _Chosen):
        kind, drop, grow = kind.of, drop or values["drop_by"], grow or values["grow_by"]
    return _made(kind, {**values, "drop_by": drop, "grow_by": grow})


def _resu_by(method: RESU, drop: Saliency | None, grow: Saliency | None) -> RESU:
    changes: dict[str, Any] = {} if drop is None else {"prune": drop, "score": drop}
    if grow is not None:
        changes["subset"] = TopSaliency(grow, getattr(method.subset, "fraction", 0.2))
    return dataclasses.replace(method, **changes)


class _Chosen:
    """Mixin: drop and grow by the fields `drop_by` and `grow_by`, where they are given."""

    of: ClassVar[type[Method]]
    drop_by: Saliency | None
    grow_by: Saliency | None

    @property
    def drop(self) -> Saliency:
        """The chosen one, or the method's."""
        inherited: Saliency = super().drop  # type: ignore[misc]  # a Method stands behind it
        return inherited if self.drop_by is None else self.drop_by

    @property
    def grow(self) -> Saliency | None:
        """The chosen one, or the method's."""
        inherited: Saliency | None = super().grow  # type: ignore[misc]  # a Method stands behind it
        return inherited if self.grow_by is None else self.grow_by

    @property
    def needs_gradient(self) -> bool:
        """Where the method or a chosen saliency does."""
        inherited: bool = super().needs_gradient  # type: ignore[misc]  # a Method stands behind it
        chosen = (self.drop_by, self.grow_by)
        return inherited or any(each is not None and each.needs_gradient for each in chosen)

    def grow_scores(self, state: WeightState) -> Tensor:
        """By the chosen saliency alone, or the method's own scores."""
        if self.grow_by is not None:
            return state.scores(self.grow_by)
        inherited: Tensor = super().grow_scores(state)  # type: ignore[misc]  # a Method stands behind it
        return inherited

    def __reduce__(self) -> tuple[Any, ...]:
        names = [each.name for each in dataclasses.fields(self) if each.init]  # type: ignore[arg-type]  # a dataclass
        return _made, (self.of, {name: getattr(self, name) for name in names})


_TYPES: dict[type[Method], type[Method]] = {}


def _chosen_type(kind: type[Method]) -> type[Method]:
    if kind in _TYPES:
        return _TYPES[kind]
    extra = [(name, Saliency | None, field(default=None, kw_only=True)) for name in ("drop_by", "grow_by")]
    made: type[Method] = dataclasses.make_dataclass(
        kind.__name__, extra, bases=(_Chosen, kind), namespace={"of": kind, "__module__": kind.__module__}, frozen=True
    )
    _TYPES[kind] = made
    return made


def _made(kind: type[Method], values: Mapping[str, Any]) -> Method:
    return _chosen_type(kind)(**values)
