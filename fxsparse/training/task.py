"""What is trained: data in tensors, a model, an optimizer, a length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxsparse.errors import ConfigError, DataError


class SamplesLike(Protocol):
    """Inputs and labels with a common first dimension; `fxsparse.data.Split` is one."""

    @property
    def inputs(self) -> Tensor:
        """What the model is called with, sample first."""

    @property
    def labels(self) -> Tensor:
        """What the loss compares with, sample first."""


@dataclass(frozen=True)
class Samples:
    """Inputs and labels with a common first dimension."""

    inputs: Tensor
    labels: Tensor


def correct(outputs: Float[Tensor, "sample ..."], labels: Tensor) -> Bool[Tensor, " sample"]:
    """Which samples are classified correctly: by the largest logit, or by the sign of a single one."""
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return outputs.argmax(1) == labels
    return (outputs.reshape(-1) > 0) == (labels.reshape(-1) > 0.5)


def _adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1.2e-3)


@dataclass(frozen=True)
class Task:
    """What is trained, on what, how, and how long.

    Attributes:
        build: makes the model; it is called with the global random state seeded from the run's seed alone.
        train: the samples that the optimizer sees.
        validation: evaluated after every epoch; None for no evaluation.
        epochs: length of a training, in passes over `train`.
        batch_size: samples in a step; the last batch of an epoch may be smaller.
        optimizer: makes the optimizer from the parameters that require gradients.
        scheduler: makes a learning-rate scheduler from the optimizer and the total number of steps; stepped after
            every optimizer step.
        loss: (outputs, labels) -> mean loss of the batch.
        metric: (outputs, labels) -> bool a sample, of which the mean is the accuracy.
        autocast: torch.bfloat16 or torch.float16 for mixed precision (float16 with a gradient scaler).
        deterministic: run under deterministic algorithms.
    """

    build: Callable[[], nn.Module]
    train: SamplesLike
    validation: SamplesLike | None = None
    epochs: int = 10
    batch_size: int = 64
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = _adam
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    metric: Callable[[Tensor, Tensor], Tensor] = correct
    autocast: torch.dtype | None = None
    deterministic: bool = True

    def __post_init__(self) -> None:
        """Check counts."""
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if value < 1:
                raise ConfigError(f"`{name}` (={value}) must be at least 1")
        if (count := len(self.train.inputs)) != len(self.train.labels) or not count:
            raise DataError(f"`train` has {count} inputs and {len(self.train.labels)} labels; give as many, at least 1")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training samples."""
        return math.ceil(len(self.train.inputs) / self.batch_size)

    @property
    def total_steps(self) -> int:
        """T: optimizer steps of a whole training."""
        return self.epochs * self.steps_per_epoch
