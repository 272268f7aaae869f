"""Which torch class has which sparse class."""

from __future__ import annotations

from torch import nn

from fxsparse.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from fxsparse.nn.linear import Linear
from fxsparse.nn.sparse_module import SparseModule

SPARSE_TYPES: dict[type[nn.Module], type[SparseModule]] = {
    kind.dense_type: kind
    for kind in (Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)
}
"""Exact torch class -> sparse class. A subclass is no key: it may compute something else."""
