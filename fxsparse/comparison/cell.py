"""One training of a comparison: an arm, a pattern, a sparsity, a seed; what it reached and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fxsparse import models
from fxsparse.comparison.config import DENSE, Config, build
from fxsparse.data import Splits, digits, idx_folder
from fxsparse.errors import ConfigError
from fxsparse.graph.accounting import count
from fxsparse.graph.scopes import seeded
from fxsparse.nn import masked_weights, masks
from fxsparse.planning import transform
from fxsparse.sparsity import Pattern, generator
from fxsparse.sparsity.distribution import WeightSpec
from fxsparse.training import Handle, Initial, Method, Pruning, ResuHandle, Static, attach, prune
from fxsparse.training.initial import pattern_of
from fxsparse.training.loop import evaluate

CALIBRATION = 8  # batches that pruning at initialisation and one-shot pruning read


@dataclass(frozen=True)
class Cell:
    """One training; `label` is the arm's name in the configuration, or "dense".

    Attributes:
        label: The arm's name.
        pattern: Its pattern, in words.
        sparsity: What is asked for.
        seed: Weights, masks and order of the samples.
        steps: Steps where they differ from the configuration's, to spend as many FLOPs as dense training; else None.
    """

    label: str
    pattern: str
    sparsity: float
    seed: int
    steps: int | None = None

    @property
    def key(self) -> str:
        """The name of its file."""
        label = quote(self.label, safe=" ")  # a label may hold what a file's name may not, such as the slash of AC/DC
        steps = "" if self.steps is None else f"-{self.steps}"
        return f"{label}-{self.pattern.replace(':', '_')}-{self.sparsity:g}-{self.seed}{steps}"


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
        Accuracies in [0, 1], the sparsity reached, `steps`, `flops` (training FLOPs of the products of weights over
        those of dense training of the configuration's steps), `memory` (largest number of bytes that a sparse
        implementation holds in weights, gradients and state, over the dense one's) and R_s.
    """
    trainer = _Trainer(config, splits, cell.seed, cell.steps)
    if cell.label != DENSE:
        model, method = _arm(config, cell, pattern, splits)
        trainer.dense_macs = {row.name: row.macs_dense for row in count(model, (splits.train.inputs[:1],)).rows}
        _fit(trainer, model, method)
    else:
        model = _model(config, splits, cell.seed)
        trainer.fit(model, None, trainer.steps)
    final = [mask for mask in masks(model).values()]
    alive, numel = sum(int(mask.sum()) for mask in final), sum(mask.numel() for mask in final)
    return {
        "validation_accuracy": evaluate(model, splits.validation).accuracy,
        "test_accuracy": evaluate(model, splits.test).accuracy,
        "sparsity": 1 - alive / numel if numel else 0.0,
        "steps": trainer.step,
        "flops": trainer.ratio * trainer.steps / config.train.steps,
        "memory": trainer.memory,
        "explored": trainer.explored,
    }


def check(config: Config, cell: Cell, pattern: Pattern | None, splits: Splits) -> None:
    """Raise ConfigError where this cell can never be trained; what only data tell is not asked."""
    try:
        model, method = _arm(config, cell, pattern, splits)
        if isinstance(method, Pruning):
            weights = masked_weights(model)
            specs = [
                WeightSpec(name, tuple(masked.weight.shape), masked.spec.layout, pattern_of(method, masked))
                for name, masked in weights.items()
            ]
            sizes = {name: masked.weight.detach().abs() for name, masked in weights.items()}
            method.distribution.targets(specs, method.sparsity, sizes)
        else:
            attach(model, _Trainer(config, splits, cell.seed).optimizer(model), method, config.train.steps).detach()
    except ConfigError as error:
        raise ConfigError(
            f"`methods.{cell.label}` at pattern {cell.pattern}, sparsity {cell.sparsity:g}: {error}"
        ) from error


def _arm(config: Config, cell: Cell, pattern: Pattern | None, splits: Splits) -> tuple[nn.Module, Method]:
    if pattern is None:
        raise ConfigError(f"`pattern` (={cell.pattern}) is unknown; give `run` a Pattern for this word")
    method = build(config.methods[cell.label], cell.sparsity, cell.seed)
    return transform(_model(config, splits, cell.seed), (splits.train.inputs[:1],), pattern=pattern), method


