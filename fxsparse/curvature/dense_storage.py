"""Weights of which only the alive entries are stored have no axes: they are refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.nn import MaskedWeight, masked_weights


def check_stored_dense(
    model: nn.Module | Mapping[str, MaskedWeight], names: Collection[str] | None = None
) -> Mapping[str, MaskedWeight]:
    """Check that masked weights are stored with their dead entries, in their own shapes.

    Args:
        model: The model, or its `masked_weights`.
        names: Which weights, by first name; None = all.

    Returns:
        The masked weights of the model, all of them.

    Raises:
        ConfigError: `store_alive` keeps one alive only.
    """
    weights = masked_weights(model) if isinstance(model, nn.Module) else model
    for name, weight in weights.items():
        if weight.packed and (names is None or name in names):
            raise ConfigError(
                f"`{name}` is stored alive only (={tuple(weight.weight.shape)} for {tuple(weight.shape)}); call "
                "restore_dense(handle) first"
            )
    return weights
