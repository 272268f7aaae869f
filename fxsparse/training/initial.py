"""The masks that a model starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.nn import MaskedWeight
from fxsparse.nn.masked import check_mask, check_mask_edit
from fxsparse.nn.slot import slots_of
from fxsparse.sparsity.build import random_masks
from fxsparse.sparsity.counts import keep_count
from fxsparse.sparsity.distribution import Global, Target, WeightSpec
from fxsparse.sparsity.pattern import Pattern
from fxsparse.sparsity.random import generator
from fxsparse.sparsity.saliency import Random, Saliency
from fxsparse.training.updater import Initial, Method

_SAME_DENSITY = 0.01  # patterns and distributions round; this much is the same sparsity


@dataclass(frozen=True)
class _Weight:
    """A masked weight under the method's pattern."""

    masked: MaskedWeight
    spec: WeightSpec

    @property
    def row_order(self) -> Tensor | None:
        return self.masked.row_order

    def draw(self, method: Method, index: int, saliency: Saliency) -> Tensor:
        """Element scores."""
        weight = self.masked.dense(self.masked.weight)
        return saliency.score(weight, None, generator(method.seed, index, 0, "initial_mask"))


def pattern_of(method: Method, masked: MaskedWeight) -> Pattern:
    """The method's pattern, else the weight's own.

    Raises:
        ConfigError: the method or the weight's shape excludes the pattern; the message names the weight.
    """
    pattern = masked.spec.pattern if method.pattern is None else method.pattern
    try:
        method.check(pattern)
        pattern.units(tuple(masked.weight.shape), masked.spec.layout, masked.row_order)
    except ConfigError as error:
        raise ConfigError(f"`{masked.name}` with {type(method).__name__}: {error}") from error
    return pattern


def initial_masks(method: Method, weights: Mapping[str, MaskedWeight]) -> dict[str, Bool[Tensor, "*shape"]]:
    """The mask of every weight before the first step; nothing is changed.

    Raises:
        ConfigError: the model is sparse already and its sparsity is not the method's, its masks break the pattern, or
            it stores alive entries only.
    """
    for name in [name for name, masked in weights.items() if masked.packed][:1]:
        raise ConfigError(
            f"`{name}` is stored alive only: call restore_dense(handle) with the handle that stored it, attach, then "
            "store_alive; or go on with attach(state=...)"
        )
    own = {
        name: _Weight(
            masked, WeightSpec(name, tuple(masked.weight.shape), masked.spec.layout, pattern_of(method, masked))
        )
        for name, masked in weights.items()
    }
    sparse = any(not bool(masked.mask.all()) for masked in weights.values())
    if isinstance(method.initial, Initial) and (sparse or method.initial is Initial.KEEP):
        if method.initial is Initial.AUTO and not method.any_start:
            _check_sparsity(method, own)
        if not method.grows:
            _check_not_below(method, own)
        for weight in own.values():
            _check_pattern(weight)
        return {name: masked.mask.clone() for name, masked in weights.items()}
    saliency = method.initial_saliency() if isinstance(method.initial, Initial) else method.initial
    return _drawn(method, own, saliency)


def _drawn(method: Method, weights: Mapping[str, _Weight], saliency: Saliency) -> dict[str, Tensor]:
    specs, sparsity = [weight.spec for weight in weights.values()], method.sparsity_at(0)
    if sparsity == 0.0:
        return {name: torch.ones_like(weight.masked.mask) for name, weight in weights.items()}
    if isinstance(saliency, Random):
        drawn = random_masks(specs, method.distribution, sparsity, method.seed)
        return {
            name: _in_row_order(weight, drawn[name]).to(weight.masked.mask.device) for name, weight in weights.items()
        }
    scores = {name: weight.draw(method, i, saliency) for i, (name, weight) in enumerate(weights.items())}
    targets = method.distribution.targets(specs, sparsity, scores)
    return {
        name: weight.spec.pattern.mask(
            scores[name], targets[name], weight.spec.layout, saliency.pooling, weight.row_order
        )
        for name, weight in weights.items()
    }


def _in_row_order(weight: _Weight, mask: Tensor) -> Tensor:
    """A mask whose groups are rows in the natural order, with the groups of the weight's own row order."""
    if weight.row_order is None:
        return mask
    shape, layout, pattern = weight.spec.shape, weight.spec.layout, weight.spec.pattern
    chosen = pattern.units(shape, layout).collect(mask)
    return pattern.units(shape, layout, weight.row_order.cpu()).spread(chosen)


