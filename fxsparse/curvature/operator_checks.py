"""What is refused before an operator is used: options, and data or models that do not repeat themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxsparse.curvature.operator_space import ParameterSpace
from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity.random import generator


def check_options(chunk: int | None, damping: float, unit: str, draws: int) -> None:
    """Raise ConfigError for an option out of range."""
    if chunk is not None and chunk < 1:
        raise ConfigError(f"`chunk` (={chunk}) must be at least 1, or None")
    if not damping >= 0:
        raise ConfigError(f"`damping` (={damping}) must be at least 0")
    if unit not in ("sample", "token"):
        raise ConfigError(f"`unit` (={unit!r}) must be sample or token")
    if draws < 1:
        raise ConfigError(f"`draws` (={draws}) must be at least 1")


def check_repeats(product: Callable[[Tensor], tuple[Tensor, int]], space: ParameterSpace, seed: int) -> None:
    """Raise DataError where two products with one vector, or their units M, differ."""
    source = generator(seed, 0, 0, "determinism")
    v = torch.randn(space.size, generator=source, dtype=torch.float64).to(dtype=space.dtype, device=space.device)
    first, m = product(v)
    second, again = product(v)
    scale = float(first.abs().max())
    worst = float((first - second).abs().max())
    tolerance = 1e-9 if space.dtype is torch.float64 else 1e-3
    if m != again or not worst <= tolerance * max(scale, torch.finfo(space.dtype).tiny):
        raise DataError(
            f"two products with one vector differ by {worst:.3g} of {scale:.3g} (M = {m}, {again}): the data "
            "change between passes (shuffling, augmentation), the model draws random numbers, or values are not "
            "finite; mend that, or give check=False"
        )
