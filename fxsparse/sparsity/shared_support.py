"""Shared support: groups of rows that are alive on one set of positions."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor
from torch.nn.functional import pad

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import Target, check_count
from fxsparse.sparsity.layout import LINEAR, Layout
from fxsparse.sparsity.pattern import Pattern
from fxsparse.sparsity.top_k import order_scores
from fxsparse.sparsity.units import Pooling, Units

_BLOCK = 1 << 18  # entries of a large weight whose scores are summed at a time


class Positions(enum.Enum):
    """What a position of a convolution is; for a linear layer both are the input feature."""

    CHANNEL = "channel"  # an input channel with all its kernel offsets
    ELEMENT = "element"  # an input channel at one kernel offset


@dataclass(frozen=True)
class SupportUnits(Units):
    """Every group of rows is a segment, every position a unit."""

    layout: Layout
    group: int
    positions: Positions
    row_order: Int64[Tensor, " rows"] | None = field(default=None, compare=False)

    def pool(self, scores: Tensor, pooling: Pooling = Pooling.RMS) -> Tensor:
        """Float64 score of every position over the rows of its group (and the kernel), [groups, positions]."""
        if scores.is_complex():
            return order_scores(scores)  # raises
        return self.pool_made(lambda each: each, (scores.detach(),), pooling)

    def pool_made(
        self, made: Callable[..., Tensor], tensors: Sequence[Shaped[Tensor, "*shape"]], pooling: Pooling = Pooling.RMS
    ) -> Float64[Tensor, "groups positions"]:
        """`pool` of the scores that `made` makes of tensors of the weight's shape, entry by entry.

        Large weights are read some groups at a time; sums have the same bits as those of all groups at once.

        Raises:
            DataError: a score is NaN.
        """
        lines = [self._lines(each) for each in tensors]
        blocks = (self._summed(made(*(self._taken(each, *b) for each in lines)), pooling, *b) for b in self._blocks())
        summed = torch.cat(list(blocks))
        if bool(summed.isnan().any()):
            order_scores(made(*tensors))  # raises, but where infinities cancel
        if pooling is Pooling.SUM:
            return summed
        mean = summed / (self.group_sizes().to(summed.device)[:, None] * lines[0].shape[2])
        return mean.sqrt() if pooling is Pooling.RMS else mean

    def _blocks(self) -> list[tuple[int, int]]:
        """Ranges of segments; as many in each as there are threads, so that threads share out whole segments."""
        most = 1 if self._parts > 1 else self.segments // torch.get_num_threads()
        count = max(1, min(math.ceil(self.numel / _BLOCK), most))
        return [(self.segments * i // count, self.segments * (i + 1) // count) for i in range(count)]

    def _taken(self, lines: Tensor, begin: int, end: int) -> Tensor:
        """The rows of these segments, in the row order."""
        first, last = (0, len(lines)) if self._parts > 1 else (begin * self.group, min(end * self.group, len(lines)))
        if self.row_order is None:
            return lines[first:last]
        return lines.index_select(0, self.row_order[first:last].to(lines.device))

    def _summed(self, scores: Tensor, pooling: Pooling, begin: int, end: int) -> Tensor:
        """The sum of each position of these segments."""
        rows = scores.double().contiguous()  # one memory layout, one rounding
        return self.grouped(rows * rows if pooling is Pooling.RMS else rows + 0.0, end - begin).sum((1, 3))

    def spread(self, chosen: Tensor) -> Tensor:
        """[groups, positions] -> shape."""
        matrix = chosen.repeat_interleave(self.group, 0)[..., None]
        return self.from_rows(matrix.expand(-1, -1, self.numel // (self.width * self._rows)))

    def collect(self, mask: Tensor) -> Tensor:
        """Shape -> [groups, positions], read at the first row of each group."""
        return self._by_part(self.rows(mask)[..., 0])[:, :: self.group].flatten(0, 1).clone()  # keeps no mask alive

    def rows(self, tensor: Tensor) -> Tensor:
        """Shape -> [rows, positions, elements of a position in a row], rows in the row order."""
        rows = self._lines(tensor)
        return rows if self.row_order is None else rows.index_select(0, self.row_order.to(rows.device))

    def _lines(self, tensor: Tensor) -> Tensor:
        """As `rows`, in the natural order."""
        rows = self.layout.to_rows(tensor)
        return rows.reshape(rows.shape[0], -1, 1) if self.positions is Positions.ELEMENT else rows

    def group_sizes(self) -> Int64[Tensor, " segments"]:
        """Rows of each group (CPU)."""
        sizes = torch.full((self._parts, self.segments // self._parts), self.group)
        sizes[:, -1] -= sizes[0].sum() - self._rows // self._parts
        return sizes.flatten()

    def alive_elements(self, target: float | Target) -> int:
        """Exact: k positions in every row."""
        return int(self.counts(target)[0]) * (self.numel // self.width)

    def grouped(self, rows: Tensor, segments: int | None = None) -> Tensor:
        """[rows, ...] -> [segments, group, ...]; rows missing in the last group (of a part) hold 0."""
        count = self.segments if segments is None else segments
        missing = (count * self.group - rows.shape[0]) // self._parts
        padded = pad(self._by_part(rows), (0, 0, 0, 0, 0, missing)) if missing else rows
        return padded.reshape(count, self.group, *rows.shape[1:])

    def _by_part(self, rows: Tensor) -> Tensor:
        return rows.reshape(self._parts, -1, *rows.shape[1:])

    @property
    def _parts(self) -> int:
        return self.layout.parts(self.shape)

    @property
    def _rows(self) -> int:
        return self.layout.matrix_shape(self.shape)[0]

    def from_rows(self, rows: Tensor) -> Tensor:
        """Inverse of `rows`; rows beyond the last one (of a part) are not read."""
        count, inputs, kernel = self.layout.matrix_shape(self.shape)
        matrix = self._by_part(rows)[:, : count // self._parts].flatten(0, 1)
        if self.row_order is not None:
            matrix = matrix[self.row_order.to(matrix.device).argsort()]
        return self.layout.from_rows(matrix.reshape(count, inputs, kernel), self.shape)


@dataclass(frozen=True)
class SharedSupport(Pattern):
    """Rows in groups of `group`; all rows of a group are alive on the same k = K(F, s) positions.

    k is the same for every group of the weight, so the alive values form one dense array [groups, group, k] and the
    product becomes one gather and one batched product. The last group may have fewer rows. In a weight of several parts
    (experts; q, k and v) no group has rows of two parts.

    Attributes:
        group: Rows of a group, G.
        positions: What a position of a convolution is.
    """

    group: int
    positions: Positions = Positions.CHANNEL

    def __post_init__(self) -> None:
        check_count(self.group, "group", 1)

    def units(self, shape: Sequence[int], layout: Layout = LINEAR, row_order: Tensor | None = None) -> SupportUnits:
        """One segment per group of rows; `row_order` (default: natural) lists the rows, group after group."""
        sizes = tuple(int(size) for size in shape)
        rows, inputs, kernel = layout.matrix_shape(sizes)
        parts = layout.parts(sizes)
        if row_order is not None:
            _check_permutation(row_order, rows, parts)
        width = inputs * kernel if self.positions is Positions.ELEMENT else inputs
        group = min(self.group, rows // parts)
        segments = parts * math.ceil(rows // parts / group)
        return SupportUnits(sizes, segments, width, layout, group, self.positions, row_order)

    def remark(self, shape: Sequence[int], layout: Layout = LINEAR) -> str | None:
        """Names a smaller last group."""
        rows = layout.matrix_shape(shape)[0] // layout.parts(shape)
        left = rows % self.group
        return f"the last group has {left} of {self.group} rows" if left and rows > self.group else None

    def _check_counts(self, chosen: Tensor, units: Units) -> None:
        alive = chosen.sum(1)
        k = int(alive[0])
        if k == 0:
            raise ConfigError(f"`mask` breaks {self}: group 0 has no alive position; keep at least one")
        broken = (alive != k).nonzero()
        if broken.numel():
            group = int(broken[0])
            raise ConfigError(
                f"`mask` breaks {self}: group {group} has {int(alive[group])} alive positions while group 0 has {k}; "
                "every group must have the same number"
            )


def _check_permutation(row_order: Tensor, rows: int, parts: int) -> None:
    if row_order.dtype != torch.int64 or row_order.shape != (rows,):
        raise ConfigError(
            f"`row_order` of `dtype` (={row_order.dtype}) and `shape` (={tuple(row_order.shape)}) must be int64 of the "
            f"{rows} rows"
        )
    if not torch.equal(row_order.sort().values, torch.arange(rows, device=row_order.device)):
        raise ConfigError(f"`row_order` must list each of the {rows} rows once, as torch.randperm(rows) does")
    owner = torch.arange(rows, device=row_order.device) // (rows // parts)
    if not torch.equal(owner[row_order], owner):
        raise ConfigError(
            f"`row_order` must keep the rows of each of the {parts} parts of the weight together, in order"
        )
