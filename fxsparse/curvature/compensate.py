"""OBS-compensated pruning of a trained model in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.arguments import check_batches, check_kind, check_names
from fxsparse.curvature.compensate_options import Compensation as Compensation
from fxsparse.curvature.compensate_options import CompensationReport as CompensationReport
from fxsparse.curvature.compensate_plan import CompensationPlan
from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import MaskedWeight, masked_weights
from fxsparse.nn.masked import check_mask
from fxsparse.sparsity import Distribution, Pattern, SharedSupport, Uniform
from fxsparse.sparsity.counts import check_sparsity
from fxsparse.sparsity.grouping import support_order
from fxsparse.training.calibration import Calibration
from fxsparse.training.distributed import check_not_sharded, unwrap

UNIFORM, DEFAULT = Uniform(), Compensation()


def compensate(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    distribution: Distribution = UNIFORM,
    masks: Mapping[str, Tensor] | None = None,
    names: Iterable[str] | None = None,
    how: Compensation = DEFAULT,
) -> CompensationReport:
    """Prune a trained model and let the weights that stay make good what the others did.

    For each weight the second moments H = X X^T of its inputs are measured on the calibration data; a mask is chosen by
    what removing weights costs, w_Q ([H^-1]_QQ)^-1 w_Q^T / 2 (optimal brain surgeon), summed over the rows of a shared
    support; the alive weights become those whose outputs are closest to the present ones. Masks that the model has may
    change: dead weights count as zeros, which cost nothing to remove. A mask given by `masks` is taken as it is.

    Every masked weight that is multiplied by matrix products or convolutions can be compensated: linear layers, all
    kinds of convolutions, attention projections, functional uses. Gradients, other parameters, buffers, train/eval
    flags and random state are as before afterwards.

    Args:
        model: A model with masks, as `fxsparse.transform` returns it, trained.
        calibration: Batches, each `(inputs, targets)` or inputs alone; a tensor, a tuple of positional or a mapping of
            keyword arguments. Some hundred samples are usual.
        sparsity: Dead fraction in [0, 1) that the masks are chosen for.
        pattern: Which masks are legal; None = the pattern that each weight carries.
        distribution: How the sparsity is shared among the weights; `Global` ranks by OBS scores.
        masks: Instead of `sparsity`: the masks, by parameter name. `SharedSupport` masks bring their row order along.
        names: Weights to prune; all masked ones, or those of `masks`, by default.
        how: Settings of the solve.

    Returns:
        What was done to each weight, with its reconstruction error before and after.

    Raises:
        ConfigError: no masks, an unknown name, neither or both of `sparsity` and `masks`, a pattern or sparsity that a
            weight excludes, a weight whose inputs are not known, or an argument of another type. Nothing has changed.
        DataError: no calibration data, too few of them, a single batch that is not in a list, one that the model cannot
            run on, or inputs or weights that are not finite. Nothing has changed.

    >>> from fxsparse.nn import Linear
    >>> torch.manual_seed(0)
    <torch._C.Generator ...>
    >>> layer = Linear(8, 4)
    >>> report = compensate(layer, [torch.randn(64, 8)], sparsity=0.5)
    >>> report.layers[0].after < report.layers[0].before
    True
    """
    check_kind(model, "model", nn.Module)
    check_not_sharded(model)
    check_batches(calibration, "calibration")
    plan = _plan(unwrap(model), sparsity, pattern, distribution, masks, names, how)
    batches = tuple(calibration)
    if not batches:
        raise DataError("`calibration` (=none) must hold at least one batch of inputs")
    with Calibration(model, plan.weights, batches), plan.unmasked(), torch.no_grad():
        rows = tuple(plan.solve(batches))
    return CompensationReport(rows, len(batches))


def _plan(
    model: nn.Module,
    sparsity: float | None,
    pattern: Pattern | None,
    distribution: Distribution,
    masks: Mapping[str, Tensor] | None,
    names: Iterable[str] | None,
    how: Compensation,
) -> CompensationPlan:
    if (sparsity is None) == (masks is None):
        raise ConfigError(f"give either `sparsity` (={sparsity}) or `masks`, which are then only compensated")
    if sparsity is not None:
        check_sparsity(sparsity)
    check_kind(pattern, "pattern", Pattern, type(None))
    check_kind(distribution, "distribution", Distribution)
    check_kind(masks, "masks", Mapping, type(None))
    check_kind(how, "how", Compensation)
    known = masked_weights(model)
    if not known:
        raise ConfigError(f"`model` (={type(model).__name__}) has no masks; call fxsparse.transform on it first")
    wanted = list(check_names(names, "names")) if names is not None else list(known if masks is None else masks)
    if not wanted:
        raise ConfigError("`names` (=none) must name at least one masked weight")
    for name in (*wanted, *(masks or {})):
        if name not in known:
            raise ConfigError(f"`{name}` is not a masked parameter; there are {', '.join(known)}")
    if missing := [name for name in wanted if masks is not None and name not in masks]:
        raise ConfigError(f"`masks` lack `{missing[0]}`; give its mask, or leave it out of `names`")
    weights = {name: masked for name, masked in known.items() if name in wanted}
    patterns = {name: masked.spec.pattern if pattern is None else pattern for name, masked in weights.items()}
    for name, masked in weights.items():
        if bad := int((~masked.weight.isfinite()).sum()):
            raise DataError(f"`{name}` holds NaN or Inf (={bad} values); it cannot be pruned")
    orders = {} if masks is None else _row_orders(weights, patterns, masks)
    return CompensationPlan(model, weights, patterns, sparsity, distribution, masks, orders, how)


def _row_orders(
    weights: Mapping[str, MaskedWeight], patterns: Mapping[str, Pattern], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The row orders in which given masks hold `SharedSupport`; every mask is checked."""
    orders = {}
    for name, masked in weights.items():
        pattern, mask, layout, order = patterns[name], masks[name], masked.spec.layout, masked.row_order
        spec = dataclasses.replace(masked.spec, pattern=pattern)
        given = isinstance(mask, Tensor)
        if (
            given
            and isinstance(pattern, SharedSupport)
            and mask.dtype is torch.bool
            and mask.shape == masked.weight.shape
        ):
            found = support_order(mask, pattern.group, layout)
            order = order if found is None else found
        check_mask(name, masked.weight, spec, mask, order)
        if order is not None:
            orders[name] = order
    return orders
