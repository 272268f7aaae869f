"""What taps find, held against a collector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxsparse.curvature import FisherCollector


def collected(model: nn.Module, *batches: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Group statistics by parameter, as a collector of its own finds them."""
    collector = FisherCollector(model)
    for batch in batches:
        collector.update(batch)
    return {key.split("|")[1]: value for key, value in collector.get().items()}


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found and set(found) <= set(expected)
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-10, atol=1e-18), name
