"""`fxsparse bench`: ONNX files side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.onnx...", help="ONNX files of any origin.")],
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,16,128",
    threads: Annotated[str, typer.Option(help="Threads of onnxruntime.")] = "1",
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="Size of another free axis; repeatable.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="About how long to measure at each batch size.")] = 1.0,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Print latency, throughput, size and load time of ONNX files, measured in turn in one process.

    Example: fxsparse bench dense.onnx ticket.onnx --batch 1,16,128 --threads 1,2
    """
    from rich.console import Console
    from rich.table import Table

    from fxsparse.cli.file_options import parse_sizes, parse_whole_numbers
    from fxsparse.exporters.bench import bench_files

    report = bench_files(
        files,
        batches=parse_whole_numbers(batch, "batch"),
        threads=parse_whole_numbers(threads, "threads"),
        sizes=parse_sizes(size or ()),
        seconds=seconds,
    )
    if json:
        typer.echo(report.to_json())
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    heading, cells = report.table()
    table = Table()
    for i, name in enumerate(heading):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for j, row in enumerate(cells):
        table.add_row(*row, end_section=(j + 1) % len(report.files) == 0)
    console.print(table)
    for note in report.notes:
        console.print(note, highlight=False, soft_wrap=True)
