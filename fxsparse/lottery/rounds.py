"""Training one stretch of a run so that it survives a kill: step checkpoints and the history beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fxsparse.errors import DataError
from fxsparse.lottery.run_directory import committed, fsync, is_committed, unwritable
from fxsparse.training.loop import EpochRow, Task, TrainState, fit
from fxsparse.training.snapshot import Snapshot

HISTORY = "history.jsonl"
OFFSET = "offset.json"
KEPT = 2


def row_json(row: EpochRow) -> dict[str, Any]:
    """A history row as JSON: no wall-clock times, so that histories compare equal."""
    seen = row.validation
    return {
        "epoch": row.epoch,
        "step": row.step,
        "train_loss": row.train_loss,
        "learning_rate": row.learning_rate,
        "validation_loss": None if seen is None else seen.loss,
        "validation_accuracy": None if seen is None else seen.accuracy,
        "validation_count": None if seen is None else seen.count,
    }


def train_stretch(
    state: TrainState,
    task: Task,
    until: int,
    work: Path,
    every: int | None,
    on_row: Callable[[EpochRow], None],
    on_resume: Callable[[], None],
) -> list[dict[str, Any]]:
    """Train to step `until`, from the newest checkpoint in `work` where there is one.

    Args:
        state: at the start of the stretch.
        task: what is trained.
        until: the step to reach.
        work: holds checkpoints and history; the caller removes it once the result is committed.
        every: steps between checkpoints; None for none (a killed stretch starts over).
        on_row: called after every epoch.
        on_resume: called after a checkpoint has been restored.

    Returns:
        the history rows of the whole stretch.
    """
    if every is None:
        shutil.rmtree(work, ignore_errors=True)
        rows: list[dict[str, Any]] = []

        def keep(state: TrainState, row: EpochRow) -> None:
            rows.append(row_json(row))
            on_row(row)

        fit(state, task, until, on_epoch=keep)
        return rows
    try:
        work.mkdir(parents=True, exist_ok=True)
        return _train_checkpointed(state, task, until, work, every, on_row, on_resume)
    except OSError as error:
        raise unwritable(work, error) from error


def _train_checkpointed(
    state: TrainState,
    task: Task,
    until: int,
    work: Path,
    every: int,
    on_row: Callable[[EpochRow], None],
    on_resume: Callable[[], None],
) -> list[dict[str, Any]]:
    offset = _resume(state, work)
    on_resume()
    with (work / HISTORY).open("a+b") as history:
        history.truncate(offset)
        history.seek(0, 2)

        def write_row(state: TrainState, row: EpochRow) -> None:
            history.write(json.dumps(row_json(row), sort_keys=True).encode() + b"\n")
            history.flush()
            on_row(row)

        def checkpoint(state: TrainState, loss: Tensor) -> None:
            if state.step % every == 0 and state.step < until:
                fsync(work / HISTORY)
                _checkpoint(state, work, history.tell())

        fit(state, task, until, on_step=checkpoint, on_epoch=write_row)
    return [json.loads(line) for line in (work / HISTORY).read_text(encoding="utf-8").splitlines()]


def _checkpoints(work: Path) -> list[Path]:
    return sorted(work.glob("step_*"))


def _checkpoint(state: TrainState, work: Path, offset: int) -> None:
    target = work / f"step_{state.step:09d}"
    if target.exists():  # damaged: a valid one would have been resumed from
        shutil.rmtree(target)
    with committed(target) as temporary:
        state.capture().write(temporary)
        (temporary / OFFSET).write_text(json.dumps({"history_bytes": offset}), encoding="utf-8")
    for old in _checkpoints(work)[:-KEPT]:
        shutil.rmtree(old)


def _resume(state: TrainState, work: Path) -> int:
    """Restore the newest valid checkpoint; the number of valid history bytes."""
    for path in reversed(_checkpoints(work)):
        if is_committed(path):
            try:
                snapshot = Snapshot.read(path)
            except DataError:
                continue
            state.restore(snapshot)
            return int(json.loads((path / OFFSET).read_text(encoding="utf-8"))["history_bytes"])
    return 0
