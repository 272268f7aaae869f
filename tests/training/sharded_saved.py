"""Handles in checkpoints of torch.distributed.checkpoint, on each rank, for their test."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import fxsparse
from fxsparse.nn import masks
from fxsparse.sparsity import MaskSet, Taylor, Uniform
from fxsparse.training import RESU, SNFS, Lengths, Method, RigL, attach
from fxsparse.training.attach import make_loadable
from tests.training.ranks import full, on_each_rank, spread

STEPS, STOP = 20, 8
METHODS: dict[str, Method] = {
    "snfs": SNFS(0.6, every=3),
    "rigl": RigL(0.6, every=3, end=100),
    "resu": RESU(0.6, cycles=2, rise=1, distribution=Uniform(), lengths=Lengths(0.5, 0, 0.5), score=Taylor()),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    return fxsparse.transform(dense, (torch.zeros(2, 6, dtype=torch.float64),))


def batch(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(18, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x[rank::ranks], x[:, :4].argmax(1)[rank::ranks]


class Run:
    """A user's loop on one rank."""

    def __init__(self, name: str, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.method, self.step = rank, ranks, METHODS[name], 0
        self.model = spread(net())
        make_loadable(self.model, self.method)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)

    def attach(self) -> Run:
        self.handle = attach(self.model, self.optimizer, self.method, STEPS)
        return self

    def go(self, end: int) -> Run:
        for step in range(self.step, end):
            self.optimizer.zero_grad()
            x, y = batch(step, self.rank, self.ranks)
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
        self.step = end
        return self

    def state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def save(self, place: Path) -> Run:
        dcp.save({**self.state(), "handle": self.handle}, checkpoint_id=place)
        return self

    def load(self, place: Path, whole: bool) -> Run:
        """The handle as it is, or its state."""
        state = self.state()  # before attach: torch takes a step of an optimizer that has no state yet
        self.attach()
        state["handle"] = self.handle if whole else self.handle.state_dict()
        dcp.load(state, checkpoint_id=place)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        if not whole:
            self.handle.load_state_dict(state["handle"])
        self.step = self.handle.step
        return self

    def described(self) -> dict[str, Any]:
        report = self.handle.report()
        return {
            "step": self.handle.step,
            "masks": MaskSet(masks(self.model)).digest(),
            "updates": [[r.step, r.name, r.dropped, r.grown] for r in report],
            "explored": [[each.name, each.explored] for each in report.weights],
            "values": [full(p).flatten().tolist() for p in self.model.parameters()],
        }


def saved(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Every method's training, with a checkpoint on the way."""
    return {
        name: Run(name, rank, ranks).attach().go(STOP).save(folder / f"{ranks} {name}").go(STEPS).described()
        for name in METHODS
    }


def resumed(folder: Path, rank: int, ranks: int, before: int, whole: tuple[bool, ...]) -> dict[str, Any]:
    """The rest, from the checkpoint that another number of ranks saved; the handle is loaded whole or as its state."""
    return {
        f"{name}, {way}": Run(name, rank, ranks).load(folder / f"{before} {name}", way).go(STEPS).described()
        for name in METHODS
        for way in whole
    }


def work(rank: int, ranks: int, folder: Path, arguments: list[str]) -> Any:
    warnings.simplefilter("ignore")
    found = {"resumed": resumed(folder, rank, ranks, ranks - 1, (ranks == 2,))}
    return {**found, "saved": saved(folder, rank, ranks) if ranks == 2 else {}}


if __name__ == "__main__":
    on_each_rank(work)
