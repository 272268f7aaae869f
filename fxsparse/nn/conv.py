"""Convolutions and transposed convolutions with a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.common_types import _size_1_t, _size_2_t, _size_3_t
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxsparse.nn.sparse_module import SparseModule, spec_of
from fxsparse.sparsity import Pattern

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class _Conv(SparseModule, _ConvNd):
    def reset_parameters(self) -> None:
        """Draw the parameters as torch does; dead weights become zero."""
        super().reset_parameters()
        self.apply_mask_()

    def forward(self, input: Tensor) -> Tensor:
        """The masked convolution of an input (N, in_channels, *spatial) or (in_channels, *spatial)."""
        fast = self.fast_output(input)
        return self._conv_forward(input, self.effective_weight, self.bias) if fast is None else fast


class _ConvTranspose(SparseModule, _ConvTransposeNd):
    def reset_parameters(self) -> None:
        """Draw the parameters as torch does; dead weights become zero."""
        super().reset_parameters()
        self.apply_mask_()

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The masked transposed convolution of an input (N, in_channels, *spatial) or (in_channels, *spatial).

        Args:
            input: The input.
            output_size: The spatial size of the output, where the stride leaves a choice.
        """
        axes, padding = len(self.kernel_size), self.padding
        assert not isinstance(padding, str)  # torch takes numbers only here
        size = None if output_size is None else list(output_size)
        steps, kernel, dilation = list(self.stride), list(self.kernel_size), list(self.dilation)
        added = self._output_padding(input, size, steps, list(padding), kernel, axes, dilation)
        weight = self.effective_weight
        transpose = _CONV_TRANSPOSE[axes - 1]
        return transpose(input, weight, self.bias, self.stride, padding, added, self.groups, self.dilation)


class Conv1d(_Conv, nn.Conv1d):
    """`torch.nn.Conv1d`, every argument of it, with a masked weight.

    The weight is (out_channels, in_channels / groups, k).
    Args and errors of `pattern` and `mask` as in `Linear`.
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv1d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: str | _size_1_t = 0,
        dilation: _size_1_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | None = None,
        mask: Tensor | None = None,
    ) -> None:
        sizes = (kernel_size, stride, padding, dilation)
        super().__init__(in_channels, out_channels, *sizes, groups, bias, padding_mode, device, dtype)
        self._install(spec_of(self, pattern), mask)


class Conv2d(_Conv, nn.Conv2d):
    """`torch.nn.Conv2d`, every argument of it, with a masked weight.

    The weight is (out_channels, in_channels / groups, kh, kw).
    Args and errors of `pattern` and `mask` as in `Linear`.
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | None = None,
        mask: Tensor | None = None,
    ) -> None:
        sizes = (kernel_size, stride, padding, dilation)
        super().__init__(in_channels, out_channels, *sizes, groups, bias, padding_mode, device, dtype)
        self._install(spec_of(self, pattern), mask)


class Conv3d(_Conv, nn.Conv3d):
    """`torch.nn.Conv3d`, every argument of it, with a masked weight.

    The weight is (out_channels, in_channels / groups, kd, kh, kw).
    Args and errors of `pattern` and `mask` as in `Linear`.
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv3d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_3_t,
        stride: _size_3_t = 1,
        padding: str | _size_3_t = 0,
        dilation: _size_3_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | None = None,
        mask: Tensor | None = None,
    ) -> None:
        sizes = (kernel_size, stride, padding, dilation)
        super().__init__(in_channels, out_channels, *sizes, groups, bias, padding_mode, device, dtype)
        self._install(spec_of(self, pattern), mask)


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d`, every argument of it, with a masked weight.

    The weight is (in_channels, out_channels / groups, k).
    Args and errors of `pattern` and `mask` as in `Linear`.
    """

    dense_type: ClassVar[type[nn.Module]] = nn.ConvTranspose1d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: _size_1_t = 0,
        output_padding: _size_1_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _size_1_t = 1,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | None = None,
        mask: Tensor | None = None,
    ) -> None:
        sizes = (kernel_size, stride, padding, output_padding)
        super().__init__(in_channels, out_channels, *sizes, groups, bias, dilation, padding_mode, device, dtype)
        self._install(spec_of(self, pattern), mask)


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`, every argument of it, with a masked weight.

    The weight is (in_channels, out_channels / groups, kh, kw).
    Args and errors of `pattern` and `mask` as in `Linear`.
    """

    dense_type: ClassVar[type[nn.Module]] = nn.ConvTranspose2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: _size_2_t = 0,
        output_padding: _size_2_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _size_2_t = 1,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | None = None,
        mask: Tensor | None = None,
    ) -> None:
        sizes = (kernel_size, stride, padding, output_padding)
        super().__init__(in_channels, out_channels, *sizes, groups, bias, dilation, padding_mode, device, dtype)
        self._install(spec_of(self, pattern), mask)


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d`, every argument of it, with a masked weight.

    The weight is (in_channels, out_channels / groups, kd, kh, kw).
    Args and errors of `pattern` and `mask` as in `Linear`.
    """

    dense_type: ClassVar[type[nn.Module]] = nn.ConvTranspose3d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_3_t,
        stride: _size_3_t = 1,
        padding: _size_3_t = 0,
        output_padding: _size_3_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _size_3_t = 1,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | None = None,
        mask: Tensor | None = None,
    ) -> None:
        sizes = (kernel_size, stride, padding, output_padding)
        super().__init__(in_channels, out_channels, *sizes, groups, bias, dilation, padding_mode, device, dtype)
        self._install(spec_of(self, pattern), mask)
