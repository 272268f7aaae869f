"""What is refused before an operator is used: options, and data or models that do not repeat themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxsparse.curvature.operator_space import ParameterSpace
from fxsparse.errors import ConfigError, DataError
from fxsparse.graph.scopes import seeded
from fxsparse.sparsity.random import generator

_OTHER = 0x5BD1E995  # added to the caller's seed, for the second product


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
    """Raise DataError where two products with one vector, or their units M, differ.

    The second runs from another state of the global generators, so that data or a model that draw from them differ; the
    caller's state is as before afterwards. Samples in another order differ by rounding, which the tolerance allows.
    """
    source = generator(seed, 0, 0, "determinism")
    v = torch.randn(space.size, generator=source, dtype=torch.float64).to(dtype=space.dtype, device=space.device)
    first, m = product(v)
    with seeded((torch.initial_seed() + _OTHER) % 2**32):
        second, again = product(v)
    scale = float(first.abs().max())
    worst = float((first - second).abs().max())
    tolerance = 1e-9 if space.dtype is torch.float64 else max(1e-3, 8 * torch.finfo(space.dtype).eps)
    if m != again or not worst <= tolerance * max(scale, torch.finfo(space.dtype).tiny):
        raise DataError(
            f"two products with one vector differ by {worst:.3g} of {scale:.3g} (M = {m}, {again}): the data "
            "change between passes (shuffling, augmentation), the model draws random numbers, or values are not "
            "finite; mend that, or give check=False"
        )


def check_vector(v: Any) -> None:
    """Raise ConfigError for what is no tensor or array with an axis."""
    if not isinstance(v, Tensor | np.ndarray) or v.ndim < 1:
        shown = tuple(v.shape) if isinstance(v, Tensor | np.ndarray) else type(v).__name__
        raise ConfigError(f"`v` (={shown}) must be a torch tensor, a numpy array, or tensors by parameter name")
