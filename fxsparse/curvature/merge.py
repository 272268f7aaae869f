"""Fisher-weighted averages of models, and natural-gradient-like scaling."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from jaxtyping import Bool
from torch import Tensor

from fxsparse.curvature.arguments import check_listed, check_number
from fxsparse.curvature.damage_tensors import Tensors, check_tensors, matched, pooled
from fxsparse.errors import ConfigError, DataError

FLOOR = 1e-12
"""Fisher values are at least this share of the largest one of their tensor."""


class MergeMask(enum.Enum):
    """Which weights of a merged sparse model are alive."""

    INTERSECTION = "intersection"
    """Those that are alive in every model."""
    UNION = "union"
    """Those that are alive in any; a model in which a weight is dead has no say in it."""


def fisher_weighted_merge(
    models: Sequence[Tensors],
    fishers: Sequence[Tensors],
    weights: Sequence[float] | None = None,
    *,
    masks: Sequence[Mapping[str, Bool[Tensor, "*shape"]]] | None = None,
    rule: MergeMask | str = MergeMask.INTERSECTION,
) -> dict[str, Tensor]:
    """Merge: theta = sum l_i F_i theta_i / sum l_i F_i, element by element (Matena & Raffel, arXiv 2111.09832).

    Where every F is 0 the weighted arithmetic mean is taken. Buffers are not merged: give parameters only.

    Args:
        models: Parameters by name, such as `dict(model.named_parameters())`; all with the same names and shapes.
        fishers: Their Fisher diagonals, group Fishers expanded.
        weights: l_i, not negative, not all 0; 1 by default.
        masks: The models' masks by name, where they have some; dead weights of the result are zeros.
        rule: See `MergeMask`.

    Returns:
        New tensors by name, in the first model's dtypes.

    Raises:
        ConfigError: missing names, other shapes, weights that cannot be used, a mask of no parameter, or an argument of
            another type.
        DataError: a Fisher is negative or not finite, or a parameter is not finite.

    >>> t = lambda value: {"w": torch.tensor([value])}
    >>> fisher_weighted_merge([t(1.0), t(5.0)], [t(3.0), t(1.0)])["w"]
    tensor([2.])
    """
    models, fishers = check_listed(models, "models", Mapping), check_listed(fishers, "fishers", Mapping)
    masks = None if masks is None else check_listed(masks, "masks", Mapping)
    for what, group in (("models", models), ("fishers", fishers)):
        for tensors in group:
            check_tensors(tensors, what)
    given = [1.0] * len(models) if weights is None else check_listed(weights, "weights", Real)
    for share in given:
        check_number(share, "weights", 0)
    shares = [float(each) for each in given]
    if not models or len(fishers) != len(models) or len(shares) != len(models):
        counts = f"{len(models)}, {len(fishers)}, {len(shares)}"
        raise ConfigError(f"`models`, `fishers` and `weights` (={counts}) must be equally many, at least one")
    if not 0 < sum(shares) < math.inf:
        raise ConfigError(f"`weights` (={shares}) must be finite, not negative, and not all 0")
    if masks is not None and len(masks) != len(models):
        raise ConfigError(f"`masks` (={len(masks)}) must be as many as `models` (={len(models)})")
    chosen = _rule(rule)
    for number, mask in enumerate(masks or ()):
        _check_mask(mask, models[number], number)
    for number, model in enumerate(models):
        if set(model) != set(models[0]):
            name = sorted(set(model) ^ set(models[0]))[0]
            raise ConfigError(f"`models` must have the same names; only some have `{name}` (model {number})")
    read = [
        {n: (f, t) for n, f, t in matched(fisher, model, "models")}
        for fisher, model in zip(fishers, models, strict=True)
    ]
    return {
        name: _merged(
            [each[name] for each in read],
            shares,
            None if masks is None else [mask.get(name) for mask in masks],
            chosen,
        ).to(models[0][name])
        for name in models[0]
    }


def _merged(
    pairs: list[tuple[Tensor, Tensor]], shares: list[float], masks: list[Tensor | None] | None, rule: MergeMask
) -> Tensor:
    if len({theta.shape for _, theta in pairs}) != 1:
        raise ConfigError(f"`models` have shapes {[tuple(theta.shape) for _, theta in pairs]} for one parameter")
    device = pairs[0][0].device
    f = torch.stack([fisher.to(device) for fisher, _ in pairs])
    theta = torch.stack([each.to(device) for _, each in pairs])
    share = torch.tensor(shares, dtype=torch.float64, device=device).reshape(-1, *[1] * (f.ndim - 1)).expand_as(f)
    alive = torch.ones_like(f, dtype=torch.bool)
    if masks is not None:
        alive = torch.stack([m.to(device) if m is not None else torch.ones_like(f[0], dtype=torch.bool) for m in masks])
    floor = FLOOR * f.max() if f.numel() else 0.0
    f = torch.where(alive, f.clamp_min(floor) if float(floor) else torch.ones_like(f), 0.0)
    total = (share * f).sum(0)
    mean = (share * f * theta).sum(0) / torch.where(total > 0, total, 1.0)
    kept = alive.all(0) if rule is MergeMask.INTERSECTION else alive.any(0)
    return torch.where(kept, mean, 0.0)


def _check_mask(masks: Mapping[str, Tensor], model: Tensors, number: int) -> None:
    for name, mask in masks.items():
        if name not in model:
            raise ConfigError(f"`masks` of model {number} names `{name}`, which is none of its parameters")
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.shape != model[name].shape:
            shown = f"{mask.dtype}, {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigError(
                f"`masks` of model {number} at `{name}` (={shown}) must be bool {tuple(model[name].shape)}"
            )


def _rule(rule: MergeMask | str) -> MergeMask:
    try:
        return MergeMask(rule)
    except ValueError:
        raise ConfigError(f"`rule` (={rule!r}) must be intersection or union") from None


def scale_by_fisher(
    gradients: Tensors, fisher: Tensors, alpha: float = 1.0, *, relative: float = 0.0, absolute: float = 0.0
) -> dict[str, Tensor]:
    """Scale g by (F + l)^-alpha, l = relative * mean F + absolute: natural at alpha 1, like Adam at 1/2.

    Args:
        gradients: g by name.
        fisher: Fisher diagonal, an entry for every gradient, in its shape.
        alpha: The exponent.
        relative: Damping as a share of the mean of F over all these parameters.
        absolute: Damping.

    Raises:
        ConfigError: a Fisher is missing or of another shape, or the exponent or damping is out of range.
        DataError: a Fisher is negative or not finite, a gradient is not finite, or a Fisher is 0 without damping where
            it divides.

    >>> scale_by_fisher({"w": torch.tensor([2.0, 2.0])}, {"w": torch.tensor([3.0, 0.0])}, absolute=1.0)["w"]
    tensor([0.5000, 2.0000])
    """
    check_number(alpha, "alpha")
    check_number(relative, "relative", 0)
    check_number(absolute, "absolute", 0)
    pairs = matched(fisher, gradients, "gradients")
    damping = absolute + (relative * float(pooled({n: f for n, f, _ in pairs}).mean()) if relative and pairs else 0.0)
    found = {}
    for name, f, g in pairs:
        damped = f + damping
        if alpha > 0 and bool((damped == 0).any()):
            raise DataError(f"`fisher` of `{name}` is 0 in places and nothing is added: give `absolute` damping")
        found[name] = (g * damped.pow(-alpha)).to(gradients[name])
    return found
