"""What RESU does on each rank, for its test."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import fxsparse
from fxsparse.nn import masked_weights, masks
from fxsparse.sparsity import MaskSet, NByM, SharedSupport, Taylor, Uniform, Wanda
from fxsparse.training import RESU, Densify, DSNoT, Lengths, attach
from fxsparse.training.attach import make_loadable
from fxsparse.training.resu_subset import CyclicDead, TopGradient
from fxsparse.training.resu_theta import Selective, ThetaMomentum, ThetaOptimizer, ThetaSGD
from tests.training.ranks import full, on_each_rank, spread

STEPS = 20
_CYCLES: dict[str, Any] = {
    **{"cycles": 2, "rise": 2, "budget": (0.3, 0.25)},
    **{"distribution": Uniform(), "final_fraction": 0.25},
}
METHODS: dict[str, RESU] = {
    "default": RESU(0.6, cycles=2, rise=1, distribution=Uniform(), lengths=Lengths(0.5, 0.0, 0.5)),
    "by gradient": RESU.frozen(0.6, prune=Taylor(), score=Taylor(), subset=TopGradient(0.5), **_CYCLES),
    "alive too": RESU.frozen(0.6, score=Taylor(), freeze_active=False, theta=ThetaMomentum(), **_CYCLES),
    "by inputs": RESU.frozen(0.6, prune=Wanda(), score=Wanda(), refine=DSNoT(), **_CYCLES),
    "selective": RESU.frozen(0.6, theta=Selective(lr=0.1, warm_up=1), train_rest=False, **_CYCLES),
    "shared": RESU.frozen(0.5, pattern=SharedSupport(4), subset=CyclicDead(2), keep_state=True, **_CYCLES),
    "n of m": RESU.frozen(
        0.6, pattern=NByM(2, 4, exact=False), theta=ThetaOptimizer(lr=0.01, kind=torch.optim.RMSprop), **_CYCLES
    ),
    "densify": Densify(path=(0.7, 0.4, 0.0), theta=ThetaSGD(lr=0.1), final_fraction=0.25, distribution=Uniform()),
}
HOW: dict[str, dict[str, Any]] = {
    "by gradient": {"accumulate": 2, "clip": True},
    "alive too": {"accumulate": 2, "clip": True, "sync_each": False, "adam": False},
}


def net() -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(8, 12), nn.Tanh(), nn.Unflatten(1, (4, 3)), nn.Conv1d(4, 6, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, 4),
    ).double()  # fmt: skip
    return fxsparse.transform(dense, (torch.zeros(2, 8, dtype=torch.float64),))


def batch(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x[rank::ranks], x[:, :4].argmax(1)[rank::ranks]


class Run:
    """A user's loop on one rank."""

    def __init__(self, method: RESU, rank: int, ranks: int, *, attached: bool = True, adam: bool = True) -> None:
        self.rank, self.ranks, self.method, self.step = rank, ranks, method, 0
        self.model = spread(net())
        parameters = self.model.parameters()
        if adam:
            self.optimizer: Any = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
        else:
            self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        if attached:
            self.handle: Any = attach(self.model, self.optimizer, method, STEPS)

    def go(self, end: int, accumulate: int = 1, clip: bool = False, sync_each: bool = True) -> Run:
        while self.step < end:
            self.optimizer.zero_grad()
            x, y = batch(self.step, self.rank, self.ranks)
            for i, (a, b) in enumerate(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)):
                if self.ranks > 1:
                    self.model.set_requires_gradient_sync(sync_each or i + 1 == accumulate)  # type: ignore[operator]
                (nn.functional.cross_entropy(self.model(a), b) / accumulate).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            self.optimizer.step()
            self.step += 1
        return self

    def inside(self, cycle: int = 0) -> int:
        """A step within a RESU phase."""
        return self.handle.method.timeline.cycles[cycle].enter + 1

    def described(self) -> dict[str, Any]:
        report = self.handle.report()
        return {
            "masks": MaskSet(masks(self.model)).digest(),
            "trained": MaskSet(self.handle.trainable()).digest() if self.handle.trainable() else "",
            "updates": [[r.step, r.name, r.dropped, r.grown] for r in report],
            "won": [[r.name, r.trained, r.won, r.displaced, r.earlier, r.survived] for r in report.resurrections],
            "values": [
                *([r.movement for r in report.resurrections if r.trained],),
                *(full(p).flatten().tolist() for p in self.model.parameters()),
            ],
        }


