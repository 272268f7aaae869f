"""What the terminal shows while models run."""

from __future__ import annotations

import threading
import time
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fxsparse.report.format import clock
from fxsparse.zoo.render import mark
from fxsparse.zoo.runner import Tick


class Progress:
    """One line a finished model, and a live line below them with the models that are running.

    Args:
        console: where to print.
        total: number of models.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._running: dict[str, str] = {}
        self._done = self._reused = 0
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._live = Live(console=console, transient=True, get_renderable=self._line, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def tell(self, tick: Tick) -> None:
        """Take an event; from any thread."""
        with self._lock:
            if tick.result is None:
                self._running[tick.name] = tick.stage or ""
                return
            self._running.pop(tick.name, None)
            self._done += 1
            self._reused += tick.reused
            if tick.reused:
                return
            result = tick.result
        marks = " ".join(f"{stage.stage} {mark(stage)}" for stage in result.stages)
        style = "red" if result.failed else ""
        place = f"[{self._done}/{self._total}]"
        self._console.print(
            Text(f"{place} {result.name}  {marks}  {result.seconds:.1f} s", style=style), soft_wrap=True
        )

    def _line(self) -> Text:
        with self._lock:
            running = ", ".join(f"{name} ({stage})" for name, stage in self._running.items())
            elapsed = time.monotonic() - self._began
            fresh = self._done - self._reused
            rest = self._total - self._done
            text = f"{self._done}/{self._total} models · {clock(elapsed)}"
            if fresh and rest > 0:
                text += f" · about {clock(elapsed * rest / fresh)} left"
        return Text(f"{text} · {running}", style="dim", overflow="ellipsis", no_wrap=True)
