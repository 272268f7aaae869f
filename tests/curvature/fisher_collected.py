"""What taps find, held against a collector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxsparse.curvature import FisherCollector


def collected(model: nn.Module, *batches: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Group statistics by parameter (`parameter|type` where it has several), as a collector of its own finds them."""
    collector = FisherCollector(model)
    for batch in batches:
        collector.update(batch)
    keys = [tuple(key.split("|")[1:]) for key in collector.get()]
    several = {name for name, _ in keys if len([key for key in keys if key[0] == name]) > 1}
    return {
        f"{name}|{kind}" if name in several else name: value
        for (name, kind), value in zip(keys, collector.get().values(), strict=True)
    }


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found and set(found) <= set(expected)
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-10, atol=1e-18), name
