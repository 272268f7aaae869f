"""One training of a comparison: an arm, a pattern, a sparsity, a seed; what it reached and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fxsparse import models
from fxsparse.comparison.config import DENSE, Config, build
from fxsparse.data import Splits, digits, idx_folder
from fxsparse.errors import ConfigError
from fxsparse.graph.accounting import count
from fxsparse.nn import masks
from fxsparse.planning import transform
from fxsparse.sparsity import Pattern, generator
from fxsparse.training import Handle, Initial, Method, Pruning, Static, attach, prune
from fxsparse.training.loop import evaluate

CALIBRATION = 8  # batches that pruning at initialisation and one-shot pruning read


@dataclass(frozen=True)
class Cell:
    """One training; `label` is the arm's name in the configuration, or "dense"."""

    label: str
    pattern: str
    sparsity: float
    seed: int

    @property
    def key(self) -> str:
        """The name of its file."""
        return f"{self.label}-{self.pattern.replace(':', '_')}-{self.sparsity:g}-{self.seed}"


def load(config: Config) -> Splits:
    """The data of a comparison.

    Raises:
        DataError: a file is missing or damaged.
        ConfigError: the digits' library is not installed.
    """
    data = config.data
    if data.dataset == "digits":
        return digits(data.split_seed)
    return idx_folder(str(data.folder), data.validation, data.split_seed)


def train(config: Config, cell: Cell, pattern: Pattern | None, splits: Splits) -> dict[str, Any]:
    """Train one cell; the same seed gives every arm the same weights and the same order of the samples.

    One-shot pruning of a trained model comes after half of the steps, the other half heals it; pruning at
    initialisation and all other methods have all steps for training.

    Returns:
        Accuracies in [0, 1], the sparsity reached, `flops` (training FLOPs of the products of weights over those of
        dense training), `memory` (largest number of bytes that a sparse implementation holds in weights, gradients and
        state, over the dense one's) and R_s.
    """
    model = _model(config, splits, cell.seed)
    trainer = _Trainer(config, splits, cell.seed)
    if cell.label != DENSE:
        if pattern is None:
            raise ConfigError(f"`pattern` (={cell.pattern}) is unknown; give `run` a Pattern for this word")
        method = build(config.methods[cell.label], cell.sparsity, cell.seed)
        model = transform(model, (splits.train.inputs[:1],), pattern=pattern)
        trainer.dense_macs = {row.name: row.macs_dense for row in count(model, (splits.train.inputs[:1],)).rows}
        _fit(trainer, model, method)
    else:
        trainer.fit(model, None, config.train.steps)
    final = [mask for mask in masks(model).values()]
    alive, numel = sum(int(mask.sum()) for mask in final), sum(mask.numel() for mask in final)
    return {
        "validation_accuracy": evaluate(model, splits.validation).accuracy,
        "test_accuracy": evaluate(model, splits.test).accuracy,
        "sparsity": 1 - alive / numel if numel else 0.0,
        "steps": trainer.step,
        "flops": trainer.flops / max(1e-30, trainer.dense_flops) if trainer.dense_flops else 1.0,
        "memory": trainer.memory,
        "explored": trainer.explored,
    }


def _fit(trainer: _Trainer, model: nn.Module, method: Method) -> None:
    steps = trainer.config.train.steps
    if not isinstance(method, Pruning):
        trainer.fit(model, method, steps)
        return
    first = steps // 2 if type(method).__name__ == "OneShot" else 0
    if first:
        trainer.fit(model, None, first)
    prune(model, method, trainer.calibration(), nn.functional.cross_entropy)
    trainer.fit(model, Static(method.sparsity, initial=Initial.KEEP, seed=method.seed), steps - first)


