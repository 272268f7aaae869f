"""`fxsparse export`: a ticket on disk becomes a verified ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    ticket: Annotated[Path, typer.Argument(metavar="TICKET", help="A ticket directory with trained weights.")],
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE", help="The file to write.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FACTORY", help="Builds a model that is not one of fxsparse.models."),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set; torch's default if left out.")] = None,
) -> None:
    """Turn a ticket into an ONNX file, checked in onnxruntime; nothing is left behind when the check fails.

    Example: fxsparse export runs/demo-.../tickets/lenet_300_100-imp-seed0.ticket --onnx lenet.onnx
    """
    from fxsparse.cli.factory import Built, load_factory
    from fxsparse.exporters import export_onnx
    from fxsparse.lottery import load_ticket

    found = load_ticket(ticket)
    built = load_factory(model) if model else Built(found.build(), None)
    inputs = built.example_inputs if built.example_inputs is not None else found.example_inputs()
    ready = found.apply(built.model, final=True)
    typer.echo(str(export_onnx(ready, onnx, inputs, opset=opset, lineage=found.origin)))
