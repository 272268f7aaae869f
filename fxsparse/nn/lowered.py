"""Layers as gathers and small dense products, for models that no graph can be taken of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class GatheredConv(nn.Module):
    """Gathers of channels, each followed by a grouped convolution, joined: what a sparse convolution computes.

    Args:
        positions: For each part, the input channels that it reads, group after group, int64.
        blocks: For each part, the weight (rows, channels of a group, *kernel).
        biases: For each part, the bias (rows), or None.
        groups: For each part, its groups.
        rows: int64, where each output channel is among those computed; None for its own place.
        stride: As in torch.
        padding: As in torch, numbers or "same" or "valid"; zeros are padded.
        dilation: As in torch.
    """

    def __init__(
        self,
        positions: Sequence[Tensor],
        blocks: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        groups: Sequence[int],
        rows: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.blocks = nn.ParameterList(blocks)
        self.biases = nn.ParameterList([bias for bias in biases if bias is not None])
        for i, found in enumerate(positions):
            self.register_buffer(f"positions{i}", found)
        self.register_buffer("rows", rows)

    def forward(self, input: Tensor) -> Tensor:
        """The output channels of an input (batch, channels, *space)."""
        parts = []
        for i, groups in enumerate(self.groups):
            gathered = input.index_select(1, self.get_buffer(f"positions{i}"))
            bias = self.biases[i] if len(self.biases) else None
            convolve = _CONVOLUTIONS[input.ndim - 2]
            parts.append(convolve(gathered, self.blocks[i], bias, self.stride, self.padding, self.dilation, groups))
        made = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        rows: Tensor | None = self._buffers["rows"]
        return made if rows is None else made.index_select(1, rows)

    def extra_repr(self) -> str:
        """Groups and rows."""
        return ", ".join(f"{n} groups of {len(w) // n} rows" for n, w in zip(self.groups, self.blocks, strict=True))


class GatheredLinear(GatheredConv):
    """The same for the last axis of an input of any number of axes."""

    def forward(self, input: Tensor) -> Tensor:
        """The output features of an input (*, features)."""
        columns = input.reshape(-1, input.shape[-2] if input.ndim > 2 else 1, input.shape[-1])
        if input.ndim == 2:  # the batch is what a product runs along
            columns = columns.transpose(0, 1)
        made = super().forward(columns.transpose(1, 2)).transpose(1, 2)
        if input.ndim == 2:
            made = made.transpose(0, 1)
        return made.reshape(*input.shape[:-1], made.shape[-1])
