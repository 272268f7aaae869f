"""Every method learns: digits at 90 % sparsity, far above chance."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from fxsparse.data import digits
from fxsparse.nn import Linear, masks
from fxsparse.sparsity import SharedSupport, Uniform, Wanda
from fxsparse.training import (
    ACDC,
    GMP,
    ITOP,
    MEST,
    SET,
    SNFS,
    SNIP,
    GraSP,
    Growth,
    Initial,
    OneShot,
    Regroup,
    RigL,
    SRigL,
    Static,
    SynFlow,
    attach,
    prune,
)

STEPS = 300
SPARSITY = 0.9
CASES = {
    "static": Static(SPARSITY),
    "gmp": GMP(SPARSITY, every=20),
    "ac/dc": ACDC(SPARSITY, every=30),
    "set": SET(SPARSITY, every=20),
    "rigl": RigL(SPARSITY, every=20),
    "itop": ITOP(SPARSITY, every=40, growth=Growth.GRADIENT),
    "snfs": SNFS(SPARSITY, every=20),
    "srigl": SRigL(SPARSITY, every=20),
    "mest em": MEST(SPARSITY, every=20),
    "mest em&s": MEST(SPARSITY, every=20, soft=True),
    "gmp, grouped": GMP(SPARSITY, every=20, pattern=SharedSupport(8), regroup=Regroup()),
}
PRUNINGS = {
    "snip": SNIP(SPARSITY),
    "grasp": GraSP(SPARSITY, temperature=1.0),
    "synflow": SynFlow(SPARSITY, rounds=30),
}


@functools.cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    splits = digits()
    flat = [part.inputs.flatten(1) for part in (splits.train, splits.test)]
    return flat[0], splits.train.labels, flat[1], splits.test.labels


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(Linear(64, 64), nn.ReLU(), Linear(64, 32), nn.ReLU(), Linear(32, 10))


def train(model: nn.Module, method=None, steps: int = STEPS):
    x, y, _, _ = data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    handle = None if method is None else attach(model, optimizer, method, steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return handle


def accuracy(model: nn.Module) -> float:
    _, _, x, y = data()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def sparsity(model: nn.Module) -> float:
    found = masks(model).values()
    return 1 - sum(int(mask.sum()) for mask in found) / sum(mask.numel() for mask in found)


@pytest.mark.parametrize("name", CASES)
def test_methods_learn(name):
    model = build()
    handle = train(model, CASES[name])
    assert handle is not None and abs(sparsity(model) - SPARSITY) < 0.03
    assert accuracy(model) > 0.8, name


@pytest.mark.parametrize("name", PRUNINGS)
def test_prunings_at_initialisation_learn(name):
    model, (x, y, _, _) = build(), data()
    prune(
        model,
        PRUNINGS[name],
        [(x[i : i + 128], y[i : i + 128]) for i in range(0, 512, 128)],
        nn.functional.cross_entropy,
    )
    assert abs(sparsity(model) - SPARSITY) < 0.01
    train(model, Static(SPARSITY, initial=Initial.KEEP))
    assert accuracy(model) > 0.8, name


def test_one_shot_prunings_keep_what_a_trained_model_knows():
    x, _, _, _ = data()
    scores = {}
    for name, method in {
        "magnitude": OneShot(0.5),
        "wanda": OneShot(0.5, saliency=Wanda()),
        "random": OneShot(0.5, saliency=Static(0.5).initial_saliency(), distribution=Uniform()),
    }.items():
        model = build()
        train(model)
        assert accuracy(model) > 0.93
        prune(model, method, [x])
        scores[name] = accuracy(model)
    assert min(scores["magnitude"], scores["wanda"]) > 0.85 > scores["random"]


def test_learned_groups_keep_more_than_natural_ones():
    kept = []
    for regroup in (None, Regroup()):
        model = build()
        train(model, steps=150)
        total = float(sum(m.weight.detach().square().sum() for m in model if isinstance(m, nn.Linear)))
        prune(model, OneShot(SPARSITY, pattern=SharedSupport(8), regroup=regroup))
        kept.append(float(sum(m.weight.detach().square().sum() for m in model if isinstance(m, nn.Linear))) / total)
    assert kept[1] > kept[0] + 0.02
