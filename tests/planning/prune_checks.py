"""What every pruned layer is asked: it equals the masked one, has the planned size, and trains on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.planning.prune_budgets import ChannelBudget
from fxsparse.planning.prune_channels import plan_channels
from fxsparse.planning.prune_plan import ChannelPlan


def filled(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def same(expected: Any, found: Any) -> bool:
    a, b = first(expected).detach(), first(found).detach()
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-12 * float(a.abs().max())


def pruned(model: nn.Module, inputs: tuple[Any, ...], density: float = 0.5, **options: Any) -> ChannelPlan:
    """Plan, apply, compare with the masked model, count, and train one step."""
    plan = plan_channels(model, inputs, budget=ChannelBudget(density), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    small = plan.apply(optimizer)
    with torch.no_grad():
        assert same(plan.masked().eval()(*inputs), small.eval()(*inputs))
    assert sum(p.numel() for p in small.parameters()) == plan.parameters[1] < plan.parameters[0]
    before = {name: value.clone() for name, value in small.named_parameters()}
    small.train()
    first(small(*inputs)).square().sum().backward()
    optimizer.step()
    moved = [name for name, value in small.named_parameters() if not torch.equal(value, before[name])]
    assert moved
    return plan