def _fit(trainer: _Trainer, model: nn.Module, method: Method) -> None:
    steps = trainer.steps
    if not isinstance(method, Pruning):
        trainer.fit(model, method, steps)
        return
    first = steps // 2 if type(method).__name__ == "OneShot" else 0
    if first:
        trainer.fit(model, None, first)
    prune(model, method, trainer.calibration(), nn.functional.cross_entropy)
    trainer.held(2.0)  # scores are made from all weights, dead ones included, and as many gradients
    trainer.fit(model, Static(method.sparsity, initial=Initial.KEEP, seed=method.seed), steps - first)


class _Trainer:
    """The loop that all arms share, and what it counts."""

    def __init__(self, config: Config, splits: Splits, seed: int, steps: int | None = None) -> None:
        self.config, self.seed, self.steps = config, seed, steps or config.train.steps
        limit = config.data.limit
        self.inputs, self.labels = splits.train.inputs[:limit], splits.train.labels[:limit]
        self.step, self.flops, self.dense_flops, self.memory, self.explored = 0, 0.0, 0.0, 1.0, 1.0
        self.dense_macs: Mapping[str, int] = {}
        self._peak = 0.0
        self._order = (-1, torch.empty(0, dtype=torch.long))
        self._alive: dict[str, tuple[int, tuple[int, int]]] = {}

    @property
    def ratio(self) -> float:
        """FLOPs so far over those of as many steps of dense training."""
        return self.flops / self.dense_flops if self.dense_flops else 1.0

    def calibration(self) -> list[tuple[Tensor, Tensor]]:
        """The first batches of the training samples."""
        size = self.config.train.batch_size
        last = min(CALIBRATION * size, len(self.inputs))
        return [(self.inputs[i : i + size], self.labels[i : i + size]) for i in range(0, last, size)]

    def fit(self, model: nn.Module, method: Method | None, steps: int) -> None:
        """Train for so many steps."""
        optimizer = self.optimizer(model)
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
            self._count(model, handle)
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
        done = self.step / self.steps
        factor = (1 + math.cos(math.pi * done)) / 2 if train.lr_schedule == "cosine" else 1.0
        return train.learning_rate * factor

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer that all arms share."""
        train = self.config.train
        if train.optimizer == "sgd":
            return SGD(model.parameters(), train.learning_rate, train.momentum, weight_decay=train.weight_decay)
        return AdamW(model.parameters(), train.learning_rate, weight_decay=train.weight_decay)

    @property
    def _numbers(self) -> int:
        """What dense training holds of a weight: value, gradient, moments."""
        train = self.config.train
        return 2 + (2 if train.optimizer == "adamw" else int(bool(train.momentum)))

    def held(self, numbers: float) -> None:
        """Note that so many numbers of each weight are held at once."""
        self._peak = max(self._peak, numbers / self._numbers)
        self.memory = self._peak

    def _count(self, model: nn.Module, handle: Handle | None) -> None:
        """Forward and input gradient by what is alive, weight gradient by what trains, or by all if it is read dense.

        In a RESU phase the dead positions that train are multiplied like alive ones; frozen weights have no gradient.
        """
        if not self.dense_macs:
            return
        found = masks(model)
        for name, mask in found.items():
            now = mask.data_ptr(), mask._version
            if name not in self._alive or self._alive[name][1] != now:
                self._alive[name] = int(mask.sum()), now
        density = {name: self._alive[name][0] / mask.numel() for name, mask in found.items()}
        watched = handle is not None and handle.method.watches(handle.step + 1)
        theta = handle.trainable() if isinstance(handle, ResuHandle) else {}
        opened = {name: int(trained.sum()) / trained.numel() for name, trained in theta.items()}
        frozen = bool(opened) and isinstance(handle, ResuHandle) and handle.method.freeze_active
        for name, macs in self.dense_macs.items():
            alive, trained = density.get(name, 1.0), opened.get(name, 0.0)
            learning = trained if frozen and name in density else alive + trained
            self.flops += macs * (2 * (alive + trained) + (1.0 if watched else learning))
            self.dense_flops += 3.0 * macs
        numel = sum(mask.numel() for mask in found.values())
        live = sum((density[name] + opened.get(name, 0.0)) * mask.numel() for name, mask in found.items()) / numel
        kept = sum(t.numel() for m in (handle._memory if handle else {}).values() for t in m.values()) / numel
        # what lives has a value, a gradient and moments; a gradient that is read dense is held dense; a mask is a bit
        self.held(live * self._numbers + (1 - live if watched else 0.0) + kept + 1 / 32)


def _model(config: Config, splits: Splits, seed: int) -> nn.Module:
    _, channels, side, _ = splits.train.inputs.shape
    with seeded(seed):
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
