"""Damage: how much a change that serves one task costs another, by the other's Fisher."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fxsparse.curvature.arguments import check_number
from fxsparse.curvature.damage_tensors import Tensors, check_tensors, matched
from fxsparse.errors import ConfigError, DataError


class DamageKind(enum.Enum):
    """What is summed over the parameters, d the direction and F the Fisher diagonal of the task that suffers."""

    QUADRATIC = "quadratic"
    """F d^2, twice the predicted loss change of the unit step at a minimum."""
    L1 = "l1"
    """|d| F; not quadratic, it predicts no loss."""
    SQRT = "sqrt"
    """|d| sqrt(F); not quadratic, it predicts no loss."""


@dataclass(frozen=True)
class Damage:
    """The damage to task A by a direction.

    Attributes:
        value: D.
        normalised: D over the sum of F; 0 where that is 0.
        degenerate: Whether the sum of F is 0.
        per_parameter: D of each parameter.
        kind: What was summed.
        predicted: -eta g_A^T d + eta^2 D / 2 where step and gradient were given; None otherwise.
    """

    value: float
    normalised: float
    degenerate: bool
    per_parameter: Mapping[str, float]
    kind: DamageKind = DamageKind.QUADRATIC
    predicted: float | None = None


@dataclass(frozen=True)
class Asymmetry:
    """Which of two tasks damages the other more.

    Attributes:
        onto_a: Normalised damage to A by B's direction.
        onto_b: Normalised damage to B by A's direction.
        asymmetry: (onto_a - onto_b) / (onto_a + onto_b), in [-1, 1]; 0 where both are 0.
        log_ratio: ln(onto_a / onto_b); infinite where one is 0, 0 where both are.
    """

    onto_a: Damage
    onto_b: Damage
    asymmetry: float
    log_ratio: float


def fisher_damage(
    fisher: Tensors,
    direction: Tensors,
    kind: DamageKind | str = DamageKind.QUADRATIC,
    *,
    step: float | None = None,
    gradient: Tensors | None = None,
) -> Damage:
    """D = sum F_i d_i^2 over the parameters of the direction.

    Args:
        fisher: Task A's Fisher diagonal by parameter name; a group Fisher expanded, which gives mean F of a group times
            the sum of d^2 in it.
        direction: d by name: task B's mean gradient, or any update. Not its square.
        kind: See `DamageKind`.
        step: eta of the step -eta d whose effect on A's loss is predicted; quadratic damage only.
        gradient: Task A's mean gradient at the start, where it is not zero.

    Raises:
        ConfigError: a Fisher or gradient is missing or of another shape, a step that is not finite, or a prediction of
            another kind.
        DataError: a Fisher is negative or not finite, or a direction or gradient is not finite.

    >>> import torch
    >>> F, g = {"w": torch.tensor([1.0, 4.0])}, {"w": torch.tensor([2.0, 1.0])}
    >>> found = fisher_damage(F, g)
    >>> found.value, found.normalised
    (8.0, 1.6)
    """
    chosen = _kind(kind)
    if step is not None:
        check_number(step, "step")
    if gradient is not None:
        check_tensors(gradient, "gradient")
    each, total = {}, 0.0
    for name, f, d in matched(fisher, direction, "direction"):
        if chosen is DamageKind.QUADRATIC:
            terms = f * d.square()
        else:
            terms = d.abs() * (f if chosen is DamageKind.L1 else f.sqrt())
        each[name] = float(terms.sum())
        total += float(f.sum())
    value = math.fsum(each.values())
    predicted = None
    if step is not None:
        if chosen is not DamageKind.QUADRATIC:
            raise ConfigError(f"`step` (={step}) predicts a loss from quadratic damage only, not from {chosen.value!r}")
        slope = 0.0 if gradient is None else _inner(gradient, direction)
        predicted = -step * slope + 0.5 * step**2 * value
    return Damage(value, value / total if total else 0.0, not total, each, chosen, predicted)


def damage_asymmetry(
    fisher_a: Tensors,
    fisher_b: Tensors,
    direction_a: Tensors,
    direction_b: Tensors,
    kind: DamageKind | str = DamageKind.QUADRATIC,
) -> Asymmetry:
    """The damage of each task's direction to the other.

    Raises:
        ConfigError: as `fisher_damage`; nothing that is missing is computed from other data.
        DataError: a Fisher is negative or not finite.

    >>> import torch
    >>> t = lambda *values: {"w": torch.tensor(values)}
    >>> found = damage_asymmetry(t(1.0, 4.0), t(2.0, 2.0), t(1.0, 1.0), t(2.0, 1.0))
    >>> round(found.asymmetry, 6), round(found.log_ratio, 6)
    (0.230769, 0.470004)
    """
    onto_a, onto_b = fisher_damage(fisher_a, direction_b, kind), fisher_damage(fisher_b, direction_a, kind)
    a, b = onto_a.normalised, onto_b.normalised
    if not a and not b:
        return Asymmetry(onto_a, onto_b, 0.0, 0.0)
    if not a or not b:
        sign = 1.0 if a else -1.0
        return Asymmetry(onto_a, onto_b, sign, sign * math.inf)
    return Asymmetry(onto_a, onto_b, (a - b) / (a + b), math.log(a) - math.log(b))


def _kind(kind: DamageKind | str) -> DamageKind:
    try:
        return DamageKind(kind)
    except ValueError:
        known = ", ".join(each.value for each in DamageKind)
        raise ConfigError(f"`kind` (={kind!r}) must be one of {known}") from None


def _inner(gradient: Tensors, direction: Tensors) -> float:
    total = 0.0
    for name, d in direction.items():
        if name not in gradient or gradient[name].shape != d.shape:
            raise ConfigError(f"`gradient` must have an entry for `{name}` of shape {tuple(d.shape)}")
        if bad := int((~gradient[name].isfinite()).sum()):
            raise DataError(f"`gradient` has {bad} values at `{name}` that are not finite")
        total += float((gradient[name].double() * d.double()).sum())
    return total
