"""A user's loop around RESU, for its tests."""

from __future__ import annotations

import torch
from torch import nn

from fxsparse.nn import Linear, Resurrection, masked_weights, masks
from fxsparse.sparsity import Uniform
from fxsparse.training import attach
from fxsparse.training.resu import RESU

TOTAL = 60


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            Linear(12, 16, dtype=dtype), nn.BatchNorm1d(16, dtype=dtype), nn.ReLU(), Linear(16, 8, dtype=dtype)
        )


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 12, generator=generator)
    return x.to(dtype), (x[:, :4].abs().argmax(1) + 4 * (x[:, 5] > 0))


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, **options)


class Run:
    """A user's loop."""

    def __init__(self, method=None, optimizer=adamw, model: nn.Module | None = None, total: int = TOTAL) -> None:
        self.method = RESU.frozen(sparsity=0.8, cycles=3, distribution=Uniform()) if method is None else method
        self.model = net() if model is None else model
        self.optimizer = optimizer(self.model.parameters())
        self.handle = attach(self.model, self.optimizer, self.method, total)
        self.step = 0

    def go(self, until: int, before_step=None) -> Run:
        while self.step < until:
            self.optimizer.zero_grad()
            x, y = batch(self.step, next(self.model.parameters()).dtype)
            self.loss = nn.functional.cross_entropy(self.model(x), y)
            self.loss.backward()
            if before_step is not None:
                before_step(self)
            self.optimizer.step()
            self.step += 1
        return self

    @property
    def cycles(self):
        return self.handle.method.timeline.cycles

    def to_phase(self, cycle: int, steps: int = 0) -> Run:
        """Into the RESU phase of a cycle, by so many steps."""
        return self.go(self.cycles[cycle].enter + steps)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.weight.detach().clone() for name, weight in masked_weights(self.model).items()}

    def masks(self) -> dict[str, torch.Tensor]:
        return {name: mask.clone() for name, mask in masks(self.model).items()}

    def units(self) -> dict[str, Resurrection]:
        return {name: Resurrection(weight) for name, weight in masked_weights(self.model).items()}


def assert_zero_dead(run: Run) -> None:
    for name, weight in run.weights().items():
        mask = masks(run.model)[name]
        assert not weight[~mask].any()
        assert int((weight == 0).sum()) == int((~mask).sum()) + int((weight[mask] == 0).sum())
