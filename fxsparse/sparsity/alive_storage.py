"""Alive-only storage of a weight with shared support."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int32, Shaped
from torch import Tensor

from fxsparse.errors import DataError
from fxsparse.sparsity.layout import LINEAR, Layout
from fxsparse.sparsity.shared_support import SharedSupport, SupportUnits


@dataclass(frozen=True)
class AliveStorage:
    """The alive values of a weight and where they are.

    Attributes:
        units: Segments and units of the weight.
        values: [groups, G, k], or [groups, G, k, kernel] where a position is a channel of a convolution. Rows missing
            in the last group are zeros and never read.
        positions: Alive positions of each group, ascending, int32 [groups, k].
    """

    units: SupportUnits
    values: Shaped[Tensor, "groups rows k ..."]
    positions: Int32[Tensor, "groups k"]

    @staticmethod
    def pack(
        weight: Shaped[Tensor, "*shape"],
        mask: Bool[Tensor, "*shape"],
        pattern: SharedSupport,
        layout: Layout = LINEAR,
        row_order: Tensor | None = None,
    ) -> AliveStorage:
        """Store a weight whose dead elements are exact zeros.

        Raises:
            ConfigError: the mask breaks the pattern.
            DataError: a dead element is not zero, and would be lost.
        """
        pattern.check(mask, layout, row_order)
        weight = weight.detach()
        lost = int(((weight != 0) & ~mask).sum())
        if lost:
            raise DataError(f"{lost} dead elements of the weight are not zero; apply the mask before packing")
        units = pattern.units(weight.shape, layout, row_order)
        chosen = units.collect(mask)
        positions = chosen.nonzero()[:, 1].reshape(units.segments, -1)
        grouped = units.grouped(units.rows(weight))
        index = positions[:, None, :, None].expand(-1, units.group, -1, grouped.shape[3])
        values = grouped.gather(2, index)
        return AliveStorage(units, values if grouped.shape[3] > 1 else values[..., 0], positions.to(torch.int32))

    def unpack(self) -> tuple[Tensor, Tensor]:
        """The weight and its mask, bit for bit as they were packed (dead zeros become +0)."""
        units = self.units
        positions = self.positions.to(torch.int64)
        chosen = torch.zeros(units.segments, units.width, dtype=torch.bool, device=positions.device)
        chosen.scatter_(1, positions, True)
        values = self.values if self.values.ndim == 4 else self.values[..., None]
        kernel = values.shape[3]
        grouped = values.new_zeros(units.segments, units.group, units.width, kernel)
        grouped.scatter_(2, positions[:, None, :, None].expand_as(values), values)
        return units.from_rows(grouped.flatten(0, 1)), units.spread(chosen)
