"""Supports that several rows share, chosen by what the rows lose together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from fxsparse.curvature.compensate_solve import CHUNK, inverse
from fxsparse.sparsity import Layout, Units


@dataclass(frozen=True, eq=False)
class SharedUnits:
    """Units that are the same positions in every row of their segment.

    Attributes:
        segment: The segment of every row.
        positions: The positions of every unit, [segments, units, positions of a unit].
    """

    segment: Int64[Tensor, " rows"]
    positions: Int64[Tensor, "segments units each"]

    @staticmethod
    def of(units: Units, layout: Layout, device: torch.device) -> SharedUnits | None:
        """The shared units of a weight, or None where a row has units of several segments, or of its own."""
        numbers = torch.arange(units.segments * units.width, device=device).reshape(units.segments, units.width)
        matrix = layout.to_rows(units.spread(numbers)).flatten(1)
        segment = matrix[:, 0] // units.width
        if not bool((matrix // units.width == segment[:, None]).all()):
            return None
        first = torch.full((units.segments,), len(matrix), device=device)
        first.scatter_reduce_(0, segment, torch.arange(len(matrix), device=device), "amin")
        if bool((first == len(matrix)).any()) or not torch.equal(matrix, matrix[first][segment]):
            return None
        if matrix.shape[1] % units.width or not bool(
            (matrix[first].sort(dim=1).values.reshape(units.segments, units.width, -1) == numbers[..., None]).all()
        ):
            return None
        order = matrix[first].sort(dim=1, stable=True).indices
        return SharedUnits(segment, order.reshape(units.segments, units.width, -1))


def eliminate(
    weight: Float64[Tensor, "rows n"],
    gram: Float64[Tensor, "classes n n"],
    of_row: Int64[Tensor, " rows"],
    shared: SharedUnits,
    keep: int,
    rounds: int,
) -> Bool[Tensor, "rows n"]:
    """The mask in which every segment keeps `keep` units, removed a few at a time where all of its rows lose least.

    What removing unit Q costs is the sum over the rows of the segment of w_Q ([H^-1]_QQ)^-1 w_Q^T / 2, with w the
    compensated weights and H that of the units still there; both are exact in every round. Within a round units are
    removed by their single costs. With `rounds` = units - keep one at a time goes, which is greedy OBS.

    Args:
        weight: The rows.
        gram: H, positive definite.
        of_row: Class of every row.
        shared: Segments and units.
        keep: Units that each segment keeps.
        rounds: Steps in which they are removed; their numbers fall by a constant factor.

    Raises:
        DataError: a matrix is not positive definite.
    """
    segments, width, _ = shared.positions.shape
    inverses, target = inverse(gram), torch.empty_like(weight)
    for place, matrix in enumerate(gram):
        target[of_row == place] = weight[of_row == place] @ matrix
    steps = _steps(width, keep, rounds)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    per_chunk = max(1, CHUNK // (steps[0] * shared.positions.shape[2]) ** 2) if steps else segments
    for some in torch.split(torch.arange(segments, device=weight.device), per_chunk):
        items = _items(shared, of_row, some)
        alive = torch.arange(width, device=weight.device).expand(len(some), -1)
        costs = items.first_costs(weight, inverses, shared)
        for number, count in enumerate(steps):
            kept = costs.topk(count, dim=1).indices.sort(dim=1).values
            alive = alive.gather(1, kept)
            if number + 1 < len(steps):
                costs = items.costs(target, gram, shared, alive)
        places = shared.positions[some[:, None], alive].flatten(1)
        for item, segment in zip(items.rows, items.segment.tolist(), strict=True):
            mask[item[:, None], places[segment]] = True
    return mask


def _steps(width: int, keep: int, rounds: int) -> list[int]:
    """Numbers of units after each round: geometric, strictly falling, the last one `keep`."""
    rounds = min(rounds, width - keep)
    found: list[int] = []
    now = width
    for number in range(1, rounds + 1):
        left = rounds - number
        now = max(keep + left, min(now - 1, round(width * (keep / width) ** (number / rounds))))
        found.append(now)
    return found


@dataclass(frozen=True, eq=False)
class _Items:
    """Rows of one segment and one class, of some segments.

    Attributes:
        some: The segments.
        rows: The rows of every item.
        segment: Place in `some` of every item's segment.
        of: Class of every item.
    """

    some: Int64[Tensor, " some"]
    rows: tuple[Int64[Tensor, " members"], ...]
    segment: Int64[Tensor, " items"]
    of: Int64[Tensor, " items"]

    def first_costs(self, weight: Tensor, inverses: Tensor, shared: SharedUnits) -> Float64[Tensor, "some units"]:
        """Costs of the units of whole rows, whose inverses all segments share."""
        found = []
        for rows, segment, of in zip(self.rows, self.segment.tolist(), self.of.tolist(), strict=True):
            places = shared.positions[self.some[segment]]
            blocks = inverses[of][places[:, :, None], places[:, None, :]]
            found.append(_unit_costs(weight[rows][:, places].transpose(0, 1), blocks))
        return self._summed(torch.stack(found))

    def costs(self, target: Tensor, gram: Tensor, shared: SharedUnits, alive: Tensor) -> Float64[Tensor, "some units"]:
        """Costs of the alive units, after the weights on them have taken over what they can; `target` is w H."""
        places = shared.positions[self.some[:, None], alive].flatten(1)[self.segment]
        inverses = inverse(gram[self.of[:, None, None], places[:, :, None], places[:, None, :]])
        count, each = alive.shape[1], shared.positions.shape[2]
        split = inverses.reshape(len(self.of), count, each, count, each)
        blocks = split.diagonal(dim1=1, dim2=3).movedim(-1, 1)
        found = []
        for at, rows in enumerate(self.rows):
            now = target[rows][:, places[at]] @ inverses[at]
            found.append(_unit_costs(now.reshape(len(rows), count, each).transpose(0, 1), blocks[at]))
        return self._summed(torch.stack(found))

    def _summed(self, found: Tensor) -> Tensor:
        zeros = found.new_zeros(len(self.some), found.shape[1])
        return zeros.index_add_(0, self.segment, found)


def _items(shared: SharedUnits, of_row: Tensor, some: Tensor) -> _Items:
    classes = int(of_row.max()) + 1
    key = shared.segment * classes + of_row
    rows, segment, of = [], [], []
    for place, number in enumerate(some.tolist()):
        for kind in range(classes):
            members = (key == number * classes + kind).nonzero().flatten()
            if len(members):
                rows.append(members)
                segment.append(place)
                of.append(kind)
    device = of_row.device
    return _Items(some, tuple(rows), torch.tensor(segment, device=device), torch.tensor(of, device=device))


def _unit_costs(
    values: Float64[Tensor, "units rows each"], blocks: Float64[Tensor, "units each each"]
) -> Float64[Tensor, " units"]:
    """Sum over rows of w_Q ([H^-1]_QQ)^-1 w_Q^T / 2."""
    if blocks.shape[-1] == 1:
        return values.square().sum((1, 2)) / (2 * blocks[:, 0, 0])
    solved: Tensor = torch.linalg.solve(blocks, values.mT)
    return (solved * values.mT).sum((1, 2)) / 2
