"""What the terminal shows while the demo works: the current job, the whole, and finished lines above them."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from fxsparse.report.format import clock


class TimeLeft(ProgressColumn):
    """Elapsed time, and the rest at the average pace of this run (work found done already does not count as pace)."""

    def render(self, task: Task) -> Text:
        """`0:12 · 1:05 left`, or without an estimate in the first seconds."""
        elapsed = time.monotonic() - task.fields["began"]
        fresh = task.completed - task.fields["skipped"]
        rest = (task.total or 0) - task.completed
        text = clock(elapsed)
        if elapsed > 3 and fresh > 0 and rest > 0:
            text += f" · about {clock(elapsed * rest / fresh)} left"
        return Text(text, style="dim")


class Display:
    """Progress of the demo; outside a terminal it prints the finished lines only.

    Args:
        console: where to print.
        work: total work units of the run.
    """

    def __init__(self, console: Console, work: float) -> None:
        self._console = console
        self._current = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=console,
        )
        self._overall = Progress(
            TextColumn("[bold]whole demo"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeLeft(),
            console=console,
        )
        self._job = self._current.add_task("starting", total=1, detail="")
        self._all = self._overall.add_task("", total=work, began=time.monotonic(), skipped=0.0)
        self._live = Live(Group(self._current, self._overall), console=console, transient=True, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def begin(self, description: str, steps: int, detail: str = "") -> None:
        """Start a job of `steps` steps in the first line; 0 where the length is not known."""
        self._current.reset(self._job, description=description, total=steps or None, detail=detail)

    def update(self, step: int, detail: str) -> None:
        """The job stands at `step`; `detail` is round, step and loss."""
        self._current.update(self._job, completed=step, detail=detail)

    def advance(self, work: float, fresh: bool = True) -> None:
        """Add finished work units; `fresh` False for work that an earlier run had done."""
        task = self._overall.tasks[0]
        skipped = task.fields["skipped"] + (0.0 if fresh else work)
        self._overall.update(self._all, advance=work, skipped=skipped)

    def line(self, text: str, style: str = "") -> None:
        """Print a finished line above the bars."""
        self._live.console.print(Text(text, style=style), highlight=False)
