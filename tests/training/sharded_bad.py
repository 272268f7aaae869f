"""What is refused where ranks do not agree, and shardings that cut through what belongs together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import fxsparse
from fxsparse.nn import FastMode, Linear, accelerate, masked_weights, masks
from fxsparse.nn.sharded import part
from fxsparse.sparsity import Magnitude, MaskSet, SharedSupport, Uniform, Unstructured
from fxsparse.training import GMP, RESU, SET, Initial, RigL, attach
from fxsparse.training.alive_only import store_alive
from fxsparse.training.distributed import unwrap
from fxsparse.training.handle import handle_of
from tests.training.ranks import full, on_each_rank, refused, spread

STEPS = 8
SHARED = RigL(sparsity=0.5, every=2, end=100, pattern=SharedSupport(4), distribution=Uniform())
PLAIN = RigL(sparsity=0.5, every=2, end=100, pattern=Unstructured())


def net(width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    four = SharedSupport(4)
    layers = [Linear(8, width, pattern=four), nn.Tanh(), Linear(width, 8, pattern=four), nn.Tanh(), Linear(8, 4)]
    return nn.Sequential(*layers).double()


def batch(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x[rank::ranks], x[:, :4].argmax(1)[rank::ranks]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, rank: int, ranks: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        x, y = batch(step, rank, ranks)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def trained(rank: int, ranks: int, method: RigL, model: nn.Module) -> dict[str, Any]:
    optimizer = sgd(model)
    with torch.no_grad():
        model(batch(0, rank, ranks)[0])  # leaves weights whole
    handle = attach(model, optimizer, method, STEPS)
    train(model, optimizer, STEPS, rank, ranks)
    return {
        "masks": MaskSet(masks(model)).digest(),
        "updates": [[r.step, r.name, r.dropped, r.grown] for r in handle.report()],
        "values": [full(p).flatten().tolist() for p in model.parameters()],
    }


def shardings(rank: int, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Parts of a weight that are not whole groups of rows: rows by rank, columns by rank, two axes of ranks."""
    found = {}
    for mode in (FastMode.DENSE, FastMode.SPARSE):
        model = net()
        accelerate(model, mode=mode)
        spread(model)
        if ranks == 4:
            assert len(part(model[0].weight)) == 3  # of groups of 4 rows
        found[f"split groups, {mode.value}"] = [trained(rank, ranks, SHARED, model)]
    columns = net()
    if ranks > 1:
        fully_shard(columns, shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))
        assert part(columns[0].weight).shape == (12, 8 // ranks)
    found["columns"] = [trained(rank, ranks, SHARED, columns)]
    both = net()
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("replicate", "shard"))
        for layer in (both[0], both[2], both):
            fully_shard(layer, mesh=mesh)
        assert len(part(both[0].weight)) == 6
    found["hybrid"] = [trained(rank, ranks, PLAIN, both)]
    return found


class Whole(SET):
    """A method that cannot do with parts."""

    @property
    def needs_whole_weights(self) -> bool:
        """It says so."""
        return True


