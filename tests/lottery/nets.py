"""A tiny task for the tests: real training, a few milliseconds a round."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxsparse.training.loop import Samples, Task


class Tiny(nn.Module):
    """Linear layers, batch normalisation, dropout, a convolution: every kind of state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 3, padding=1)
        self.bn = nn.BatchNorm1d(3)
        self.fc = nn.Linear(18, 7)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn(self.conv(x[:, None])))
        return self.out(self.drop(torch.relu(self.fc(y.flatten(1)))))


SIZES = {"conv.weight": 9, "fc.weight": 126, "out.weight": 21}


def samples(count: int, seed: int = 0) -> Samples:
    """Three noisy classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(9))
    return Samples(centres[labels] + 0.7 * torch.randn(count, 6, generator=generator), labels)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Momentum and decay: both would move dead weights if they could."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2)


def cosine(optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule with state."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)


def tiny_task(**options: Any) -> Task:
    """Four steps an epoch, three epochs."""
    defaults: dict[str, Any] = {
        "build": Tiny,
        "train": samples(30),
        "validation": samples(20, 1),
        "epochs": 3,
        "batch_size": 8,
        "optimizer": sgd,
        "scheduler": cosine,
    }
    return Task(**{**defaults, **options})
