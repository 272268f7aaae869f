"""A ticket with unstructured masks -> a ticket with shared supports, with its lineage."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.compensate import Compensation
from fxsparse.lottery.regroup import RegroupReport, regroup
from fxsparse.lottery.ticket import Ticket
from fxsparse.lottery.ticket_save import save_ticket
from fxsparse.planning import transform
from fxsparse.sparsity import Pattern, SharedSupport, generator
from fxsparse.sparsity.counts import check_count
from fxsparse.training.loop import EpochRow, Task, evaluate

BATCH = 256  # calibration samples in a batch


def regroup_ticket(
    ticket: Ticket,
    path: str | Path,
    task: Task,
    pattern: Pattern | None = None,
    *,
    model: nn.Module | None = None,
    example_inputs: Any = None,
    samples: int = 1024,
    finetune: bool = True,
    permute: bool = True,
    how: Compensation | None = None,
    seed: int = 0,
    progress: Callable[[str, EpochRow | None], None] | None = None,
) -> tuple[Ticket, RegroupReport]:
    """Regroup a trained ticket and write the result as a ticket of its own; see `regroup`.

    The new ticket keeps the weights to retrain from; its trained weights are those after the last stage; its lineage
    names the parent, the pattern and the stages, its metrics what was measured on the validation samples.

    Args:
        ticket: With trained weights.
        path: The directory to make.
        task: The data and the fine-tuning; its `build` is not used.
        pattern: The pattern; `SharedSupport(64)` by default.
        model: The ticket's network; built from the factory that the ticket names by default. It is not changed.
        example_inputs: Inputs of the model; those of the ticket's signature by default.
        samples: Training samples that the compensation is measured on, drawn by the seed; 0 = none, magnitudes decide.
        finetune: Whether to train on afterwards.
        permute: Put similar rows into one group.
        how: Settings of the compensation.
        seed: Of the drawn samples and of the order of the fine-tuning.
        progress: See `regroup`.

    Returns:
        The new ticket, and the report.

    Raises:
        TicketError: no trained weights, no factory of fxsparse.models, or a path that exists or cannot be written.
        ConfigError, DataError: as `regroup`.
    """
    check_count(samples, "samples", 0)
    pattern = SharedSupport(64) if pattern is None else pattern
    example = ticket.example_inputs() if example_inputs is None else example_inputs
    built = ticket.build() if model is None else model
    sparse = ticket.apply(transform(built, example, include=list(ticket.masks)), final=True)
    validation = task.validation
    report = regroup(
        sparse,
        pattern,
        _calibration(task, samples, seed),
        evaluate=None if validation is None else lambda each: evaluate(each, validation, task).accuracy,
        finetune=task if finetune else None,
        permute=permute,
        how=how,
        seed=seed,
        progress=progress,
    )
    saved = save_ticket(
        sparse,
        path,
        weights=ticket.weights,
        step=ticket.manifest["weights"]["k"],
        lineage=_lineage(ticket, task, pattern, report, samples, finetune, seed),
        metrics=_metrics(report),
        factory=ticket.manifest["model"].get("factory"),
        arguments=ticket.manifest["model"].get("arguments"),
        input_signature=example if isinstance(example, tuple) and _plain(example) else None,
    )
    return saved, report


def _plain(example: tuple[Any, ...]) -> bool:
    return all(isinstance(each, Tensor) for each in example)


def _calibration(task: Task, samples: int, seed: int) -> list[Tensor]:
    """Training samples drawn by the seed, in batches."""
    inputs = task.train.inputs
    drawn = torch.randperm(len(inputs), generator=generator(seed, 0, 0, "calibration"))[:samples]
    return [inputs[some] for some in torch.split(drawn, BATCH)] if samples else []


def _lineage(
    ticket: Ticket, task: Task, pattern: Pattern, report: RegroupReport, samples: int, finetune: bool, seed: int
) -> dict[str, Any]:
    parent = ticket.lineage
    return {
        "parent": ticket.ticket_id,
        "round": parent.get("round"),
        "method": "regroup",
        "parent_method": parent.get("method"),
        "pattern": str(pattern),
        "projection": report.projection.value,
        "calibration_samples": min(samples, len(task.train.inputs)),
        "finetune": {"epochs": task.epochs, "batch_size": task.batch_size} if finetune else None,
        "regrouped": [layer.name for layer in report.layers if not layer.reason],
        "seed": seed,
        "rates": parent.get("rates"),
        "config_hash": parent.get("config_hash"),
        "data_fingerprint": parent.get("data_fingerprint"),
    }


def _metrics(report: RegroupReport) -> dict[str, Any]:
    stages = {stage.name: stage.accuracy for stage in report.stages if math.isfinite(stage.accuracy)}
    return {"stages": stages, **({"validation_accuracy": [*stages.values()][-1]} if stages else {})}