def _check_sparsity(method: Method, weights: Mapping[str, _Weight]) -> None:
    numel = sum(weight.spec.numel for weight in weights.values())
    alive = sum(int(weight.masked.mask.sum()) for weight in weights.values())
    targets = _targets(method, weights)
    asked = [keep_count(numel, method.sparsity), sum(target.alive for target in targets.values())]
    asked.append(sum(_rounded(weights[name], target) for name, target in targets.items()))
    if min(abs(alive - count) for count in asked) > _SAME_DENSITY * numel:
        raise ConfigError(
            f"`sparsity` (={method.sparsity}) is not that of the model's masks (={1 - alive / numel:.4f}); give the "
            "method the model's sparsity, `initial=Initial.KEEP` to train these masks as they are, or a saliency as "
            "`initial` to draw new ones"
        )


def _rounded(weight: _Weight, target: Target) -> int:
    """The alive elements that the weight's pattern makes of a target."""
    try:
        return weight.spec.pattern.units(weight.spec.shape, weight.spec.layout).alive_elements(target)
    except ConfigError:  # the pattern cannot have this target
        return target.alive


def _check_not_below(method: Method, weights: Mapping[str, _Weight]) -> None:
    numel = sum(weight.spec.numel for weight in weights.values())
    alive = sum(int(weight.masked.mask.sum()) for weight in weights.values())
    wanted = min(keep_count(numel, method.sparsity), sum(target.alive for target in _targets(method, weights).values()))
    if wanted - alive > _SAME_DENSITY * numel:
        raise ConfigError(
            f"`sparsity` (={method.sparsity}) is below that of the model's masks (={1 - alive / numel:.4f}), and "
            f"{type(method).__name__} never grows; ask for a higher sparsity, use a method that grows to a "
            "target such as Densify, or give `initial` a saliency to draw new masks"
        )


def targets_of(method: Method, weights: Mapping[str, MaskedWeight]) -> dict[str, Target | None]:
    """What each weight is meant to keep from the attached model on; None for a weight that is dead as a whole.

    The distribution's share; the present count where the model keeps its masks as they are, or where the share came
    from scores.
    """
    if method.initial is Initial.KEEP or isinstance(method.distribution, Global):
        counts = {name: int(masked.mask.sum()) for name, masked in weights.items()}
        sizes = {name: masked.mask.numel() for name, masked in weights.items()}
        return {name: Target(1 - n / sizes[name], n) if n else None for name, n in counts.items()}
    specs = [
        WeightSpec(name, tuple(masked.weight.shape), masked.spec.layout, masked.spec.pattern)
        for name, masked in weights.items()
    ]
    return dict(method.distribution.targets(specs, method.sparsity))


def _targets(method: Method, weights: Mapping[str, _Weight]) -> dict[str, Target]:
    specs = [weight.spec for weight in weights.values()]
    values = {name: weight.masked.dense(weight.masked.weight.detach()) for name, weight in weights.items()}
    scores = {name: torch.where(weight.masked.mask, values[name].abs(), 0.0) for name, weight in weights.items()}
    return method.distribution.targets(specs, method.sparsity, scores)


def _check_pattern(weight: _Weight) -> None:
    if bool(weight.masked.mask.all()):
        return
    try:
        weight.spec.pattern.check(weight.masked.mask, weight.spec.layout, weight.row_order)
    except ConfigError as error:
        raise ConfigError(f"`{weight.spec.name}`: {error}; give `initial` a saliency to draw new masks") from error


def start_from(
    weights: Mapping[str, MaskedWeight],
    masks: Mapping[str, Bool[Tensor, "*shape"]],
    patterns: Mapping[str, Pattern],
    row_orders: Mapping[str, Tensor | None] | None = None,
) -> None:
    """Give every weight its pattern, mask and (where it changes) row order, after all of them are known to fit.

    Raises:
        ConfigError: one does not fit, or a module is in a resurrection phase. Nothing has changed then.
    """
    orders = row_orders or {}
    for name, masked in weights.items():
        spec = replace(masked.spec, pattern=patterns[name])
        order = orders.get(name)
        check_mask(name, masked.weight, spec, masks[name], masked.row_order if order is None else order)
        for module, _ in masked.owners:
            check_mask_edit(module)
    for name, masked in weights.items():
        for module, attribute in masked.owners:
            slot = slots_of(module)[attribute]
            slot.spec = replace(slot.spec, pattern=patterns[name])
        masked.set_mask_(masks[name], orders.get(name))
