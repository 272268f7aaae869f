"""Which weights get a mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.planning.checks import quantised_parts
from fxsparse.planning.routing import Weight
from fxsparse.planning.select import Selector, select


def choose(
    model: nn.Module,
    weights: Sequence[Weight],
    include: Selector | Iterable[Selector] | None,
    exclude: Selector | Iterable[Selector] | None,
) -> Mapping[str, str]:
    """The weights to mask: first name -> why, in the order of `weights`.

    Without `include` the weights that are sparsified by default; in a model that has none of them, what else layers use
    as their weight (recurrent, bilinear, depthwise, embeddings, mapped weights), and without any of that every
    parameter of at least two axes that something uses.

    Raises:
        ConfigError: a weight that was asked for cannot be masked, a selector names nothing, or no weight is left.
    """
    aliases = {alias: weight.name for weight in weights for alias in weight.names}
    left_out = select("exclude", exclude, model, aliases).names if exclude is not None else frozenset()
    if include is None:
        able = [weight for weight in weights if weight.refusal is None and weight.name not in left_out]
        chosen = {weight.name: weight.reason for weight in able if weight.default}
        if not any(weight.default and weight.refusal is None for weight in weights):
            chosen = _fallback(able)
    else:
        asked = select("include", include, model, aliases)
        wanted = [w for w in weights if w.name in asked.exact or (w.name in asked.names and len(w.shape) >= 2)]
        wanted = [weight for weight in wanted if weight.name not in left_out]
        for weight in wanted:
            if weight.refusal is not None:
                raise ConfigError(f"`{weight.name}` was asked for and cannot be masked: {weight.refusal}")
        chosen = {weight.name: weight.why_masked for weight in wanted}
    if not chosen:
        raise ConfigError(_no_weight(model, weights, include is not None or exclude is not None))
    return chosen


def _fallback(weights: Sequence[Weight]) -> dict[str, str]:
    layers = [weight for weight in weights if weight.fallback]
    found = layers or [weight for weight in weights if len(weight.shape) >= 2 and weight.uses]
    return {weight.name: f"{weight.why_masked}; the model has no weight that is masked by default" for weight in found}


def _no_weight(model: nn.Module, weights: Sequence[Weight], restricted: bool) -> str:
    kind = type(model).__name__
    if restricted:
        return (
            f"`include` and `exclude` leave no weight of {kind} to mask; parameters with fewer than 2 axes need their "
            "full name"
        )
    parts = quantised_parts(model)
    if parts:
        return f"`model` (={kind}) has nothing left to mask: `{parts[0].path}`: {parts[0].reason}; {parts[0].mend}"
    if not weights:
        return f"`model` (={kind}) has no parameters, so there is nothing to mask"
    shown = "; ".join(f"`{weight.name}`: {weight.refusal or weight.reason}" for weight in weights[:5])
    hint = "; name weights with `include`" if any(weight.refusal is None for weight in weights) else ""
    return f"`model` (={kind}) has no weight that is sparsified by default ({shown}){hint}"
