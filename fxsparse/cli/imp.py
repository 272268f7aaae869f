"""`fxsparse imp`: iterative magnitude pruning as a YAML file says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from fxsparse.lottery.experiment import Outcome
    from fxsparse.lottery.records import Progress


def imp(
    config: Annotated[Path, typer.Option("--config", help="YAML file; see configs/.")],
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Run these seeds; may be repeated.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on in this run directory.")] = None,
) -> None:
    """Find winning tickets by iterative magnitude pruning; a killed run goes on where it stopped."""
    from rich.console import Console

    from fxsparse.lottery.config import load_config, parse_config
    from fxsparse.lottery.experiment import run
    from fxsparse.training.loop import WORKSPACE

    chosen = load_config(config)
    os.environ.setdefault(WORKSPACE, ":4096:8")  # before CUDA starts; without it CUDA is not deterministic
    if seeds:
        values = chosen.resolved()
        values["run"]["seeds"] = seeds
        chosen = parse_config(values, str(config))
    console = Console()
    with _Display(console, len(chosen.seeds)) as display:
        outcome = run(chosen, resume=resume, progress=display.tell)
    trained = sum(found.trained for rounds in outcome.rounds.values() for found in rounds)
    total = sum(len(rounds) for rounds in outcome.rounds.values())
    console.print(_table(outcome))
    console.print(f"{trained} of {total} rounds trained, {total - trained} found finished", highlight=False)
    console.print(str(outcome.path), soft_wrap=True, highlight=False)


class _Display:
    """A progress bar over the steps of the present round."""

    def __init__(self, console: object, seeds: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        assert isinstance(console, Console)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.seeds = seeds
        self.task = self.bar.add_task("starting", total=None, loss="")

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def tell(self, event: Progress) -> None:
        """Show where the run stands."""
        loss = "" if event.row is None else f"loss {event.row.train_loss:.4f}"
        sparsity = 1 - event.alive / event.total
        text = f"seed {event.seed} round {event.round}/{event.rounds} at {sparsity:.1%}"
        self.bar.update(self.task, description=text, completed=event.step, total=event.until, loss=loss)


def _table(outcome: Outcome) -> Table:
    from rich.table import Table

    from fxsparse.report.statistics import summarise

    table = Table(title="iterative magnitude pruning")
    for heading in ("round", "alive", "sparsity", "validation accuracy", "best step"):
        table.add_column(heading, justify="right")
    runs = list(outcome.rounds.values())
    for rounds in zip(*runs, strict=True):
        first = rounds[0]
        accuracy = summarise([found.metrics["validation_accuracy"] for found in rounds])
        spread = "" if accuracy.half_width is None else f" ± {accuracy.half_width:.4f}"
        steps = ", ".join(str(found.metrics["best_step"]) for found in rounds)
        table.add_row(
            str(first.index), f"{first.alive:,}", f"{first.sparsity:.4f}", f"{accuracy.mean:.4f}{spread}", steps
        )
    return table
