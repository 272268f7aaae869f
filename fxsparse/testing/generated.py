"""Home of the classes of generated models, so that pickle finds them for as long as the process keeps them."""

from __future__ import annotations

import weakref
from typing import Any

KNOWN: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""Qualified name -> class or function."""


def __getattr__(name: str) -> Any:
    """The class of that qualified name."""
    try:
        return KNOWN[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
