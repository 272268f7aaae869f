"""`fxsparse optimize`: an ONNX file of any origin, compacted and lowered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def optimize(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="The source; it stays as it is.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The file to write.")],
    measure: Annotated[
        bool, typer.Option("--measure", help="Time every layer in onnxruntime instead of estimating.")
    ] = False,
    channels: Annotated[bool, typer.Option("--channels/--no-channels", help="Remove channels.")] = True,
    lower: Annotated[bool, typer.Option("--lower/--no-lower", help="Lower shared supports.")] = True,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare with the source.")] = True,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time source and result.")] = True,
    batch: Annotated[str, typer.Option(help="Batch sizes that count.")] = "1,16",
    threads: Annotated[int, typer.Option(min=1, help="Threads of onnxruntime.")] = 1,
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="Size of another free axis; repeatable.")
    ] = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative difference; derived if left out.")] = None,
) -> None:
    """Fold constants, remove dead channels and lower shared zeros of an ONNX file that any tool wrote; verified.

    Example: fxsparse optimize pruned.onnx -o fast.onnx --batch 1,16
    """
    from fxsparse.cli.file_options import parse_sizes, parse_whole_numbers
    from fxsparse.exporters.file_optimize import optimize_file

    report = optimize_file(
        file,
        out,
        channels=channels,
        lower=lower,
        measure=measure,
        verify=verify,
        latency=latency,
        batches=parse_whole_numbers(batch, "batch"),
        threads=threads,
        sizes=parse_sizes(size or ()),
        tolerance=tolerance,
    )
    typer.echo(str(report))
