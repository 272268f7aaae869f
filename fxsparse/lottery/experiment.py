"""A configuration, run: one directory, all its seeds, the sparsity-accuracy table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fxsparse import models
from fxsparse.data import digits
from fxsparse.errors import ConfigError
from fxsparse.lottery.config import SCHEMA_VERSION, Config, MultiStep, Train
from fxsparse.lottery.counts import FinalRound
from fxsparse.lottery.imp import find_tickets
from fxsparse.lottery.prune import Scope
from fxsparse.lottery.records import Origin, Progress, Round
from fxsparse.lottery.rewind import DataOrder, Rewind, RewindOptimizer, Step
from fxsparse.lottery.run_directory import RunDirectory, write_file
from fxsparse.lottery.settings import IMP
from fxsparse.lottery.ticket import load_ticket
from fxsparse.training.loop import Task

SUMMARY = "sparsity_vs_accuracy.json"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "lenet_300_100": {"in_features": 64, "classes": 10},
    "small_conv_net": {"in_channels": 1, "classes": 10, "image_size": 8},
}


@dataclass(frozen=True)
class Outcome:
    """What a run has made.

    Attributes:
        path: the run directory.
        config_hash: the hash of the configuration.
        rounds: all rounds by seed.
    """

    path: Path
    config_hash: str
    rounds: Mapping[int, tuple[Round, ...]]


def settings(config: Config) -> IMP:
    """The engine's settings of a configuration."""
    imp = config.imp
    return IMP(
        rate=imp.prune_rate_per_round,
        target=imp.target_sparsity,
        num_rounds=imp.num_rounds,
        final_round=FinalRound(imp.final_round),
        scope=Scope(imp.scope),
        rate_factors=imp.rate_factors,
        min_alive=imp.min_alive_per_layer,
        rewind=Rewind(imp.rewind),
        rewind_step=Step.parse(imp.rewind_step),
        rewind_optimizer=RewindOptimizer(imp.rewind_optimizer),
        data_order=DataOrder(imp.data_order),
        layers=None if imp.prunable_layers == "all" else tuple(imp.prunable_layers),
        checkpoint_every=None if imp.checkpoint_every is None else Step.parse(imp.checkpoint_every, "checkpoint_every"),
        finetune_steps=imp.finetune_steps,
    )


def task(config: Config) -> tuple[Task, Origin]:
    """What a configuration trains, and what its tickets say about that.

    Raises:
        ConfigError: the device is not there, or the data set's library is not installed.
    """
    splits = digits(config.data.split_seed)
    train, device = config.train, _device(config.run.device)
    arguments = ARGUMENTS[train.arch]
    factory = getattr(models, train.arch)
    made = Task(
        build=lambda: factory(**arguments).to(device),
        train=splits.train,
        validation=splits.validation,
        epochs=train.epochs_per_round,
        batch_size=train.batch_size,
        optimizer=lambda parameters: _optimizer(train, parameters),
        scheduler=None,
        autocast={"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[train.precision],
        deterministic=config.run.deterministic,
    )
    if train.lr_schedule != "constant" or train.warmup_steps != "0it":
        factor = learning_rate_factor(train, made.steps_per_epoch)
        made = Task(**{**vars(made), "scheduler": lambda optimizer, total: _scheduler(optimizer, total, factor)})
    origin = Origin(
        factory=f"fxsparse.models:{train.arch}",
        arguments=arguments,
        input_signature=(splits.train.inputs[:1],),
        config_hash=config.hash(),
        data_fingerprint=splits.fingerprint,
    )
    return made, origin


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"`run.device` (={name}) is not there: no CUDA device is visible; say cpu")
    return torch.device(name)


