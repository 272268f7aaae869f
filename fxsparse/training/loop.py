"""A small deterministic training loop for data that fits in memory.

The order of the samples is a function of (seed, epoch, round), random draws of the model (dropout) come from a stream
that belongs to the training state, and the state can be captured and restored whole: a training that is stopped at any
step and restored continues bit for bit. The user's own loop needs none of this; `attach` works with any loop.

    >>> from torch import nn
    >>> samples = Samples(torch.randn(64, 4), torch.arange(64) % 3)
    >>> task = Task(build=lambda: nn.Linear(4, 3), train=samples, validation=samples, epochs=2, batch_size=16)
    >>> state = start(task, seed=0)
    >>> fit(state, task)
    >>> state.step == task.total_steps
    True
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import generator
from fxsparse.sparsity.random import seeded
from fxsparse.training.scopes import deterministic, read_streams, set_streams
from fxsparse.training.scopes import training_mode as training_mode
from fxsparse.training.snapshot import Snapshot
from fxsparse.training.task import Samples as Samples
from fxsparse.training.task import SamplesLike as SamplesLike
from fxsparse.training.task import Task as Task
from fxsparse.training.task import correct as correct

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""The environment variable without which cuBLAS refuses to be deterministic."""


class Stateful(Protocol):
    """Anything that travels with a training state: an average of the weights, the handle of an updater."""

    def state_dict(self) -> Any:
        """The state, as nested dictionaries of numbers and tensors."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Set the state."""