def trained(method: RESU, rank: int, ranks: int, adam: bool = True, **how: Any) -> list[dict[str, Any]]:
    """Within the first RESU phase, and at the end."""
    run = Run(method, rank, ranks, adam=adam)
    phase = run.go(run.inside(), **how).described()
    assert phase["trained"], method
    end = run.go(STEPS, **how).described()
    for name, mask in masks(run.model).items():
        assert not full(run.model.get_parameter(name))[~mask].any(), name
    return [phase, end]


def paused(rank: int, ranks: int) -> list[dict[str, Any]]:
    """A callback at the pause of a cycle takes steps that do not count; an average of the model follows."""
    run = Run(RESU.frozen(0.6, pauses=(0,), **_CYCLES), rank, ranks)
    average = spread(net())
    run.handle.follow(average)

    def callback(model: nn.Module, cycle: int) -> None:
        run.optimizer.zero_grad()
        x, y = batch(100, rank, ranks)
        nn.functional.cross_entropy(model(x), y).backward()
        run.optimizer.step()

    run.handle.on_pause(callback)
    run.go(STEPS)
    for name, weight in masked_weights(average).items():
        assert torch.equal(weight.mask, masks(run.model)[name])
    return [run.described(), {**run.described(), "values": [full(p).flatten().tolist() for p in average.parameters()]}]


def found_by(rank: int, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Every method's training; four ranks take the first ones."""
    names = list(METHODS)[: 4 if ranks == 4 else None]
    found = {name: trained(METHODS[name], rank, ranks, **HOW.get(name, {})) for name in names}
    return found if ranks == 4 else {**found, "paused": paused(rank, ranks)}


RESUMED = RESU.frozen(0.6, score=Wanda(), prune=Taylor(), subset=TopGradient(0.5), **_CYCLES)


def save(rank: int, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Saves in the middle of a phase, then goes on."""
    run = Run(RESUMED, rank, ranks)
    run.go(run.inside(1))
    state = {
        "model": get_model_state_dict(run.model),
        "optimizer": get_optimizer_state_dict(run.model, run.optimizer),
    }
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    if rank == 0:
        torch.save([run.step, run.handle.state_dict()], folder / "handle.pt")
    return [run.described(), run.go(STEPS).described()]


def resume(rank: int, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Goes on from there."""
    run = Run(RESUMED, rank, ranks, attached=False)
    make_loadable(run.model, run.method)
    state = {
        "model": get_model_state_dict(run.model),
        "optimizer": get_optimizer_state_dict(run.model, run.optimizer),
    }
    lenient = DefaultLoadPlanner(allow_partial_load=True)  # in a phase the optimizer holds nothing of frozen weights
    dcp.load(state, checkpoint_id=folder / "checkpoint", planner=lenient)
    set_model_state_dict(run.model, state["model"])
    set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
    run.step, kept = torch.load(folder / "handle.pt", weights_only=True)
    run.handle = attach(run.model, run.optimizer, run.method, STEPS, state=kept)
    return [run.described(), run.go(STEPS).described()]


def work(rank: int, ranks: int, folder: Path, arguments: list[str]) -> Any:
    warnings.simplefilter("ignore")
    if arguments == ["train"]:
        return found_by(rank, ranks)
    return (save if arguments == ["save"] else resume)(rank, ranks, folder)


if __name__ == "__main__":
    on_each_rank(work)