def _optimizer(train: Train, parameters: Iterable[nn.Parameter]) -> Optimizer:
    if train.optimizer == "adam":
        return Adam(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    return SGD(parameters, lr=train.learning_rate, momentum=train.momentum, weight_decay=train.weight_decay)


def learning_rate_factor(train: Train, steps_per_epoch: int) -> Callable[[int, int], float]:
    """(step, total steps) -> factor of the learning rate: linear warm-up from 1/(w + 1), then the schedule."""
    warmup = Step.parse(train.warmup_steps, "warmup_steps").resolve(steps_per_epoch)
    schedule = train.lr_schedule

    def factor(step: int, total: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if isinstance(schedule, MultiStep):
            passed = [m for m in schedule.milestones if Step.parse(m, "milestones").resolve(steps_per_epoch) <= step]
            return float(schedule.gamma ** len(passed))
        if schedule == "cosine":
            return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))) / 2
        return 1.0

    return factor


def _scheduler(optimizer: Optimizer, total: int, factor: Callable[[int, int], float]) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: factor(step, total))


def run(config: Config, *, resume: Path | None = None, progress: Callable[[Progress], None] | None = None) -> Outcome:
    """Run every seed of a configuration; finished rounds are found and not run again.

    Args:
        config: what to run.
        resume: an existing run directory to go on in; it must be of this configuration and data.
        progress: see `find_tickets`.

    Raises:
        ConfigError: settings that cannot be met, or a directory of another configuration or in use.
        TicketError: a directory that cannot be written, or a damaged ticket in it.
    """
    made, origin = task(config)
    imp = settings(config)
    opened = RunDirectory.open(
        Path(config.imp.results_dir),
        config.run.name,
        config.resolved(),
        origin.data_fingerprint or "",
        defaults=Config().resolved(),
        schema_version=SCHEMA_VERSION,
        resume=resume,
    )
    with opened as directory:
        rounds = {
            seed: find_tickets(made, imp, directory.seed(seed), seed, origin=origin, progress=progress)
            for seed in config.seeds
        }
        outcome = Outcome(directory.path, directory.config_hash, rounds)
        write_file(directory.path / SUMMARY, json.dumps(summary(config, outcome), sort_keys=True, indent=1))
    return outcome


def summary(config: Config, outcome: Outcome) -> dict[str, Any]:
    """The sparsity-accuracy table of a run as JSON, derived from committed rounds."""
    count = min(len(rounds) for rounds in outcome.rounds.values())
    return {
        "schema": "fxsparse.sparsity_vs_accuracy/1",
        "arch": config.train.arch,
        "config_hash": outcome.config_hash,
        "data": config.data.dataset,
        "rounds": [
            _round_summary([(seed, rounds[index]) for seed, rounds in outcome.rounds.items()]) for index in range(count)
        ],
    }


def _round_summary(by_seed: list[tuple[int, Round]]) -> dict[str, Any]:
    first = by_seed[0][1]
    accuracies = [found.metrics["validation_accuracy"] for _, found in by_seed]
    mean = math.fsum(accuracies) / len(accuracies)
    spread = math.fsum((value - mean) ** 2 for value in accuracies)
    return {
        "round": first.index,
        "global_sparsity": first.sparsity,
        "density": first.alive / first.total,
        "active_params": first.alive,
        "total_prunable_params": first.total,
        "per_layer_sparsity": _layers([load_ticket(found.ticket).masks for _, found in by_seed]),
        "seeds": [
            {
                "seed": seed,
                "val_accuracy": found.metrics["validation_accuracy"],
                "val_loss": found.metrics["validation_loss"],
                "early_stop_step": found.metrics["best_step"],
                "val_accuracy_early_stop": found.metrics["best_accuracy"],
                "train_history": list(found.history),
                "ticket_id": found.ticket_id,
            }
            for seed, found in by_seed
        ],
        "aggregate": {
            "val_accuracy": {
                "mean": mean,
                "sd": math.sqrt(spread / (len(accuracies) - 1)) if len(accuracies) > 1 else None,
            }
        },
    }


def _layers(masks: list[Mapping[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Mean over seeds of the dead weights in every layer."""
    result = {}
    for name, mask in masks[0].items():
        zeros = sum(one[name].numel() - int(one[name].sum()) for one in masks) / len(masks)
        result[name] = {"sparsity": zeros / mask.numel(), "zeros": zeros, "total": mask.numel()}
    return result
