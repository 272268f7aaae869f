"""What a search for tickets is told and what it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fxsparse.training.loop import EpochRow


@dataclass(frozen=True)
class Round:
    """One finished round.

    Attributes:
        index: 0 is dense.
        alive: alive prunable weights.
        total: prunable weights.
        metrics: validation_accuracy, validation_loss (last step), best_step, best_accuracy (step of minimum validation
            loss), learning_rates.
        history: one row an epoch.
        ticket: the ticket directory; its final weights are the trained ones.
        ticket_id: names its content.
        trained: False when the round was found finished.
    """

    index: int
    alive: int
    total: int
    metrics: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]
    ticket: Path
    ticket_id: str
    trained: bool

    @property
    def sparsity(self) -> float:
        """1 - alive / total."""
        return 1 - self.alive / self.total


@dataclass(frozen=True)
class Progress:
    """Where a run stands: told at the start of every stretch and after every epoch.

    Attributes:
        seed: the run's seed.
        round: the round in training.
        rounds: the last round.
        step: completed optimizer steps of this round's training.
        until: the step at which it ends.
        alive: alive prunable weights.
        total: prunable weights.
        row: the epoch just finished, if any.
    """

    seed: int
    round: int
    rounds: int
    step: int
    until: int
    alive: int
    total: int
    row: EpochRow | None


@dataclass(frozen=True)
class Origin:
    """What goes into the tickets of a run besides masks and weights.

    Attributes:
        factory: ``module:function`` that builds the model anywhere.
        arguments: its keyword arguments.
        input_signature: example inputs.
        config_hash: of the run's configuration.
        data_fingerprint: of the data; by default computed from the task's tensors.
    """

    factory: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    input_signature: tuple[Tensor, ...] | None = None
    config_hash: str | None = None
    data_fingerprint: str | None = None
