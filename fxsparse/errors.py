"""The errors that fxsparse raises on purpose.

Every message names the thing, its value, and the mend.
"""

from __future__ import annotations


class FxSparseError(Exception):
    """Base of all errors raised by fxsparse."""


class ConfigError(FxSparseError, ValueError):
    """An option, name or combination of options that cannot be honoured."""


class DataError(FxSparseError, ValueError):
    """Values that cannot be used: NaN weights, an empty split, a corrupt image."""


class CaptureError(FxSparseError, RuntimeError):
    """A model, or a requested part of one, that could not be captured."""


class PassError(FxSparseError, RuntimeError):
    """A pass whose contract was broken; the message starts with the pass's name."""


class TicketError(FxSparseError, RuntimeError):
    """A ticket that is missing, corrupt, or does not fit the model."""


class ExportError(FxSparseError, RuntimeError):
    """An export that failed or whose verification failed; no file is left behind."""
