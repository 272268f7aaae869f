"""`fxsparse demo`: the main job, end to end, on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    results_dir: Annotated[Path, typer.Option(help="Where the run directory appears.")] = Path("runs"),
    seeds: Annotated[int, typer.Option(min=1, max=30, help="Number of seeds; more make the ± more certain.")] = 3,
) -> None:
    """Find lottery tickets on handwritten digits, train RigL beside them, export all to verified ONNX, compare.

    Takes two or three minutes on two cores. Stopped and started again, it goes on where it was.
    """
    from rich.console import Console

    from fxsparse.demo import DemoSettings, run_demo

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    run_demo(DemoSettings(seeds=tuple(range(seeds))), results_dir, console)
