"""Scores of removing weights, by a quadratic model of the loss: the loss that it costs. Lower = pruned first."""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fxsparse.curvature.arguments import check_axis, check_kind, check_listed, check_number, shown
from fxsparse.curvature.damage_tensors import checked
from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity.counts import check_count


class TaylorKind(enum.Enum):
    """First-order scores from per-sample gradients g_n."""

    PER_SAMPLE = "per_sample"
    """mean_n |g_n w|."""
    BATCH = "batch"
    """|mean_n g_n w|, which vanishes where the samples cancel."""
    SQUARED = "squared"
    """(mean_n g_n w)^2."""


def obd_scores(weight: Float[Tensor, "*shape"], fisher: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """F_qq w_q^2 / 2 for each weight alone (LeCun et al. 1990), float64.

    Args:
        weight: w.
        fisher: Diagonal of the GGN, the true or the empirical Fisher.

    Raises:
        ConfigError: other shapes, or no tensors.
        DataError: a Fisher is negative or not finite, or a weight is not finite.

    >>> obd_scores(torch.ones(2), torch.tensor([2.0, 2.0]))
    tensor([1., 1.], dtype=torch.float64)
    """
    w = _wide(weight, "weight")
    check_kind(fisher, "fisher", Tensor)
    if fisher.shape != w.shape:
        raise ConfigError(f"`fisher` (={tuple(fisher.shape)}) must have the shape of the weight, {tuple(w.shape)}")
    return 0.5 * checked("fisher", fisher) * w.square()


def obs_scores(weight: Float[Tensor, " n"], inverse: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """w_q^2 / (2 [F^-1]_qq), the others free to answer (Hassibi & Stork 1993), float64.

    Args:
        weight: Flat w.
        inverse: F^-1, positive definite.

    Raises:
        ConfigError: other shapes, or no tensors.
        DataError: the diagonal of the inverse is not positive, or values are not finite.

    >>> obs_scores(torch.ones(2), torch.linalg.inv(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))).round(decimals=6)
    tensor([0.7500, 0.7500], dtype=torch.float64)
    """
    w, inverse = _flat(weight, inverse)
    return 0.5 * w.square() / _positive(inverse.diagonal())


def obs_update(
    weight: Float[Tensor, " n"], inverse: Float[Tensor, "n n"], removed: int | Sequence[int]
) -> tuple[float, Float[Tensor, " n"]]:
    """The loss of removing a set Q of weights together, and how the others change, float64.

    Score w_Q^T ([F^-1]_QQ)^-1 w_Q / 2, change delta = -F^-1 E_Q ([F^-1]_QQ)^-1 w_Q; it is not the sum of single scores.

    Args:
        weight: Flat w.
        inverse: F^-1.
        removed: Q, without repetitions.

    Returns:
        The score and delta; w + delta is exactly 0 in Q.

    Raises:
        ConfigError: other shapes, no tensors, or an index that is none, out of range or named twice.
        DataError: F^-1 is not positive definite on Q, or values are not finite.

    >>> inverse = torch.linalg.inv(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    >>> score, delta = obs_update(torch.ones(2), inverse, 0)
    >>> round(score, 9), delta.round(decimals=9)
    (0.75, tensor([-1.0000,  0.5000], dtype=torch.float64))
    >>> round(obs_update(torch.ones(2), inverse, [0, 1])[0], 9)
    3.0
    """
    w, inverse = _flat(weight, inverse)
    index = torch.tensor(_indices(removed), dtype=torch.int64, device=w.device)
    if len(index) != len(set(index.tolist())) or (
        len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(w)
    ):
        raise ConfigError(f"`removed` (={index.tolist()}) must be different indices below {len(w)}")
    if not len(index):
        return 0.0, torch.zeros_like(w)
    factor, failed = torch.linalg.cholesky_ex(inverse[index][:, index])
    if int(failed):
        raise DataError("`inverse` is not positive definite on the removed weights; add damping before inverting")
    price = torch.cholesky_solve(w[index][:, None], factor)[:, 0]
    delta = -(inverse[:, index] @ price)
    delta[index] = -w[index]
    return float(0.5 * (w[index] @ price)), delta


def woodfisher_inverse(
    gradients: Float[Tensor, "n p"], damping: float, block: int | None = None
) -> Float[Tensor, "blocks b b"]:
    """Inverses of the diagonal blocks of l I + (1/N) sum g_n g_n^T, by rank-one updates (arXiv 2004.14340), float64.

    F^-1 <- F^-1 - (F^-1 g)(F^-1 g)^T / (N + g^T F^-1 g), from I / l on. A last short block is filled up with weights
    that have no gradient.

    Args:
        gradients: g_n of each sample's own loss, flat; gradients of mini-batches are another matrix.
        damping: l, positive.
        block: Weights per block B; all in one by default.

    Raises:
        ConfigError: damping or block out of range, or no matrix of at least one gradient.
        DataError: a gradient is not finite.

    >>> woodfisher_inverse(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 1.0)[0].round(decimals=6)
    tensor([[ 0.5455, -0.1818],
            [-0.1818,  0.7273]], dtype=torch.float64)
    """
    wide = _wide(gradients, "gradients")
    check_number(damping, "damping", 0, above=True)
    if wide.ndim != 2 or not wide.numel():
        raise ConfigError(f"`gradients` (={tuple(wide.shape)}) must be a matrix (N, P), N and P at least 1")
    samples, width = wide.shape
    if block is not None:
        check_count(block, "block", 1)
    size = width if block is None else block
    blocks = -(-width // size)
    g = torch.nn.functional.pad(wide, (0, blocks * size - width)).reshape(samples, blocks, size)
    inverse = torch.eye(size, dtype=torch.float64, device=g.device).div(damping).repeat(blocks, 1, 1)
    for each in g:
        step = (inverse @ each[..., None])[..., 0]
        scale = samples + (each * step).sum(-1)
        inverse -= step[:, :, None] * (step / scale[:, None])[:, None, :]
    return inverse


def woodfisher_scores(
    weight: Float[Tensor, "*shape"], gradients: Float[Tensor, "n ..."], damping: float, block: int | None = None
) -> Float[Tensor, "*shape"]:
    """OBS scores w^2 / (2 [F^-1]_qq) by block inverses of the damped empirical Fisher, float64.

    Args:
        weight: w, any shape.
        gradients: g_n of each sample's own loss [N, *shape].
        damping: Added to the diagonal.
        block: Weights per block, in flat order.

    Raises:
        ConfigError: other shapes, no tensors, damping or block out of range.
        DataError: a weight or gradient is not finite.
    """
    w = _wide(weight, "weight")
    _check_gradients(gradients, w)
    inverse = woodfisher_inverse(gradients.flatten(1), damping, block)
    diagonal = inverse.diagonal(dim1=1, dim2=2).reshape(-1)[: w.numel()]
    return 0.5 * w.square() / diagonal.reshape(w.shape)


def taylor_scores(
    weight: Float[Tensor, "*shape"],
    gradients: Float[Tensor, "n ..."],
    kind: TaylorKind | str = TaylorKind.PER_SAMPLE,
) -> Float[Tensor, "*shape"]:
    """First-order scores (Molchanov et al., arXiv 1906.10771), float64.

    Raises:
        ConfigError: an unknown kind, other shapes, or no tensors.
        DataError: a weight or gradient is not finite.

    >>> g, w = torch.tensor([[1.0], [-1.0]]), torch.tensor([2.0])
    >>> float(taylor_scores(w, g)), float(taylor_scores(w, g, "batch"))
    (2.0, 0.0)
    """
    try:
        chosen = TaylorKind(kind)
    except ValueError:
        known = ", ".join(each.value for each in TaylorKind)
        raise ConfigError(f"`kind` (={kind!r}) must be one of {known}") from None
    w = _wide(weight, "weight")
    _check_gradients(gradients, w)
    product = _wide(gradients, "gradients") * w
    if chosen is TaylorKind.PER_SAMPLE:
        return product.abs().mean(0)
    mean = product.mean(0)
    return mean.abs() if chosen is TaylorKind.BATCH else mean.square()


def theis_scores(
    activations: Float[Tensor, "n ..."], gradients: Float[Tensor, "n ..."], axis: int = 1
) -> Float[Tensor, " channels"]:
    """mean_n (sum a da)^2 / 2 over all but the channels: the Fisher of a gate on each channel (arXiv 1801.05787).

    Args:
        activations: a [N, ..., C, ...].
        gradients: Gradients of each sample's own loss with respect to them.
        axis: The channels' axis, not 0.

    Raises:
        ConfigError: other shapes, no tensors, or the axis of the samples.
        DataError: values that are not finite.
    """
    a, g = _wide(activations, "activations"), _wide(gradients, "gradients")
    check_axis(axis, a, "activations")
    if a.shape != g.shape or axis % a.ndim == 0:
        shapes = f"{tuple(activations.shape)}, {tuple(gradients.shape)}"
        raise ConfigError(f"`activations` and `gradients` (={shapes}) must be alike, and `axis` (={axis}) not 0")
    product = (a * g).movedim(axis, 1)
    return channel_scores([product.flatten(2).sum(2) if product.ndim > 2 else product])


def channel_scores(
    sums: Sequence[Float[Tensor, "n channels"]], cost: Float[Tensor, " channels"] | float | None = None
) -> Float[Tensor, " channels"]:
    """mean_n (sum over members of a da)^2 / 2 over the cost: coupled channels (Liu et al., arXiv 2108.00708).

    The members' sums are added in each sample before they are squared.

    Args:
        sums: For each coupled member, the sum of a da over its positions, by sample and channel.
        cost: What removing one channel saves; None = 1.

    Raises:
        ConfigError: no members, other shapes, no samples, or a cost that is not positive and finite.
        DataError: sums that are not finite.

    >>> members = [torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [0.0]])]
    >>> float(channel_scores(members))    # squares first would give 1.5
    2.5
    """
    sums = check_listed(sums, "sums", Tensor)
    if not sums or any(each.shape != sums[0].shape or each.ndim != 2 or not len(each) for each in sums):
        shapes = [tuple(each.shape) for each in sums]
        raise ConfigError(f"`sums` (={shapes}) must be alike, (N, channels), at least one of at least one sample")
    score = 0.5 * torch.stack([each.detach().double() for each in sums]).sum(0).square().mean(0)
    if not bool(score.isfinite().all()):
        raise DataError("`sums` hold values that are not finite, or are too large to be squared")
    if cost is None:
        return score
    if not isinstance(cost, Tensor):
        check_number(cost, "cost", 0, above=True)
    price = torch.as_tensor(cost, dtype=torch.float64, device=score.device)
    if price.shape not in ((), score.shape) or not bool(((price > 0) & price.isfinite()).all()):
        raise ConfigError(f"`cost` (={shown(cost)}) must be positive and finite, a number or one for each channel")
    return score / price


def _indices(removed: Any) -> list[int]:
    many = removed.tolist() if hasattr(removed, "tolist") else removed
    try:
        chosen = list(many) if isinstance(many, Iterable) else [many]
        if not any(isinstance(each, bool) or getattr(each, "dtype", None) == torch.bool for each in chosen):
            return [operator.index(each) for each in chosen]
    except TypeError as error:
        raise ConfigError(f"`removed` (={removed!r}) must be an index, or several") from error
    raise ConfigError(f"`removed` (={removed!r}) must be indices, not a mask")


def _wide(tensor: Tensor, name: str) -> Tensor:
    """A real tensor in float64; raises DataError where it is not finite."""
    check_kind(tensor, name, Tensor)
    if tensor.is_complex():
        raise ConfigError(f"`{name}` (={tensor.dtype}) must be real")
    wide = tensor.detach().double()
    if bad := int((~wide.isfinite()).sum()):
        raise DataError(f"`{name}` has {bad} values that are not finite")
    return wide


def _check_gradients(gradients: Tensor, weight: Tensor) -> None:
    check_kind(gradients, "gradients", Tensor)
    if not gradients.ndim or gradients.shape[1:] != weight.shape or not len(gradients):
        raise ConfigError(f"`gradients` (={tuple(gradients.shape)}) must be (N, *{tuple(weight.shape)}), N at least 1")


def _flat(weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    weight, inverse = _wide(weight, "weight"), _wide(inverse, "inverse")
    if weight.ndim != 1 or inverse.shape != (len(weight), len(weight)):
        shapes = f"{tuple(weight.shape)}, {tuple(inverse.shape)}"
        raise ConfigError(f"`weight` and `inverse` (={shapes}) must be (n,) and (n, n)")
    return weight, inverse


def _positive(diagonal: Tensor) -> Tensor:
    if not bool((diagonal > 0).all()):
        raise DataError("the diagonal of `inverse` is not positive; add damping before inverting")
    return diagonal
