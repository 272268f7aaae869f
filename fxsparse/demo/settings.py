"""What the demo trains and for how long.

Learning rate, epochs and RigL's interval were chosen by validation accuracy; target sparsity and pruning rate are the
usual defaults of iterative magnitude pruning (90 % and 20 % a round).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from fxsparse.data import Splits
from fxsparse.errors import ConfigError
from fxsparse.models import lenet_300_100, small_conv_net
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
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    cost: float


NETWORKS = (
    DemoNetwork("lenet_300_100", "LeNet-300-100", lenet_300_100, 1.0),
    DemoNetwork("small_conv_net", "Small conv net", small_conv_net, 6.0),
)


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
        }

    def task(self, network: DemoNetwork, splits: Splits, epochs: int) -> Task:
        """The training of a network: built dense, transformed, all masks alive at first."""
        example = (splits.train.inputs[:2],)

        def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
            return torch.optim.Adam(parameters, lr=self.learning_rate)

        def scheduler(optimizer: Optimizer, steps: int) -> LRScheduler:
            return CosineAnnealingLR(optimizer, steps)

        return Task(
            build=lambda: transform(network.build(), example),
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
