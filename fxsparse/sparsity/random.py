"""Random draws that depend on nothing but their key."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Generator, Tensor


def generator(seed: int, tensor_index: int, update_index: int, purpose: str) -> Generator:
    """A fresh CPU generator for one draw; the same key gives the same draw in every process.

    Args:
        seed: The user's seed.
        tensor_index: Position of the weight in the model's order.
        update_index: Number of the mask update; 0 for initial masks.
        purpose: What is drawn, such as "initial_mask" or "grow".
    """
    key = f"{int(seed)}/{int(tensor_index)}/{int(update_index)}/{purpose}".encode()
    state = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(state)


def random_scores(shape: Sequence[int], generator: Generator) -> Float64[Tensor, "*shape"]:
    """Float64 draws of U(0, 1) on the CPU; their top-k is a uniformly random k-subset."""
    return torch.rand(tuple(shape), dtype=torch.float64, generator=generator, device="cpu")
