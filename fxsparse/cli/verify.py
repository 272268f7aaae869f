"""`fxsparse verify`: an ONNX file against a ticket, or another file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="The file to check.")],
    against: Annotated[
        Path, typer.Option("--against", metavar="TICKET|FILE.onnx", help="A ticket directory, or another ONNX file.")
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FACTORY", help="Builds the ticket's model, if not one of fxsparse.models."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative difference of an output; derived if left out.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="Size of a free axis, against a file; repeatable.")
    ] = None,
) -> None:
    """Check that a file holds a ticket's masks and computes what it computes; exit code 4 if not.

    Example: fxsparse verify lenet.onnx --against runs/demo-.../tickets/lenet_300_100-imp-seed0.ticket
    """
    from fxsparse.cli.errors import VERIFICATION
    from fxsparse.cli.factory import Built, load_factory
    from fxsparse.cli.file_options import parse_sizes
    from fxsparse.exporters.against import verify_file

    sizes = parse_sizes(size or ())
    if against.is_file():
        verdict = verify_file(file, against, tolerance=tolerance, sizes=sizes)
    else:
        from fxsparse.lottery import load_ticket

        ticket = load_ticket(against)
        built = load_factory(model) if model else Built(None, None)  # type: ignore[arg-type]
        verdict = verify_file(file, ticket, model=built.model, example_inputs=built.example_inputs, tolerance=tolerance)
    typer.echo(str(verdict))
    if not verdict.passed:
        raise typer.Exit(VERIFICATION)
