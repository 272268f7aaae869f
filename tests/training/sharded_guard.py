"""Weights that are masked at the parameter, spread over ranks, for their test."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.nn import Guard, MaskSpec, Route, install_mask, masks
from fxsparse.sparsity import MaskSet, Taylor, Uniform
from fxsparse.training import RESU, SET, SNFS, SNIP, Initial, RigL, Static, attach, prune
from fxsparse.training.resu_subset import TopGradient
from tests.training.ranks import full, on_each_rank, spread

STEPS = 9


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    for layer in model[::2]:
        install_mask(layer, "weight", MaskSpec(route=Route.PARAMETER, guard=Guard.GRADIENT))
    return model


def batch(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x[rank::ranks], x[:, :4].argmax(1)[rank::ranks]


def described(model: nn.Module, handle: Any) -> dict[str, Any]:
    for name, mask in masks(model).items():
        assert not full(model.get_parameter(name))[~mask].any(), name
    return {
        "masks": MaskSet(masks(model)).digest(),
        "updates": [[r.step, r.name, r.dropped, r.grown] for r in handle.report()],
        "values": [full(p).flatten().tolist() for p in model.parameters()],
    }


def trained(method: Any, rank: int, ranks: int, how: str = "") -> list[dict[str, Any]]:
    model = spread(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    loss = nn.functional.cross_entropy
    if isinstance(method, SNIP):
        prune(model, method, [batch(0, rank, ranks)], loss)
        method = Static(method.sparsity, initial=Initial.KEEP)
    handle = attach(model, optimizer, method, STEPS)
    pieces = 2 if "accumulated" in how else 1
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none="in place" not in how)
        x, y = batch(step, rank, ranks)
        for i, (a, b) in enumerate(zip(x.chunk(pieces), y.chunk(pieces), strict=True)):
            if ranks > 1:
                model.set_requires_gradient_sync("in one go" not in how or i + 1 == pieces)  # type: ignore[operator]
            (loss(model(a), b) / pieces).backward()
        with torch.no_grad():
            model(x)  # leaves weights whole
            masks(model)
        if ranks > 1:
            model.reshard()  # type: ignore[operator]
        if "clipped" in how:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return [described(model, handle)]


def found_by(rank: int, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Every training; four ranks take some."""
    rigl = RigL(sparsity=0.6, every=3, end=100, replaces_step=False)
    phases: dict[str, Any] = {"cycles": 1, "rise": 1, "distribution": Uniform(), "final_fraction": 0.0}
    resu = RESU.frozen(0.6, score=Taylor(), prune=Taylor(), subset=TopGradient(0.5), budget=(0.3, 0.3), **phases)
    found = {
        "rigl": trained(RigL(sparsity=0.6, every=3, end=100), rank, ranks),
        "set": trained(SET(sparsity=0.6, every=3), rank, ranks),
        "snip": trained(SNIP(0.6), rank, ranks),
        "resu": trained(resu, rank, ranks, "accumulated, clipped"),
    }
    found["rigl, in one go"] = trained(rigl, rank, ranks, "accumulated, in one go, clipped")
    if ranks == 4:
        return found
    found["rigl, each"] = trained(rigl, rank, ranks, "accumulated, clipped")
    found["rigl, in place"] = trained(rigl, rank, ranks, "accumulated, in place, clipped")
    found["snfs, accumulated"] = trained(SNFS(sparsity=0.6, every=3), rank, ranks, "accumulated")
    return found


def work(rank: int, ranks: int, folder: Path, arguments: list[str]) -> Any:
    warnings.simplefilter("ignore")
    return found_by(rank, ranks)


if __name__ == "__main__":
    on_each_rank(work)
