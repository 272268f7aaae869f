"""What a pass promises about the function that the model computes."""

from __future__ import annotations

from dataclasses import dataclass

from fxsparse.errors import ConfigError


@dataclass(frozen=True)
class Equivalence:
    """The relation between a model before and after a pass: `EXACT`, `Close` or `DIFFERENT`."""


@dataclass(frozen=True)
class _Exact(Equivalence):
    """Outputs and buffers are bit-identical; gradients agree to rounding: sums over several uses may change order."""

    def __str__(self) -> str:
        return "EXACT"


EXACT: Equivalence = _Exact()


@dataclass(frozen=True)
class Close(Equivalence):
    """Each number differs by at most `atol + rtol * |before|`.

    Attributes:
        rtol: Relative tolerance, in [0, 1).
        atol: Absolute tolerance, at least 0.

    Raises:
        ConfigError: a tolerance is out of range; at `rtol` 1 a network of zeros would pass.
    """

    rtol: float = 0.0
    atol: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.rtol < 1.0:
            raise ConfigError(f"`rtol` (={self.rtol}) must be in [0, 1)")
        if not 0.0 <= self.atol < float("inf"):
            raise ConfigError(f"`atol` (={self.atol}) must be a finite number of at least 0")


@dataclass(frozen=True)
class DIFFERENT(Equivalence):
    """The pass changes the function on purpose; nothing is compared.

    Attributes:
        reason: Why, for the record.
    """

    reason: str
