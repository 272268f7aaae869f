"""Where the decisions behind a generated model come from: hypothesis, or a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


class Choices(Protocol):
    """A source of decisions; the first option of each is the simplest."""

    def integer(self, low: int, high: int) -> int:
        """A whole number in [low, high]; `low` is the simplest."""

    def pick(self, options: Sequence[T]) -> T:
        """One of the options; the first is the simplest."""

    def flag(self, weight: int = 2) -> bool:
        """True in one of `weight` cases; False is the simplest."""


class DrawnChoices:
    """Decisions that hypothesis makes and shrinks."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return self._draw(st.integers(low, high))

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self._draw(st.integers(0, len(options) - 1))] if len(options) > 1 else options[0]

    def flag(self, weight: int = 2) -> bool:
        """True in one of `weight` cases."""
        return self._draw(st.integers(0, weight - 1)) == weight - 1


class SeededChoices:
    """Decisions from a seed, of a private generator: the same on every machine."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return self._random.randint(low, high)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return self._random.choice(options)

    def flag(self, weight: int = 2) -> bool:
        """True in one of `weight` cases."""
        return self._random.randrange(weight) == weight - 1