@dataclass
class TrainState:
    """A training in progress.

    Attributes:
        model: the model, trained in place.
        optimizer: its optimizer.
        scheduler: its learning-rate scheduler, if any.
        scaler: its gradient scaler, if any.
        seed: the run's seed.
        order: the round that keys the order of the samples; 0 replays the first round.
        step: completed optimizer steps.
        random: random states by device (uint8), the stream of the model's own draws.
        loss_sum: sum of the losses since the last epoch boundary, float64.
        extras: what else is captured and restored, by name.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    scaler: torch.amp.GradScaler | None
    seed: int
    order: int
    step: int
    random: dict[str, Tensor]
    loss_sum: Tensor
    extras: dict[str, Stateful] = field(default_factory=dict)

    def capture(self) -> Snapshot:
        """Copy everything that the continuation depends on.

        That is all parameters and buffers, extra module state, optimizer, schedule, scaler, extras, position and
        random streams.
        """
        return Snapshot.of(
            {
                "model": _tensors(self.model),
                "module_extra": {name: module.get_extra_state() for name, module in _with_extra_state(self.model)},
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "extras": {name: extra.state_dict() for name, extra in self.extras.items()},
                "step": self.step,
                "seed": self.seed,
                "random": self.random,
                "loss_sum": self.loss_sum,
            }
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Set everything that `capture` copied, in place; `order` stays.

        Raises:
            ConfigError: the snapshot is of a model with other tensors, or has other extras.
        """
        saved = snapshot.state()
        own = _tensors(self.model)
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved["model"].items()}:
            names = sorted(set(own) ^ set(saved["model"]))
            raise ConfigError(f"the snapshot is of another model: `tensors` (={names or 'other shapes'}) differ")
        if set(self.extras) != set(saved["extras"]):
            raise ConfigError(f"`extras` (={sorted(self.extras)}) must be those captured: {sorted(saved['extras'])}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved["model"][name])
        for name, module in _with_extra_state(self.model):
            module.set_extra_state(saved["module_extra"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
        for name, extra in self.extras.items():
            extra.load_state_dict(saved["extras"][name])
        self.step, self.seed, self.random = saved["step"], saved["seed"], saved["random"]
        self.loss_sum = saved["loss_sum"].to(self.loss_sum.device)


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy (in [0, 1]) over `count` samples."""

    loss: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class EpochRow:
    """One line of a training's history.

    Attributes:
        epoch: completed passes over the training samples (counted from 1).
        step: completed optimizer steps.
        train_loss: mean of the batch losses since the last row.
        learning_rate: of the first parameter group, after the epoch.
        validation: the evaluation, where the task has validation samples.
    """

    epoch: int
    step: int
    train_loss: float
    learning_rate: float
    validation: Evaluation | None


def start(task: Task, seed: int) -> TrainState:
    """A fresh training: the model built from the seed alone, step 0. The global random state is left as it was."""
    with seeded(seed):
        model = task.build()
    return start_from(task, model, seed)


def start_from(task: Task, model: nn.Module, seed: int) -> TrainState:
    """A fresh training of a model that is already there.

    Raises:
        ConfigError: the model has no parameter that requires a gradient, or CUDA is not set up for determinism.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError("`model` has no parameter that requires a gradient; there is nothing to train")
    device = parameters[0].device
    if device.type == "cuda" and task.deterministic and WORKSPACE not in os.environ:
        raise ConfigError(f"`deterministic` (=True) on {device} needs the environment variable {WORKSPACE}=:4096:8")
    optimizer = task.optimizer(parameters)
    scheduler = None if task.scheduler is None else task.scheduler(optimizer, task.total_steps)
    scaler = torch.amp.GradScaler(device.type) if task.autocast is torch.float16 else None
    random = {"cpu": torch.Generator().manual_seed(seed).get_state()}
    if device.type != "cpu":
        random[str(device)] = torch.Generator(device).manual_seed(seed).get_state()
    return TrainState(
        model, optimizer, scheduler, scaler, seed, 0, 0, random, torch.zeros((), dtype=torch.float64, device=device)
    )


def epoch_order(count: int, seed: int, epoch: int, order: int = 0) -> Tensor:
    """The order of the samples in an epoch: a permutation of range(count), int64, keyed (seed, epoch, order)."""
    return torch.randperm(count, generator=generator(seed, epoch, order, "epoch order"))


def evaluate(model: nn.Module, samples: SamplesLike, task: Task | None = None, batch_size: int = 2048) -> Evaluation:
    """Loss and accuracy in eval mode, weighted by samples; modes, gradients and random state stay as they were.

    Raises:
        DataError: there are no samples.
    """
    loss_of, metric = (nn.functional.cross_entropy, correct) if task is None else (task.loss, task.metric)
    count = len(samples.inputs)
    if not count:
        raise DataError("`samples` (=0) are too few to evaluate; give at least one")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    loss, hits = 0.0, 0
    with torch.no_grad(), torch.random.fork_rng(), training_mode(model, False):
        for first in range(0, count, batch_size):
            inputs = samples.inputs[first : first + batch_size].to(device)
            labels = samples.labels[first : first + batch_size].to(device)
            outputs = model(inputs)
            loss += float(loss_of(outputs, labels)) * len(labels)
            hits += int(metric(outputs, labels).sum())
    return Evaluation(loss / count, hits / count, count)


def fit(
    state: TrainState,
    task: Task,
    until: int | None = None,
    *,
    on_step: Callable[[TrainState, Tensor], None] | None = None,
    on_epoch: Callable[[TrainState, EpochRow], None] | None = None,
) -> None:
    """Train from `state.step` to step `until` (default: the task's total), in place.

    Args:
        state: where the training stands; after an exception it is in an undefined step.
        task: what is trained on what.
        until: the step to stop after.
        on_step: called after every step with the state and the loss of the batch (a detached tensor).
        on_epoch: called after every epoch with its row of the history, before `on_step` of the same step.

    Raises:
        DataError: the loss of an epoch is not finite.
    """
    last = task.total_steps if until is None else until
    device = state.loss_sum.device
    inputs, labels = task.train.inputs.to(device), task.train.labels.to(device)
    with _streams(state), training_mode(state.model, True), deterministic(task.deterministic):
        while state.step < last:
            epoch, batch = divmod(state.step, task.steps_per_epoch)
            order = epoch_order(len(inputs), state.seed, epoch, state.order).to(device)
            shuffled, targets = inputs[order], labels[order]
            for first in range(batch * task.batch_size, len(inputs), task.batch_size):
                stop = first + task.batch_size
                loss = _step(state, task, shuffled[first:stop], targets[first:stop])
                if state.step % task.steps_per_epoch == 0:
                    row = _close_epoch(state, task)
                    if on_epoch is not None:
                        on_epoch(state, row)
                if on_step is not None:
                    _sync(state)
                    on_step(state, loss)
                if state.step == last:
                    break


def _step(state: TrainState, task: Task, inputs: Tensor, labels: Tensor) -> Tensor:
    state.optimizer.zero_grad(set_to_none=True)
    if task.autocast is None:
        loss = task.loss(state.model(inputs), labels)
    else:
        with torch.autocast(inputs.device.type, task.autocast):
            loss = task.loss(state.model(inputs), labels)
    if state.scaler is None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
        state.optimizer.step()
    else:
        state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # as above
        state.scaler.step(state.optimizer)
        state.scaler.update()
    if state.scheduler is not None:
        state.scheduler.step()
    state.step += 1
    detached = loss.detach()
    state.loss_sum += detached
    return detached


def _close_epoch(state: TrainState, task: Task) -> EpochRow:
    mean = float(state.loss_sum) / task.steps_per_epoch
    if not math.isfinite(mean):
        raise DataError(f"the training loss (={mean}) before step {state.step} is not finite; lower the learning rate")
    state.loss_sum = torch.zeros_like(state.loss_sum)
    validation = None if task.validation is None else evaluate(state.model, task.validation, task)
    rate = float(state.optimizer.param_groups[0]["lr"])
    return EpochRow(state.step // task.steps_per_epoch, state.step, mean, rate, validation)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _with_extra_state(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if type(m).get_extra_state is not nn.Module.get_extra_state]


def _sync(state: TrainState) -> None:
    state.random = read_streams(state.random)


@contextlib.contextmanager
def _streams(state: TrainState) -> Iterator[None]:
    """Run under the state's random streams; the global ones are put back afterwards."""
    outside = read_streams(state.random)
    set_streams(state.random)
    try:
        yield
        _sync(state)
    finally:
        set_streams(outside)
