"""The linear layer with a mask."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.nn.sparse_module import SparseModule, spec_of
from fxsparse.sparsity import Pattern


class Linear(SparseModule, nn.Linear):
    """`torch.nn.Linear` whose weight (out_features, in_features) is masked: y = x where(mask, W, 0)^T + b.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        bias: Whether a bias is added.
        device: Device of parameters and mask.
        dtype: Data type of the parameters.
        pattern: Which masks are legal; unstructured by default.
        mask: The initial mask, bool (out_features, in_features), copied; all True by default.

    Raises:
        ConfigError: the mask has another dtype or shape, or breaks the pattern.
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | None = None,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._install(spec_of(self, pattern), mask)

    def reset_parameters(self) -> None:
        """Draw the parameters as torch does; dead weights become zero."""
        super().reset_parameters()
        self.apply_mask_()

    def forward(self, input: Tensor) -> Tensor:
        """The masked linear map of an input (*, in_features)."""
        fast = self.fast_output(input)
        return F.linear(input, self.effective_weight, self.bias) if fast is None else fast
