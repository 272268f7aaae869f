"""Which Fisher, and the errors of curvature."""

from __future__ import annotations

import enum

from fxsparse.errors import CaptureError, ConfigError, DataError


class FisherType(enum.Enum):
    """Which second moment of per-sample gradients is collected; M is the normaliser.

    Attributes:
        EXACT: (1/M) sum J^T H J with the output Hessian H of a loss that is -log p: the true Fisher, no labels.
        MC: the same, H replaced by draws of the label from the model's own distribution.
        SKETCH: the same, sqrt(H) multiplied by random signs; unbiased, and of less variance than MC on trained models.
        EMPIRICAL: (1/M) sum g g^T with the gradients of the data's labels.
        GGN: (1/M) sum J^T H J for any loss with an output Hessian, class weights included.
    """

    EXACT = "true"
    MC = "mc"
    SKETCH = "sketch"
    EMPIRICAL = "empirical"
    GGN = "ggn"

    @classmethod
    def _missing_(cls, value: object) -> FisherType | None:
        return {"exact": cls.EXACT, "sampled": cls.SKETCH}.get(value) if isinstance(value, str) else None

    @classmethod
    def of(cls, kind: FisherType | str) -> FisherType:
        """The type itself, or the one of that value ("true", "exact", "mc", "sketch", "empirical", "ggn").

        "sampled" is SKETCH, the better one of the two that draw.

        Raises:
            ConfigError: there is none of that name.
        """
        try:
            return cls(kind)
        except ValueError as error:
            known = ", ".join(repr(each.value) for each in cls)
            raise ConfigError(f"`kind` (={kind!r}) must be one of {known}") from error


class UnsupportedLoss(ConfigError):
    """A loss from which the requested curvature cannot be taken."""


class CoupledSamples(DataError):
    """Per-sample gradients do not exist, because the loss of one sample depends on the others."""


class UncoveredParameter(CaptureError):
    """A parameter whose per-sample gradients cannot be collected."""