class _Trainer:
    """The loop that all arms share, and what it counts."""

    def __init__(self, config: Config, splits: Splits, seed: int) -> None:
        self.config, self.seed = config, seed
        limit = config.data.limit
        self.inputs, self.labels = splits.train.inputs[:limit], splits.train.labels[:limit]
        self.step, self.flops, self.dense_flops, self.memory, self.explored = 0, 0.0, 0.0, 1.0, 1.0
        self.dense_macs: Mapping[str, int] = {}
        self._peak = 0.0
        self._order = (-1, torch.empty(0, dtype=torch.long))
        self._alive: dict[str, tuple[int, int]] = {}

    def calibration(self) -> list[tuple[Tensor, Tensor]]:
        """The first batches of the training samples."""
        size = self.config.train.batch_size
        return [(self.inputs[i : i + size], self.labels[i : i + size]) for i in range(0, CALIBRATION * size, size)]

    def fit(self, model: nn.Module, method: Method | None, steps: int) -> None:
        """Train for so many steps."""
        optimizer = self._optimizer(model)
        handle = None if method is None else attach(model, optimizer, method, steps)
        size = self.config.train.batch_size
        model.train()
        for _ in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = self._rate()
            rows = self._rows(size)
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(model(self.inputs[rows]), self.labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]  # torch
            self._count(model, handle, optimizer)
            optimizer.step()
            self.step += 1
        if handle is not None:
            self.explored = handle.report().explored
            handle.detach()

    def _rows(self, size: int) -> Tensor:
        per_epoch = math.ceil(len(self.inputs) / size)
        epoch, batch = divmod(self.step, per_epoch)
        if self._order[0] != epoch:
            draw = generator(self.seed, epoch, 0, "epoch order")
            self._order = epoch, torch.randperm(len(self.inputs), generator=draw)
        return self._order[1][batch * size : (batch + 1) * size]

    def _rate(self) -> float:
        train = self.config.train
        done = self.step / train.steps
        factor = (1 + math.cos(math.pi * done)) / 2 if train.lr_schedule == "cosine" else 1.0
        return train.learning_rate * factor

    def _optimizer(self, model: nn.Module) -> Optimizer:
        train = self.config.train
        if train.optimizer == "sgd":
            return SGD(model.parameters(), train.learning_rate, train.momentum, weight_decay=train.weight_decay)
        return AdamW(model.parameters(), train.learning_rate, weight_decay=train.weight_decay)

    def _count(self, model: nn.Module, handle: Handle | None, optimizer: Optimizer) -> None:
        """Forward and input gradient by the alive weights, weight gradient by those too unless it is read dense."""
        if not self.dense_macs:
            return
        found = masks(model)
        for name, mask in found.items():
            if self._alive.get(name, (0, -1))[1] != mask._version:
                self._alive[name] = int(mask.sum()), mask._version
        density = {name: self._alive[name][0] / mask.numel() for name, mask in found.items()}
        watched = handle is not None and handle.method.watches(handle.step + 1)
        for name, macs in self.dense_macs.items():
            alive = density.get(name, 1.0)
            self.flops += macs * (2 * alive + (1.0 if watched else alive))
            self.dense_flops += 3.0 * macs
        states = 1 + (2 if isinstance(optimizer, AdamW) else int(bool(self.config.train.momentum)))
        numel = sum(mask.numel() for mask in found.values())
        alive = sum(self._alive[name][0] for name in found)
        kept = sum(t.numel() for m in (handle._memory if handle else {}).values() for t in m.values())
        held = alive * (1 + states) + (numel - alive if watched else 0) + kept + numel / 32  # the mask: a bit each
        self._peak = max(self._peak, held / (numel * (1 + states)))
        self.memory = self._peak


def _model(config: Config, splits: Splits, seed: int) -> nn.Module:
    _, channels, side, _ = splits.train.inputs.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.train.arch == "lenet_300_100":
            return models.lenet_300_100(in_features=splits.train.inputs[0].numel(), classes=splits.classes)
        if config.train.arch == "lenet_5":
            return models.lenet_5(in_channels=channels, classes=splits.classes, image_size=side)
        if config.train.arch == "mlp":
            return _mlp(splits.train.inputs[0].numel(), config.train.hidden or [], splits.classes)
        return models.small_conv_net(in_channels=channels, classes=splits.classes, image_size=side)


def _mlp(in_features: int, hidden: list[int], classes: int) -> nn.Module:
    widths = [in_features, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(len(hidden)):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))
