"""The one rule for turning fractions into counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

from fxsparse.errors import ConfigError

_GUARD = 1e-6  # lifts products such as .29 * 100 = 28.999999999999996 over the integer that they mean


def check_sparsity(value: float, name: str = "sparsity") -> float:
    """Return `value` as a float; raise ConfigError unless it is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ConfigError(f"`{name}` (={value!r}) must be a number in [0, 1): the fraction of weights that are dead")
    return float(value)


def check_fraction(value: float, name: str = "fraction") -> float:
    """Return `value` as a float; raise ConfigError unless it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ConfigError(f"`{name}` (={value!r}) must be a number in [0, 1]")
    return float(value)


def check_count(value: int, name: str, minimum: int) -> None:
    """Raise ConfigError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"`{name}` (={value!r}) must be an integer of at least {minimum}")


def check_step(value: object, name: str) -> None:
    """Raise ConfigError unless `value` is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"`{name}` (={value!r}) must be a step, an integer")


def check_steps(value: object, name: str) -> None:
    """Raise ConfigError unless `value` counts steps: an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ConfigError(f"`{name}` (={value!r}) must be at least 1 step, an integer")


def dead_count(n: int, sparsity: float) -> int:
    """Number Z of dead elements among `n` at `sparsity`: floor(s n + 1e-6), and at most n - 1.

    Args:
        n: Number of elements, at least 1.
        sparsity: Dead fraction in [0, 1).

    Raises:
        ConfigError: `n` or `sparsity` is out of range.
    """
    check_count(n, "n", 1)
    return min(math.floor(check_sparsity(sparsity) * n + _GUARD), n - 1)


def keep_count(n: int, sparsity: float) -> int:
    """Number K = n - Z of alive elements among `n` at `sparsity`; always at least 1.

    Args:
        n: Number of elements, at least 1.
        sparsity: Dead fraction in [0, 1).

    Raises:
        ConfigError: `n` or `sparsity` is out of range.
    """
    return n - dead_count(n, sparsity)


def fraction_count(fraction: float, alive: int) -> int:
    """The count floor(f A + 1e-6) that a `fraction` in [0, 1] of `alive` elements means.

    Raises:
        ConfigError: `fraction` is outside [0, 1] or `alive` is negative.
    """
    check_count(alive, "alive", 0)
    return min(math.floor(check_fraction(fraction) * alive + _GUARD), alive)


@dataclass(frozen=True)
class Target:
    """What one weight should keep.

    Attributes:
        sparsity: Dead fraction in [0, 1); patterns that count blocks, slices or positions apply it to those.
        alive: Number of alive elements; `Unstructured` keeps exactly as many.
    """

    sparsity: float
    alive: int

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_count(self.alive, "alive", 1)

    @staticmethod
    def of(numel: int, sparsity: float) -> Target:
        """The target of a weight of `numel` elements at `sparsity`."""
        return Target(check_sparsity(sparsity), keep_count(numel, sparsity))

    @staticmethod
    def dense(numel: int) -> Target:
        """The target that keeps all of `numel` elements."""
        return Target(0.0, numel)
