"""What a call of a torch function tells Python code."""

from __future__ import annotations

from typing import Any

import torch

VALUES = frozenset(
    "item tolist equal allclose is_nonzero __bool__ __int__ __float__ __index__ __complex__ __contains__".split()
)
"""Functions that give Python the value of a tensor."""
PROPERTIES = frozenset(
    "shape size dim ndim ndimension numel nelement stride storage_offset dtype device layout requires_grad is_leaf "
    "is_contiguous is_floating_point is_complex is_signed is_conj is_neg is_inference is_cuda is_cpu is_meta is_mps "
    "is_xpu is_sparse is_sparse_csr is_quantized is_nested is_mkldnn is_same_size get_device element_size itemsize "
    "nbytes type grad_fn grad names has_names result_type can_cast broadcast_shapes __len__ __hash__".split()
)
"""Functions that give Python what the values do not change."""
SIZES = frozenset("shape size numel nelement stride __len__ nbytes".split())
"""Those of `PROPERTIES` that change with the shape."""
SHAPED_BY_VALUES = frozenset(
    "nonzero argwhere masked_select unique unique_consecutive _unique2 bincount repeat_interleave where histogram "
    "combinations".split()
)
"""Functions whose outputs may have shapes that depend on values."""


def name_of(func: Any) -> str:
    """The plain name of a torch function, method or property."""
    name = str(getattr(func, "__name__", ""))
    if name == "__get__":
        owner = func.__self__
        return str(getattr(owner, "__name__", "") or getattr(getattr(owner, "fget", None), "__name__", ""))
    return name.split(".")[0] if isinstance(func, torch._ops.OpOverload) else name
