"""A small model with dead channels, masks with dead rows, and equality in eval mode."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.nn import masks, set_masks


def net() -> tuple[nn.Module, Tensor]:
    """Two dead channels in each of two hidden layers."""
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(4, 5)
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0.0
        model[2].weight[[0, 5]] = 0.0
    return model, x


def killed(model: nn.Module, x: Tensor, include: str | None = None, **rows: list[int]) -> nn.Module:
    """The sparse model with dead rows: a__weight=[0] kills row 0 of a.weight."""
    sparse = fxsparse.transform(model, (x,), include=include)
    chosen = {name: mask.clone() for name, mask in masks(sparse).items()}
    for name, indices in rows.items():
        chosen[name.replace("__", ".")][indices] = False
    set_masks(sparse, chosen)
    return sparse


def assert_equal(small: nn.Module, model: nn.Module, x: Tensor, tolerance: float = 1e-6) -> None:
    small, model = copy.deepcopy(small).eval(), copy.deepcopy(model).eval()
    with torch.no_grad():
        expected, found = model(x), small(x)
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
