"""`fxsparse compare`: methods side by side, as a YAML file says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    config: Annotated[Path, typer.Option("--config", help="YAML file; see configs/.")],
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes that train side by side.")] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Write comparison.html, which needs plotly.")] = True,
) -> None:
    """Compare sparse-training methods under equal steps; trainings that are there already are not run again."""
    from rich.console import Console
    from rich.table import Table

    from fxsparse.cli.options import parse_pattern
    from fxsparse.comparison.cell import Cell
    from fxsparse.comparison.config import load_config, parse_config
    from fxsparse.comparison.page import write_page
    from fxsparse.comparison.results import columns, lines
    from fxsparse.comparison.runner import run

    chosen = load_config(config)
    if workers is not None:
        values = chosen.model_dump(mode="json")
        values["run"]["workers"] = workers
        chosen = parse_config(values, str(config))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file or a pipe: no number is cut

    def tell(cell: Cell, done: int, total: int) -> None:
        console.print(f"{done}/{total} {cell.key}", highlight=False)

    home, arms = run(chosen, {word: parse_pattern(word) for word in chosen.words}, progress=tell)
    if page:
        write_page(arms, home / "comparison.html", chosen.run.name, chosen.compared)
    table = Table(title=chosen.run.name)
    for heading in columns(chosen.compared):
        table.add_column(heading, justify="right", overflow="fold")
    for row in lines(arms):
        table.add_row(*row)
    console.print(table)
    console.print(str(home), soft_wrap=True, highlight=False)
