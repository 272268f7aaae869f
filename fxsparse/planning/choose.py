"""Which weights get a mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.planning.routing import Weight
from fxsparse.planning.select import Selector, select


def choose(
    model: nn.Module,
    weights: Sequence[Weight],
    include: Selector | Iterable[Selector] | None,
    exclude: Selector | Iterable[Selector] | None,
) -> frozenset[str]:
    """First names of the weights to mask.

    Raises:
        ConfigError: a weight that was asked for cannot be masked, a selector names nothing, or no weight is left.
    """
    aliases = {alias: weight.name for weight in weights for alias in weight.names}
    left_out = select("exclude", exclude, model, aliases).names if exclude is not None else frozenset()
    if include is None:
        chosen = {weight.name for weight in weights if weight.default and weight.refusal is None} - left_out
    else:
        asked = select("include", include, model, aliases)
        wanted = [w for w in weights if w.name in asked.exact or (w.name in asked.names and len(w.shape) >= 2)]
        wanted = [weight for weight in wanted if weight.name not in left_out]
        for weight in wanted:
            if weight.refusal is not None:
                raise ConfigError(f"`{weight.name}` was asked for and cannot be masked: {weight.refusal}")
        chosen = {weight.name for weight in wanted}
    if not chosen:
        raise ConfigError(_no_weight(model, weights, include is not None or exclude is not None))
    return frozenset(chosen)


def _no_weight(model: nn.Module, weights: Sequence[Weight], restricted: bool) -> str:
    kind = type(model).__name__
    if restricted:
        return (
            f"`include` and `exclude` leave no weight of {kind} to mask; parameters with fewer than 2 axes need their "
            "full name"
        )
    if not weights:
        return f"`model` (={kind}) has no parameters, so there is nothing to mask"
    shown = "; ".join(f"`{weight.name}`: {weight.refusal or weight.reason}" for weight in weights[:5])
    return f"`model` (={kind}) has no weight that is sparsified by default ({shown}); name weights with `include`"
