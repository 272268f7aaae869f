"""What `prune` does on each rank, for its test."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.nn import Linear, masks
from fxsparse.sparsity import ConstantFanIn, Global, MaskSet, SharedSupport, Taylor, Uniform, Wanda
from fxsparse.training import SNIP, GraSP, Initial, OneShot, Pruning, Regroup, Static, SynFlow, attach, prune
from fxsparse.training.distributed import reshard
from tests.training.ranks import full, on_each_rank, refused, spread

EXACT: dict[str, Pruning] = {
    "snip": SNIP(0.6),
    "snip, shared": SNIP(0.5, pattern=SharedSupport(4), distribution=Uniform()),
    "snip, regrouped": SNIP(0.5, pattern=SharedSupport(4), distribution=Uniform(), regroup=Regroup()),
    "grasp": GraSP(0.6, temperature=256.0),
    "synflow": SynFlow(0.8, rounds=5),
    "magnitude": OneShot(0.6),
    "magnitude, fan-in": OneShot(0.5, pattern=ConstantFanIn()),
    "taylor": OneShot(0.6, saliency=Taylor()),
    "wanda": OneShot(0.6, saliency=Wanda()),
    "wanda, global": OneShot(0.6, saliency=Wanda(), per_row=False, distribution=Global()),
}
SMOOTH: dict[str, Pruning] = {"snip": SNIP(0.6), "grasp": GraSP(0.6), "wanda": OneShot(0.6, saliency=Wanda())}


def dyadic(*shape: int, seed: int) -> Tensor:
    """Small numbers whose sums and products are exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double() / 4


def exact_net() -> nn.Sequential:
    model = nn.Sequential(Linear(6, 10, bias=False), Linear(10, 5, bias=False)).double()
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.copy_(dyadic(*layer.weight.shape, seed=i))
    return model


def smooth_net() -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Unflatten(1, (1, 10)), nn.Conv1d(1, 7, 3), nn.Tanh(),
        nn.Flatten(), nn.Linear(56, 4),
    ).double()  # fmt: skip
    return fxsparse.transform(dense, (torch.zeros(2, 6, dtype=torch.float64),)).eval()


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum() / 2 / len(outputs)


def exact_batches() -> list[tuple[Tensor, Tensor]]:
    """Five batches of other sizes, 64 samples in all."""
    x, y = dyadic(64, 6, seed=7), dyadic(64, 5, seed=8)
    return list(zip(x.split([32, 8, 16, 4, 4]), y.split([32, 8, 16, 4, 4]), strict=True))


def smooth_batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return list(zip(x.split(12), x[:, :4].argmax(1).split(12), strict=True))


def described(model: nn.Module) -> list[Any]:
    for name, mask in masks(model).items():
        assert not full(model.get_parameter(name))[~mask].any(), name
    return [MaskSet(masks(model)).digest(), [full(p).flatten().tolist() for p in model.parameters()]]


def as_before(model: nn.Module, act: Any) -> None:
    """Only masks and dead weights change."""
    modules = list(model.modules())
    kinds, hooks = [type(m) for m in modules], [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in modules]
    keys, flags = [set(m.__dict__) for m in modules], [m.training for m in modules]
    held = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    before = {n: full(p).clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers() if not n.endswith("_mask")}
    state = torch.get_rng_state()
    act()
    assert torch.equal(state, torch.get_rng_state())
    assert [type(m) for m in modules] == kinds and [set(m.__dict__) for m in modules] == keys
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in modules] == hooks
    assert [m.training for m in modules] == flags
    now = list(model.parameters())
    assert all(a is b for (a, _, _), b in zip(held, now, strict=True))
    assert [(p.requires_grad, p.grad) for p in now] == [(flag, grad) for _, flag, grad in held]
    assert all(torch.equal(buffers[n], b) for n, b in model.named_buffers() if n in buffers)
    for name, parameter in model.named_parameters():
        kept = masks(model).get(name, torch.ones_like(before[name], dtype=torch.bool))
        assert torch.equal(full(parameter), torch.where(kept, before[name], 0.0)), name


def trained_on(model: nn.Module, x: Tensor, y: Tensor) -> list[Any]:
    """Some steps after pruning: what `prune` left behind still trains."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1, momentum=0.9)
    attach(model, optimizer, Static(0.6, initial=Initial.KEEP))
    for _ in range(3):
        optimizer.zero_grad()
        half_square(model(x), y).backward()
        optimizer.step()
    return described(model)


def found_by(rank: int, ranks: int) -> dict[str, Any]:
    """Every method on this rank's batches: some ranks have more than others, of four one has none."""
    found: dict[str, Any] = {}
    mine = exact_batches()[:-1][rank::ranks] if ranks < 4 else [exact_batches()[:-1], [], [], []][rank]
    mine = mine + exact_batches()[-1:] if rank == ranks - 1 else mine
    for name, method in EXACT.items():
        model = spread(exact_net())
        as_before(model, functools.partial(prune, model, method, batches_for(mine, method), half_square))
        found[name] = described(model)
    x, y = exact_batches()[0]
    found["trained on"] = trained_on(model, x[rank::ranks], y[rank::ranks])
    for name, method in SMOOTH.items():
        model = spread(smooth_net())
        with torch.no_grad():
            model(smooth_batches()[0][0])  # leaves the root whole
        prune(model, method, smooth_batches()[rank::ranks], nn.functional.cross_entropy)
        reshard(model)  # whoever wrote to what the forward pass left whole has written in vain
        found[f"smooth {name}"] = described(model)
    return found


def batches_for(mine: list[Any], method: Pruning) -> list[Any]:
    """This rank's batches; SynFlow reads a form, which every rank needs."""
    return mine or (exact_batches()[:1] if isinstance(method, SynFlow) else [])


def bad_input(rank: int) -> dict[str, str]:
    """What is refused, on every rank."""
    batches, found = exact_batches()[:1], {}

    def pruned(model: nn.Module, method: Pruning = EXACT["snip"], data: Any = batches, loss: Any = half_square) -> str:
        before = described(model)
        message = refused(lambda: prune(model, method, data, loss))
        assert described(model) == before
        return message

    stranger = spread(nn.Sequential(Linear(6, 10, bias=False), Linear(10, 5 + rank, bias=False)).double())
    found["model"] = refused(lambda: prune(stranger, EXACT["snip"], batches, half_square))
    found["method"] = pruned(spread(exact_net()), SNIP(0.6, seed=rank))
    found["loss"] = pruned(spread(exact_net()), loss=None)
    found["batches"] = pruned(spread(exact_net()), data=[])
    found["no form"] = pruned(spread(exact_net()), SynFlow(0.5, rounds=2), batches[rank:])
    broken = [(torch.full((4, 6), torch.nan, dtype=torch.float64), batches[0][1][:4])] if rank else batches
    found["nan on one rank"] = pruned(spread(exact_net()), data=broken)
    other = spread(exact_net())
    if rank:
        masks(other)["0.weight"][0] = False
    found["masks"] = refused(lambda: prune(other, SNIP(0.6), batches, half_square))
    return found


def work(rank: int, ranks: int, folder: Path, arguments: list[str]) -> Any:
    return {"found": found_by(rank, ranks), "refused": bad_input(rank) if ranks == 2 else {}}


if __name__ == "__main__":
    on_each_rank(work)
