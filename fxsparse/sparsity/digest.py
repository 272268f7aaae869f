"""SHA-256 of tensors: the same content gives the same digest on any machine."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor


def fields_sha256(*fields: bytes) -> str:
    """Hex SHA-256 over the fields, each preceded by its length as little-endian uint64."""
    digest = hashlib.sha256()
    for part in fields:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.hexdigest()


def content_sha256(name: str, dtype: str, shape: Sequence[int], content: bytes) -> str:
    """Hex SHA-256 of (name, dtype, shape as compact JSON, raw little-endian bytes)."""
    sizes = json.dumps(list(shape), separators=(",", ":"))
    return fields_sha256(name.encode(), dtype.encode(), sizes.encode(), content)


def tensor_sha256(name: str, tensor: Shaped[Tensor, "*shape"]) -> str:
    """Hex SHA-256 of a named tensor; its dtype is spelt as in torch, "float32"."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes()
    return content_sha256(name, str(tensor.dtype).removeprefix("torch."), tensor.shape, content)
