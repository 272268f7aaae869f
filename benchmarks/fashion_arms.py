"""Train the arms that `accuracy_and_speed.py` measures: a convolutional net on Fashion-MNIST, dense and pruned.

Run: python benchmarks/fashion_arms.py [CHECKPOINTS] [--data FOLDER] [--seeds 0 1 2] [--epochs 3] [--arms dense
     shared ...]
Every arm starts from the same dense net of its seed (`--epochs` epochs) and trains as many epochs again, dense or
pruned on the way, with the same optimizer, schedule and order of the samples. A finished arm is a file in
CHECKPOINTS and is not trained again, so that a run that is stopped goes on where it was. One thread, bfloat16
autocast; nothing is chosen by the test part. Without Torch-Pruning its arms are left out.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import fxsparse
from fxsparse.data import Splits, idx_folder
from fxsparse.graph import count
from fxsparse.planning.prune_budgets import ChannelBudget, MacBudget
from fxsparse.planning.prune_channels import plan_channels
from fxsparse.planning.prune_choose import Scope
from fxsparse.sparsity import Pattern
from fxsparse.training.loop import Task, evaluate, fit, start, start_from

FOLDER = "/usr/share/datasets/fashion-mnist"
X = torch.zeros(1, 1, 28, 28)


def wide_conv_net() -> nn.Module:
    """Three 3x3 convolutions with 64, 128 and 256 channels, and a linear head: 29 million products an image."""

    def conv(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *conv(1, 64), nn.MaxPool2d(2), *conv(64, 128), nn.MaxPool2d(2), *conv(128, 256),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """How the dense net becomes the arm's, and what drives its masks while it trains."""

    build: Callable[[nn.Module], nn.Module]
    method: Callable[[int], Any] | None = None


def _masked(pattern: Pattern) -> Callable[[nn.Module], nn.Module]:
    return lambda base: fxsparse.transform(base, (X,), pattern=pattern, exclude=list(kept(base)))


def _gmp(pattern: Pattern, sparsity: float) -> Arm:
    """Gradual magnitude pruning in the first 40 % of the arm's steps."""
    method = fxsparse.GMP(sparsity=sparsity, pattern=pattern, every=25, end_fraction=0.4)
    return Arm(_masked(pattern), lambda seed: dataclasses.replace(method, seed=seed))


def kept(model: nn.Module) -> tuple[str, str]:
    """The first and the last weight: one input channel, ten rows; nothing to gain there."""
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    return names[0], names[-1]


def halved(base: nn.Module) -> nn.Module:
    """Half of the channels of every layer gone, by magnitude."""
    return plan_channels(base, (X,), budget=ChannelBudget(0.5), scope=Scope.LOCAL, round_to=8).apply()


def as_cheap(base: nn.Module) -> nn.Module:
    """Channels gone, by magnitude, as many as the MACs of SharedSupport(64) at 90 % ask for."""
    ticket = fxsparse.transform(base, (X,), sparsity=0.9, pattern=fxsparse.SharedSupport(64), exclude=list(kept(base)))
    costs = count(ticket, (X,))
    assert costs.macs_dense and costs.macs_effective
    budget = MacBudget(costs.macs_effective / costs.macs_dense)
    return plan_channels(base, (X,), budget=budget, scope=Scope.LOCAL, round_to=4).apply()


def by_peer(base: nn.Module, like: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Torch-Pruning, magnitudes, the same share of every layer, down to the MACs of another pruned net."""
    peer = importlib.import_module("torch_pruning")
    small = copy.deepcopy(base)
    goal = count(like(base), (X,)).macs_dense
    pruner = peer.pruner.BasePruner(
        small, X, importance=peer.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.95, iterative_steps=200,
        ignored_layers=[small[-1]],  # type: ignore[index]
    )  # fmt: skip
    while count(small, (X,)).macs_dense > goal:
        pruner.step()
    return small


ARMS: Mapping[str, Arm] = {
    "dense": Arm(copy.deepcopy),
    "shared": _gmp(fxsparse.SharedSupport(64), 0.9),
    "channels": Arm(halved),
    "torch_pruning": Arm(lambda base: by_peer(base, halved)),
    "unstructured": _gmp(fxsparse.Unstructured(), 0.9),
    "channels_as_cheap": Arm(as_cheap),
    "torch_pruning_as_cheap": Arm(lambda base: by_peer(base, as_cheap)),
    "shared80": _gmp(fxsparse.SharedSupport(64), 0.8),
}


def available(names: Iterable[str]) -> list[str]:
    """Those that can be trained here: Torch-Pruning may not be installed."""
    peer = importlib.util.find_spec("torch_pruning")
    return [name for name in names if peer or not name.startswith("torch_pruning")]


def task(splits: Splits, epochs: int, rate: float) -> Task:
    """AdamW, cosine to zero, batches of 128."""

    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return AdamW(parameters, lr=rate, weight_decay=1e-3)

    return Task(
        build=lambda: wide_conv_net().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        train=splits.train,
        epochs=epochs,
        batch_size=128,
        optimizer=optimizer,
        scheduler=lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
        autocast=torch.bfloat16,
    )


def base_net(folder: Path, splits: Splits | None, seed: int, epochs: int) -> nn.Module:
    """The dense net that all arms of a seed start from."""
    file = folder / f"base-{epochs}-{seed}.pt"
    if file.exists() or splits is None:
        model = wide_conv_net()
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    training = task(splits, epochs, 2e-3)
    state = start(training, seed)
    fit(state, training)
    torch.save(state.model.state_dict(), file)
    return state.model


def arm_file(folder: Path, name: str, seed: int, epochs: int) -> Path:
    """Where a trained arm lies."""
    return folder / f"{name}-{epochs}-{seed}.pt"


def arm_net(folder: Path, splits: Splits | None, name: str, seed: int, epochs: int) -> nn.Module:
    """An arm's net in eval mode, trained where it is not yet.

    Raises:
        FileNotFoundError: it is not trained, and there are no data to train it on.
    """
    arm = ARMS[name]
    file = arm_file(folder, name, seed, epochs)
    torch.manual_seed(seed)
    model = arm.build(base_net(folder, splits, seed, epochs).eval())
    if file.exists() or splits is None:
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    training = task(splits, epochs, 1e-3)
    state = start_from(training, model.to(memory_format=torch.channels_last), seed)  # type: ignore[call-overload]
    if arm.method is not None:
        fxsparse.attach(state.model, state.optimizer, arm.method(seed), training.total_steps)
    fit(state, training)
    torch.save(state.model.state_dict(), file)
    return state.model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="?", default=Path("results/fashion_arms"))
    parser.add_argument("--data", default=FOLDER)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    splits = idx_folder(options.data)
    for seed in options.seeds:
        for name in available(options.arms):
            began = time.perf_counter()
            model = arm_net(options.checkpoints, splits, name, seed, options.epochs)
            found = evaluate(model, splits.validation)
            print(
                f"{name:<14} seed {seed}: validation {found.accuracy:.4f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
