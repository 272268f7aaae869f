"""A symmetric linear operator by scipy's names, made of products with vectors and columns."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class SymmetricOperator(abc.ABC):
    """What `scipy.sparse.linalg.aslinearoperator` asks for, beside `shape` and `dtype`."""

    @abc.abstractmethod
    def mv(self, v: Any) -> Any:
        """G v."""

    @abc.abstractmethod
    def mm(self, columns: Any) -> Any:
        """G V for columns V [P, k]."""

    def matvec(self, v: Any) -> Any:
        """`mv`, by scipy's name."""
        return self.mv(v)

    def rmatvec(self, v: Any) -> Any:
        """`mv`: the operator is symmetric."""
        return self.mv(v)

    def matmat(self, columns: Any) -> Any:
        """`mm`, by scipy's name."""
        return self.mm(columns)

    def rmatmat(self, columns: Any) -> Any:
        """`mm`: the operator is symmetric."""
        return self.mm(columns)

    def __matmul__(self, other: Any) -> Any:
        return self.mm(other) if not isinstance(other, Mapping) and other.ndim == 2 else self.mv(other)


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The dtype as numpy has it; float32 for bfloat16, which numpy does not have and float32 holds exactly."""
    return to_numpy(torch.empty(0, dtype=dtype)).dtype


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The values in the dtype that `numpy_dtype` says."""
    found: npt.NDArray[Any] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).cpu().numpy()
    return found
