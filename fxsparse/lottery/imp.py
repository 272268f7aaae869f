"""Iterative magnitude pruning with rewinding, one seed, resumable at any instant.

Source: Frankle & Carbin, ICLR 2019 (arXiv 1803.03635); Frankle et al., ICML 2020 (arXiv 1912.05671).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.lottery.canonical import canonical_json, strict_json
from fxsparse.lottery.lock import lock
from fxsparse.lottery.model_state import ModelState
from fxsparse.lottery.prunable import choose, ensure_masks
from fxsparse.lottery.prune import prune_global, prune_layerwise
from fxsparse.lottery.records import Origin, Progress, Round
from fxsparse.lottery.rewind import DataOrder, DeadWeights, Rewind, RewindOptimizer, rewind
from fxsparse.lottery.rounds import HISTORY, train_stretch
from fxsparse.lottery.run_directory import committed, differing, is_committed, set_aside, sweep, unwritable, write_file
from fxsparse.lottery.settings import IMP
from fxsparse.lottery.ticket import Ticket, load_ticket
from fxsparse.lottery.ticket_save import save_ticket
from fxsparse.nn import masks as live_masks
from fxsparse.sparsity import MaskSet, tensor_sha256
from fxsparse.training.loop import EpochRow, Task, TrainState, start
from fxsparse.training.snapshot import Snapshot

TICKET = "round.ticket"
METRICS = "metrics.json"
SETTINGS = "settings.json"


def find_tickets(
    task: Task,
    imp: IMP,
    directory: str | Path,
    seed: int = 0,
    *,
    origin: Origin | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Round, ...]:
    """Train, prune, rewind, until the target sparsity is reached; finished rounds in `directory` are not run again.

    Round 0 is the dense training; round r prunes the trained weights of round r - 1, restores the whole state of step
    k and trains again. Killed at any instant and called again, the result is the same bit for bit (same device kind and
    thread count).

    Args:
        task: what is trained; `task.build` may return a plain model or one made by `fxsparse.transform`.
        imp: how.
        directory: of this seed's run; ``init``, ``rewind``, ``round_000``, ... appear in it, each whole or not at all.
        seed: decides initialisation, order of the samples and all draws.
        origin: what the tickets say about where they come from.
        progress: called as the run goes on.

    Returns:
        all rounds, the dense one first.

    Raises:
        ConfigError: settings that cannot be met, no prunable weight, a directory of other settings or in use.
        DataError: a training that diverged.
        TicketError: a directory that cannot be written.
    """
    run = _Run(task, imp, Path(directory), seed, origin or Origin(), progress or (lambda _: None))
    try:
        run.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(run.directory, error) from error
    with lock(run.directory):
        sweep(run.directory)
        return run.all_rounds()


class _Run:
    """One seed's run; the state at every step is on disk or a function of what is."""

    def __init__(
        self, task: Task, imp: IMP, directory: Path, seed: int, origin: Origin, progress: Callable[[Progress], None]
    ) -> None:
        self.task, self.imp, self.directory, self.seed = task, imp, directory, seed
        self.origin, self.progress = origin, progress
        self.start_step = imp.rewind_step.resolve(task.steps_per_epoch)
        if not 0 <= self.start_step < task.total_steps:
            raise ConfigError(
                f"`rewind_step` (={imp.rewind_step}) is step {self.start_step}; it must lie before the end, "
                f"step {task.total_steps}"
            )
        self.every = None if imp.checkpoint_every is None else imp.checkpoint_every.resolve(task.steps_per_epoch)

    def all_rounds(self) -> tuple[Round, ...]:
        state = start(self.task, self.seed)
        self.names = choose(state.model, self.imp.layers)
        ensure_masks(state.model, self.names)
        parameters = dict(state.model.named_parameters())
        self.counts = self.imp.counts({name: parameters[name].numel() for name in self.names})
        self.total = self.counts.totals[0]
        self.fingerprint = self.origin.data_fingerprint or _fingerprint(self.task)
        self._settle_settings(state)
        self.dead = DeadWeights(state.model, state.optimizer)
        try:
            return self._search(state)
        finally:
            self.dead.close()

    def _search(self, state: TrainState) -> tuple[Round, ...]:
        origin = self._origin_state(state)
        self.scheduler = state.scheduler
        rounds: list[Round] = []
        parent: Ticket | None = None
        for index in range(self.counts.rounds + 1):
            path = self.directory / f"round_{index:03d}"
            found = is_committed(path)
            if not found:
                set_aside(path)
                self._train_round(state, origin, index, rounds, parent, path)
            shutil.rmtree(self._work(path.name), ignore_errors=True)
            parent = load_ticket(path / TICKET, parent)
            rounds.append(self._read(path, index, parent, trained=not found))
        return tuple(rounds)

    def _settle_settings(self, state: TrainState) -> None:
        """Refuse a directory that was made by other settings."""
        groups = state.optimizer.state_dict()["param_groups"]
        record = {
            "imp": self.imp.describe(),
            "seed": self.seed,
            "data_fingerprint": self.fingerprint,
            "model": ModelState.of(state.model).graph_hash(),
            "epochs": self.task.epochs,
            "batch_size": self.task.batch_size,
            "optimizer": type(state.optimizer).__name__,
            "groups": [{key: str(value) for key, value in group.items() if key != "params"} for group in groups],
            "scheduler": None if state.scheduler is None else type(state.scheduler).__name__,
        }
        path = self.directory / SETTINGS
        if not path.is_file():
            write_file(path, canonical_json(record))
            return
        try:
            there = strict_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is damaged ({error}); choose another directory") from error
        if fields := differing(there, json.loads(canonical_json(record))):
            raise ConfigError(
                f"`directory` (={self.directory}) holds a run of other settings; differing: {', '.join(fields)}; "
                "choose another directory"
            )

    def _work(self, name: str) -> Path:
        return self.directory / f"progress_{name}"

    def _origin_state(self, state: TrainState) -> Snapshot:
        """Z_k: read from the disk, or trained and committed; `init` is Z_0 in any case."""
        initial = self._snapshot("init", state)
        if self.start_step == 0:
            return initial
        state.restore(initial)
        if not is_committed(self.directory / "rewind"):
            self._train(state, 0, self.start_step, "rewind")
        origin = self._snapshot("rewind", state)
        shutil.rmtree(self._work("rewind"), ignore_errors=True)
        return origin

    def _snapshot(self, name: str, state: TrainState) -> Snapshot:
        path = self.directory / name
        if not is_committed(path):
            set_aside(path)
            with committed(path) as temporary:
                state.capture().write(temporary)
        return Snapshot.read(path)

    def _train(self, state: TrainState, index: int, until: int, name: str) -> list[dict[str, Any]]:
        alive = self.counts.totals[index]

        def tell(row: EpochRow | None) -> None:
            self.progress(Progress(self.seed, index, self.counts.rounds, state.step, until, alive, self.total, row))

        def resumed() -> None:
            self.dead.refresh()
            tell(None)

        if self.every is None:
            resumed()
        return train_stretch(state, self.task, until, self._work(name), self.every, tell, resumed)

    def _train_round(
        self, state: TrainState, origin: Snapshot, index: int, rounds: list[Round], parent: Ticket | None, path: Path
    ) -> None:
        state.scheduler = self.scheduler
        masks = self._masks(state, index, parent)
        keeps = self.imp.rewind in (Rewind.LR, Rewind.NONE) and parent is not None
        kept = parent.final if keeps and parent is not None else None
        rewind(state, origin, masks, self.imp.rewind_optimizer if index else RewindOptimizer.RESTORE, kept)
        state.order = index if self.imp.data_order is DataOrder.FRESH else 0
        until = self.task.total_steps
        if keeps and self.imp.rewind is Rewind.NONE:
            state.step, state.scheduler = self.task.total_steps, None
            state.loss_sum.zero_()
            for group, rate in zip(state.optimizer.param_groups, rounds[0].metrics["learning_rates"], strict=True):
                group["lr"] = rate
            until += self.imp.finetune_steps or self.task.total_steps
        history = self._train(state, index, until, path.name)
        self._commit(state, origin, index, parent, path, history)

    def _masks(self, state: TrainState, index: int, parent: Ticket | None) -> dict[str, Tensor]:
        """M_r = prune(M_{r-1}, |W_T(r-1)|); all alive in round 0."""
        present = {name: torch.ones_like(mask) for name, mask in live_masks(state.model).items()}
        if parent is None or parent.final is None:
            return present
        before = {name: parent.masks[name] for name in self.names}
        weights = {name: parent.final[name] for name in self.names}
        row = self.counts.alive[index]
        if self.counts.layerwise:
            pruned = prune_layerwise(weights, before, dict(zip(self.counts.names, row, strict=True)))
        else:
            pruned = prune_global(weights, before, row[0], self.imp.min_alive)
        if not MaskSet(pruned).is_nested_in(MaskSet(before)):
            raise AssertionError("masks of successive rounds are nested")
        return {**present, **{name: mask.to(present[name].device) for name, mask in pruned.items()}}

    def _commit(
        self,
        state: TrainState,
        origin: Snapshot,
        index: int,
        parent: Ticket | None,
        path: Path,
        history: list[dict[str, Any]],
    ) -> None:
        metrics = {
            **_summary(history),
            "round": index,
            "alive": self.counts.totals[index],
            "total": self.total,
            "learning_rates": [float(group["lr"]) for group in state.optimizer.param_groups],
        }
        lineage = {
            **self.imp.describe(),
            "parent": None if parent is None else parent.ticket_id,
            "round": index,
            "seed": self.seed,
            "config_hash": self.origin.config_hash,
            "data_fingerprint": self.fingerprint,
        }
        with committed(path) as temporary:
            save_ticket(
                state.model,
                temporary / TICKET,
                weights=origin.state()["model"],
                step=self.start_step,
                lineage=lineage,
                metrics=metrics,
                factory=self.origin.factory,
                arguments=self.origin.arguments,
                input_signature=self.origin.input_signature,
            )
            (temporary / METRICS).write_text(json.dumps(metrics, sort_keys=True, indent=1), encoding="utf-8")
            lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in history)
            (temporary / HISTORY).write_text(lines, encoding="utf-8")

    def _read(self, path: Path, index: int, ticket: Ticket, *, trained: bool) -> Round:
        metrics = strict_json((path / METRICS).read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (path / HISTORY).read_text(encoding="utf-8").splitlines()]
        return Round(
            index,
            sum(int(ticket.masks[name].sum()) for name in self.names),
            self.total,
            metrics,
            tuple(rows),
            path / TICKET,
            ticket.ticket_id,
            trained,
        )


def _summary(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Last evaluation, and the step of minimum validation loss (the earliest among equals)."""
    seen = [row for row in history if row["validation_loss"] is not None]
    if not seen:
        empty = ("validation_accuracy", "validation_loss", "validation_count", "best_step", "best_accuracy")
        return dict.fromkeys(empty)
    best = min(seen, key=lambda row: (row["validation_loss"], row["step"]))
    return {
        "validation_accuracy": seen[-1]["validation_accuracy"],
        "validation_loss": seen[-1]["validation_loss"],
        "validation_count": seen[-1]["validation_count"],
        "best_step": best["step"],
        "best_accuracy": best["validation_accuracy"],
    }


def _fingerprint(task: Task) -> str:
    parts = {"train": task.train, "validation": task.validation}
    return "-".join(
        tensor_sha256(f"{name}/{kind}", getattr(part, kind))[:16]
        for name, part in parts.items()
        if part is not None
        for kind in ("inputs", "labels")
    )
