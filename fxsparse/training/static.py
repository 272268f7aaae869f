"""Static masks."""

from __future__ import annotations

from dataclasses import dataclass

from fxsparse.training.updater import Method


@dataclass(frozen=True)
class Static(Method):
    """Masks that never change: random ones, those of a saliency, or the ones that the model has (a ticket's).

    >>> Static(sparsity=0.8).update_due(100)
    False
    """
