"""Layer norm over features of which some, all zero, are not stored any more."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SizedLayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over `total` features of which only the first `normalized_shape[0]` are there.

    The others are zero: they count in mean and variance, so that the layer equals the one that had them. Made by
    `SizedLayerNorm.of`.

    Attributes:
        total: the number of features that mean and variance count.
    """

    total: int

    @classmethod
    def of(cls, module: nn.LayerNorm) -> SizedLayerNorm:
        """Turn torch's layer, over one dimension, into this one in place: parameters, masks and hooks stay."""
        if not isinstance(module, cls):
            module.__dict__["total"] = int(module.normalized_shape[0])
            module.__class__ = cls
        assert isinstance(module, cls)
        return module

    def forward(self, input: Tensor) -> Tensor:
        """(..., features) -> (..., features)."""
        size = input.shape[-1]
        wide = (0, self.total - size)
        weight = None if self.weight is None else F.pad(self.weight, wide)
        bias = None if self.bias is None else F.pad(self.bias, wide)
        return F.layer_norm(F.pad(input, wide), (self.total,), weight, bias, self.eps)[..., :size]

    def extra_repr(self) -> str:
        """As torch's, with `total`."""
        return f"{super().extra_repr()}, total={self.total}"
