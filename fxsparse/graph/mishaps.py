"""Failures inside an analysis that is not needed for a right result: told, survived, and raised where warnings are."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path


def mishap(what: str, error: Exception) -> str:
    """Warn of an error that should not have happened, and describe it for a report.

    Call it in the `except` clause of a step whose failure makes the result less good, not wrong. Where warnings are
    errors the warning is raised from the error.

    Args:
        what: the step that failed.
        error: what it raised.

    Returns:
        What failed, and where.
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    lines = str(error).strip().splitlines()
    text = f"{what} failed: {type(error).__name__}{where}" + (f" ({lines[0][:160]})" if lines else "")
    warnings.warn(f"{text}; what it was about is left as it is. Please report this", RuntimeWarning, stacklevel=2)
    return text
