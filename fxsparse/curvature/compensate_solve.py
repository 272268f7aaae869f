"""Optimal brain surgeon on one layer: the least change of its outputs when some of its weights are dead.

The outputs of row w are w X; with H = X X^T the change by a new row v is (w - v) H (w - v)^T. Sources: Hassibi and
Stork, NeurIPS 1993 (OBS); Frantar and Alistarh, arXiv 2208.11580 (OBC) and arXiv 2301.00774 (SparseGPT, the solve by
columns). All tensors are float64; rows and positions are those of `Layout.to_rows`, flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float64, Int64, Shaped
from torch import Tensor

from fxsparse.errors import ConfigError, DataError

Chooser = Callable[[Shaped[Tensor, "rows columns"], Int64[Tensor, " columns"]], Bool[Tensor, "rows columns"]]
"""(scores of some columns, their positions) -> which of their weights stay alive."""

CHUNK = 2**24  # elements of the matrices that are factored together


def damped(gram: Float64[Tensor, "classes n n"], damping: float) -> Float64[Tensor, "classes n n"]:
    """H + lambda I with lambda = `damping` times the mean of diag(H); 1 where an input is always zero.

    Raises:
        ConfigError: `damping` is negative or not finite.
    """
    if not 0 <= damping < float("inf"):
        raise ConfigError(f"`damping` (={damping}) must be at least 0 and finite, as a share of the mean of diag(H)")
    diagonal = gram.diagonal(dim1=1, dim2=2)
    share = damping * diagonal.mean(1, keepdim=True)
    return gram + torch.diag_embed(share.expand_as(diagonal) + (diagonal == 0))


def factor(matrices: Float64[Tensor, "*batch n n"]) -> Float64[Tensor, "*batch n n"]:
    """Lower Cholesky factors.

    Raises:
        DataError: a matrix is not positive definite in float64.
    """
    found, info = torch.linalg.cholesky_ex(matrices)
    if bool(info.any()):
        raise DataError(
            "X X^T of the calibration inputs is not positive definite: inputs depend on each other; raise `damping`, "
            "or give more calibration samples"
        )
    return found  # type: ignore[no-any-return]  # torch


def inverse(matrices: Float64[Tensor, "*batch n n"]) -> Float64[Tensor, "*batch n n"]:
    """Inverses of positive definite matrices; see `factor`."""
    return torch.cholesky_inverse(factor(matrices))


def obs_scores(
    weight: Float64[Tensor, "rows n"], inverses: Float64[Tensor, "classes n n"], of_row: Int64[Tensor, " rows"]
) -> Float64[Tensor, "rows n"]:
    """w_q^2 / (2 [H^-1]_qq): how much half the squared change of the outputs grows when w_q alone is removed."""
    return weight.square() / (2 * inverses.diagonal(dim1=1, dim2=2)[of_row])


def change(
    weight: Float64[Tensor, "rows n"],
    new: Float64[Tensor, "rows n"],
    gram: Float64[Tensor, "classes n n"],
    of_row: Int64[Tensor, " rows"],
) -> float:
    """||(W - V) X||^2."""
    total = 0.0
    for place, matrix in enumerate(gram):
        rows = weight[of_row == place] - new[of_row == place]
        total += float(((rows @ matrix) * rows).sum())
    return max(0.0, total)


def restricted(
    weight: Float64[Tensor, "rows n"],
    gram: Float64[Tensor, "classes n n"],
    of_row: Int64[Tensor, " rows"],
    mask: Bool[Tensor, "rows n"],
) -> Float64[Tensor, "rows n"]:
    """The best alive weights for a given mask: v_A = (w H)_A (H_AA)^-1, zeros elsewhere.

    Rows of equal support share one factorisation. Dead entries of `weight` count as what they hold.

    Raises:
        DataError: a matrix is not positive definite.
    """
    new = torch.zeros_like(weight)
    for place, matrix in enumerate(gram):
        own = (of_row == place).nonzero().flatten()
        new[own] = _of_class(weight[own] @ matrix, matrix, mask[own])
    return new


def _of_class(target: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """`restricted` of one class; `target` is w H."""
    new = torch.zeros_like(target)
    supports, of, sizes = torch.unique(mask, dim=0, return_inverse=True, return_counts=True)
    members = torch.split(of.sort(stable=True).indices, sizes.tolist())
    counts = supports.sum(1)
    for some in of_equal_size(counts):
        k, most = int(counts[some].max()), int(sizes[some].max())
        if k == 0:
            continue
        places = supports[some].sort(dim=1, descending=True, stable=True).indices[:, :k]
        real = torch.arange(k, device=places.device) < counts[some][:, None]
        matrices = gram[places[:, :, None], places[:, None, :]]
        padding = torch.diag_embed((~real).to(gram.dtype))
        matrices = torch.where(real[:, :, None] & real[:, None, :], matrices, padding)
        rows = torch.full((len(some), most), -1, device=places.device)
        for at, index in enumerate(some.tolist()):
            rows[at, : len(members[index])] = members[index]
        wanted = torch.where(real[:, None, :], target[rows[:, :, None].clamp(min=0), places[:, None, :]], 0.0)
        solved = torch.cholesky_solve(wanted.mT, factor(matrices)).mT
        for at, index in enumerate(some.tolist()):
            own, alive = members[index], places[at, : int(counts[index])]
            new[own[:, None], alive] = solved[at, : len(own), : len(alive)]
    return new


def of_equal_size(counts: Int64[Tensor, " supports"]) -> Iterator[Int64[Tensor, " some"]]:
    """Supports (by number) of about equal size, few enough that their matrices are factored together."""
    order = counts.sort(stable=True).indices
    first = 0
    ascending = counts[order].tolist()
    while first < len(order):
        last = first + 1
        while last < len(order) and (last + 1 - first) * ascending[last] ** 2 <= CHUNK:
            last += 1
        yield order[first:last]
        first = last


def by_columns(
    weight: Float64[Tensor, "rows n"],
    gram: Float64[Tensor, "classes n n"],
    of_row: Int64[Tensor, " rows"],
    choose: Chooser,
    *,
    block: int = 128,
    select: int | None = None,
    order: Int64[Tensor, " n"] | None = None,
) -> tuple[Float64[Tensor, "rows n"], Bool[Tensor, "rows n"]]:
    """Prune and compensate column by column (SparseGPT): each error is made good by the columns that come after.

    Args:
        weight: The rows.
        gram: H, positive definite.
        of_row: Class of every row.
        choose: Which weights of the next columns stay; their scores are w^2 / (2 [H^-1 of the columns to come]_qq).
        block: Columns whose updates of the later ones are made together.
        select: Columns that are chosen together, a divisor of `block`; `block` by default.
        order: In which order columns come; as they are by default.

    Returns:
        The new weights and their mask.

    Raises:
        DataError: a matrix is not positive definite.
    """
    width = weight.shape[1]
    order = torch.arange(width, device=weight.device) if order is None else order
    back = order.argsort()
    now, alive = weight[:, order].clone(), torch.ones_like(weight, dtype=torch.bool)
    # the upper factor U of H^-1 = U^T U: row j of it is the update by column j, given that those before are done
    uppers = [factor(inverse(matrix[order][:, order])).mT for matrix in gram]
    members = [(of_row == place).nonzero().flatten() for place in range(len(gram))]
    diagonals = torch.stack([upper.diagonal() for upper in uppers])[of_row]
    select = min(block, select or block)
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.zeros(len(now), stop - start, dtype=now.dtype, device=now.device)
        for first in range(start, stop, select):
            last = min(first + select, stop)
            scores = now[:, first:last].square() / (2 * diagonals[:, first:last].square())
            alive[:, first:last] = choose(scores, order[first:last])
            for upper, rows in zip(uppers, members, strict=True):
                part = now[rows, start:stop]
                for column in range(first, last):
                    at = column - start
                    error = torch.where(alive[rows, column], 0.0, part[:, at]) / upper[column, column]
                    part[:, at:] -= error[:, None] * upper[column, column:stop]
                    errors[rows, at] = error
                now[rows, start:stop] = part
        for upper, rows in zip(uppers, members, strict=True):
            now[rows, stop:] -= errors[rows] @ upper[start:stop, stop:]
    return torch.where(alive, now, 0.0)[:, back], alive[:, back]


def restricted_least_squares(
    weight: Shaped[Tensor, "rows n"],
    gram: Shaped[Tensor, "n n"],
    mask: Bool[Tensor, "rows n"],
    damping: float = 0.0,
) -> Float64[Tensor, "rows n"]:
    """The weights on a mask whose outputs are closest to those of `weight`: argmin over V of ||(W - V) X||^2.

    Args:
        weight: W, one row for each output.
        gram: H = X X^T of the inputs.
        mask: Where V may differ from 0.
        damping: lambda over the mean of diag(H), for an H that is singular or measured on few samples.

    Returns:
        V, float64, zeros where the mask is False.

    Raises:
        ConfigError: shapes that do not belong together, or a negative damping.
        DataError: values that are not finite, or H (damped) is not positive definite.

    >>> gram, mask = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[False, True]])
    >>> restricted_least_squares(torch.ones(1, 2), gram, mask)
    tensor([[0.0000, 1.5000]], dtype=torch.float64)
    """
    if weight.ndim != 2 or gram.shape != (weight.shape[1],) * 2 or mask.shape != weight.shape:
        raise ConfigError(
            f"`weight` (={tuple(weight.shape)}) must be [rows, n], `gram` (={tuple(gram.shape)}) [n, n] and `mask` "
            f"(={tuple(mask.shape)}) [rows, n]"
        )
    if mask.dtype != torch.bool:
        raise ConfigError(f"`mask` of `dtype` (={mask.dtype}) must be torch.bool, True = alive; use mask.bool()")
    for name, values in (("weight", weight), ("gram", gram)):
        if bad := int((~values.isfinite()).sum()):
            raise DataError(f"`{name}` holds NaN or Inf (={bad} values); mend what it comes from")
    matrices = damped(gram.detach().double()[None], damping)
    of_row = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    return restricted(weight.detach().double(), matrices, of_row, mask)
