"""What the demo trains and for how long.

Learning rate, epochs and RigL's interval were chosen by validation accuracy; target sparsity and pruning rate are the
usual defaults of iterative magnitude pruning (90 % and 20 % a round).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from fxsparse.data import Splits
from fxsparse.errors import ConfigError
from fxsparse.models import lenet_300_100, mlp, small_conv_net
from fxsparse.planning import transform
from fxsparse.training.loop import Task


@dataclass(frozen=True)
class DemoNetwork:
    """One network of the demo.

    Attributes:
        name: the function of fxsparse.models that makes it, also its name in file names.
        title: its name for readers.
        build: makes it, for inputs of shape (batch, 1, 8, 8).
        cost: work of one of its training epochs relative to the cheapest network, for the time left.
        arguments: keyword arguments with which the function of fxsparse.models makes it, where they are not its own.
        exclude: weights that stay dense.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    cost: float
    arguments: Mapping[str, Any] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()


NETWORKS = (
    DemoNetwork("lenet_300_100", "LeNet-300-100", lenet_300_100, 1.0),
    DemoNetwork("small_conv_net", "Small conv net", small_conv_net, 6.0),
)


@dataclass(frozen=True)
class WideSettings:
    """The wide network, whose ticket of shared supports is fast in stock onnxruntime.

    Attributes:
        network: what is trained; its first and last layer, a few weights among many, stay dense.
        group: rows that share their inputs.
        sparsity: of the pruned layers, as decimal text.
        epochs: passes over the training data of the dense training.
        prune_epochs: those of the gradual pruning that follows, without a pattern.
        tune_epochs: those of the fine-tuning after the regrouping.
        tune_rate: its learning rate, falling to zero along a half cosine.
        prune_every: steps between two updates of the pruning's masks.
        batches: batch sizes at which the files are timed.
    """

    network: DemoNetwork = DemoNetwork(
        "mlp", "Wide MLP 64-1024-1024-1024-10", mlp, 30.0, exclude=("hidden.0.weight", "output.weight")
    )
    group: int = 64
    sparsity: str = "0.9"
    epochs: int = 5
    prune_epochs: int = 5
    tune_epochs: int = 3
    tune_rate: float = 3e-4
    prune_every: int = 5
    batches: tuple[int, ...] = (1, 16, 128)

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "network": self.network.name,
            "arguments": {key: repr(value) for key, value in self.network.arguments.items()},
            "group": self.group,
            "sparsity": self.sparsity,
            "epochs": [self.epochs, self.prune_epochs, self.tune_epochs],
            "tune_rate": self.tune_rate,
            "prune_every": self.prune_every,
            "batches": list(self.batches),
        }


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides the demo's results.

    Attributes:
        seeds: one dense training, one ticket and one RigL training each.
        sparsity: target of pruning and of RigL, as decimal text.
        rate: share of the alive weights that a round removes, as decimal text.
        epochs: passes over the training data in the dense training and in every round.
        rigl_epochs: passes over the training data of RigL, which trains once where pruning trains every round.
        rigl_every: steps between two updates of RigL's masks.
        batch_size: samples a step.
        learning_rate: of Adam, falling to zero along a half cosine.
        data_seed: chooses the members of train, validation and test.
        networks: what is trained.
        wide: the network that is shown for its speed; None leaves it out.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    sparsity: str = "0.9"
    rate: str = "0.2"
    epochs: int = 15
    rigl_epochs: int = 45
    rigl_every: int = 25
    batch_size: int = 64
    learning_rate: float = 2e-3
    data_seed: int = 0
    networks: tuple[DemoNetwork, ...] = NETWORKS
    wide: WideSettings | None = WideSettings()

    def __post_init__(self) -> None:
        """Check that there is something to train.

        Raises:
            ConfigError: no seed, or one twice.
        """
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"`seeds` (={list(self.seeds)}) must name at least one seed, each once")

    def describe(self) -> dict[str, Any]:
        """Plain values, for the name of the run directory; seeds do not change it, so more seeds can join a run."""
        return {
            "run": {"name": "demo", "seeds": list(self.seeds)},
            "data": {"name": "digits", "seed": self.data_seed},
            "train": {
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "optimizer": "adam",
                "learning_rate": self.learning_rate,
                "lr_schedule": "cosine",
            },
            "imp": {"target_sparsity": self.sparsity, "prune_rate_per_round": self.rate, "rewind": "init"},
            "rigl": {"epochs": self.rigl_epochs, "every": self.rigl_every, "distribution": "erk"},
            "networks": [network.name for network in self.networks],
            **({} if self.wide is None else {"wide": self.wide.describe()}),
        }

    def task(self, network: DemoNetwork, splits: Splits, epochs: int) -> Task:
        """The training of a network: built dense, transformed, all masks alive at first."""
        example = (splits.train.inputs[:2],)

        def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
            return torch.optim.Adam(parameters, lr=self.learning_rate)

        def scheduler(optimizer: Optimizer, steps: int) -> LRScheduler:
            return CosineAnnealingLR(optimizer, steps)

        return Task(
            build=lambda: transform(network.build(), example, exclude=network.exclude or None),
            train=splits.train,
            validation=splits.validation,
            epochs=epochs,
            batch_size=self.batch_size,
            optimizer=optimizer,
            scheduler=scheduler,
        )


def example_batch(splits: Splits, size: int = 32) -> tuple[Tensor]:
    """Validation images as example inputs; latency is measured at this batch size."""
    return (splits.validation.inputs[:size],)