def attached(
    model: nn.Module, method: Any, steps: int = STEPS, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> str:
    """What becomes of `attach`; where it is refused nothing has changed, and the optimizer is free."""
    before, kept = dict(masks(model)), {n: (m, m.clone()) for n, m in masks(model).items()}
    specs = {name: weight.spec for name, weight in masked_weights(model).items()}
    optimizer = sgd(model) if optimizer is None else optimizer
    message = refused(lambda: attach(model, optimizer, method, steps, **options))
    assert handle_of(optimizer) is None
    assert masks(model).keys() == before.keys()
    assert all(masks(model)[n] is m and torch.equal(m, value) for n, (m, value) in kept.items())
    assert specs == {name: weight.spec for name, weight in masked_weights(model).items()}
    return message


def disagreements(rank: int, ranks: int, wrapped: Callable[[nn.Module], nn.Module]) -> dict[str, str]:
    """Ranks with other models, methods, lengths or masks, and checkpoints of another method or moment."""
    stranger = net(12 + 4 * rank)  # DDP itself refuses to wrap other shapes
    found = {"model": attached(spread(stranger) if wrapped is spread else stranger, SHARED)}
    found["method"] = attached(wrapped(net()), SET(0.5, seed=rank))
    found["length"] = attached(wrapped(net()), RESU(0.5), 100 + 4 * rank)
    model = wrapped(net())
    optimizer = sgd(model)
    other = attach(model, optimizer, SET(0.5, every=2), STEPS)
    train(model, optimizer, 3, rank, ranks)
    saved = other.state_dict()
    other.detach()
    found["another method's"] = attached(model, SET(0.5, every=3), state=saved)
    before = {**saved, "step": 1}
    found["another state"] = attached(model, SET(0.5, every=2), state=saved if rank else before)
    found["no state"] = attached(model, SET(0.5, every=2, initial=Initial.KEEP), state=saved if rank else None)
    broken = {**saved, "records": [1]}
    found["damaged state"] = attached(model, SET(0.5, every=2), state=saved if rank else broken)
    few = torch.optim.SGD(list(model.parameters())[: None if rank else 1], lr=0.1)
    found["few parameters"] = attached(model, SET(0.5, every=2, initial=Initial.KEEP), optimizer=few)
    mask = masks(unwrap(model))["2.weight"]
    mask.copy_(mask.flip(0))
    attach(model, optimizer, SET(0.5, every=2), STEPS, state=saved)
    found["masks of another moment"] = refused(lambda: train(model, optimizer, 1, rank, ranks))
    return found


def other_phase(rank: int, ranks: int) -> str:
    """A state of RESU from within a phase, for a model that is in none."""
    method = RESU.frozen(0.5, cycles=1, rise=1, final_fraction=0.0)
    model = spread(net())
    optimizer = sgd(model)
    handle: Any = attach(model, optimizer, method, 10)
    train(model, optimizer, 8, rank, ranks)
    assert handle.trainable()
    saved, stranger = handle.state_dict(), spread(net())
    optimizer = sgd(stranger)
    attach(stranger, optimizer, method, 10, state=saved)
    return refused(lambda: train(stranger, optimizer, 1, rank, ranks))


def sabotaged(rank: int, ranks: int) -> str:
    """A mask that one rank changes within a RESU phase."""
    model = spread(net())
    optimizer = sgd(model)
    handle: Any = attach(model, optimizer, RESU.frozen(0.5, cycles=1, rise=1, final_fraction=0.0), 10)
    train(model, optimizer, 8, rank, ranks)
    assert handle.trainable()
    if rank == 1:
        masks(model)["0.weight"].copy_(masks(model)["0.weight"].flip(0))
    return refused(lambda: train(model, optimizer, 2, rank, ranks))


def joined(rank: int, ranks: int) -> list[str]:
    """Ranks with different amounts of data in a `Join` context, where the model is wrapped before and afterwards."""
    found = []
    for before in (True, False):
        model = net()
        wrapper = DistributedDataParallel(model)
        optimizer = sgd(model)
        handle = attach(wrapper if before else model, optimizer, SHARED, STEPS)
        kept = {name: value.clone() for name, value in model.state_dict().items()}

        def uneven(wrapper: Any = wrapper, optimizer: Any = optimizer) -> None:
            with Join([wrapper]):
                train(wrapper, optimizer, 3 + 2 * rank, rank, ranks)

        found.append(refused(uneven))
        assert handle.step == 0 and all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
        with Join([wrapper], enable=False):
            train(wrapper, optimizer, 3, rank, ranks)
        assert handle.step == 3 and handle.updates == 1
    return found


def reshaped(rank: int, ranks: int) -> str:
    """Alive-only storage under DDP, and a method that prunes on: the parameters would change their shapes."""
    model = net()
    optimizer = sgd(model)
    method = GMP(0.9, initial_sparsity=0.5, every=3, pattern=SharedSupport(4), distribution=Uniform())
    handle = attach(model, optimizer, replace(method, initial=Magnitude()), 12)
    store_alive(handle)
    wrapper = DistributedDataParallel(model)
    train(wrapper, optimizer, 2, rank, ranks)
    before = {name: mask.clone() for name, mask in masks(model).items()}
    message = refused(lambda: train(wrapper, optimizer, 10, rank, ranks))
    assert all(torch.equal(before[name], mask) for name, mask in masks(model).items()) and handle.updates == 0
    return message


def gathered(rank: int, ranks: int, folder: Path) -> dict[str, str]:
    """What needs whole weights says how to get them, and that works."""
    model = spread(net())
    found = {
        "finalize": refused(lambda: fxsparse.finalize(model)),
        "finalize, inplace": refused(lambda: fxsparse.finalize(model, inplace=True)),
        "ticket": refused(lambda: fxsparse.save_ticket(model, folder / f"{rank}.ticket")),
    }
    other = net()
    with torch.no_grad():
        other[0].weight.zero_()
    other.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    found["gathered"] = str(torch.equal(fxsparse.finalize(other)[0].weight, net()[0].weight))
    return found


def storage(rank: int, ranks: int) -> dict[str, str]:
    """Alive-only storage of weights that are spread, and methods that need them whole."""
    model = net()
    optimizer = sgd(model)
    handle = attach(model, optimizer, SHARED, STEPS)
    store_alive(handle)
    handle.detach()
    spread(model)
    found = {"packed": refused(lambda: attach(model, sgd(model), SHARED, STEPS))}
    model = spread(net())
    found["store_alive"] = refused(lambda: store_alive(attach(model, sgd(model), SHARED, STEPS)))
    found["whole"] = attached(spread(net()), Whole(0.5))
    return found


def work(rank: int, ranks: int, folder: Path, arguments: list[str]) -> Any:
    found: dict[str, Any] = {"found": shardings(rank, ranks)}
    if ranks == 2:
        found["fsdp"] = disagreements(rank, ranks, spread)
        found["ddp"] = disagreements(rank, ranks, DistributedDataParallel)
        found["resu"] = {"phase": other_phase(rank, ranks), "sabotage": sabotaged(rank, ranks)}
        found["storage"] = storage(rank, ranks)
        found["joined"], found["reshaped"] = joined(rank, ranks), reshaped(rank, ranks)
        found["gathered"] = gathered(rank, ranks, folder)
    return found


if __name__ == "__main__":
    on_each_rank(work)
