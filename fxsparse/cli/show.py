"""`fxsparse show`: a model's graph, as captured or after a pass; or what an ONNX file holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fxsparse.cli.factory import Built
    from fxsparse.graph import Refusal
    from fxsparse.passes import Stage

CAPTURED = "captured"
FILE = ".onnx"


def show(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY|FILE.onnx",
            help="Builds the model, or (model, example_inputs); or an exported file.",
        ),
    ],
    after: Annotated[
        str | None,
        typer.Option(metavar="PASS", help="swap_modules, insert_masks, mask_parameters or fold_masks."),
    ] = None,
) -> None:
    """Print a model's graph, readable: as captured, or after a pass; of an ONNX file its contents and their zeros.

    Example: fxsparse show fxsparse.models:lenet_300_100 --after swap_modules
    """
    if model.endswith(FILE):
        typer.echo(described_file(model, after))
        return
    from fxsparse.cli.factory import load_factory

    typer.echo(described(load_factory(model), after))


def described(built: Built, after: str | None) -> str:
    """The model as captured (`after` None or "captured"), or after the named pass, and what stays Python, and why.

    Raises:
        ConfigError: no pass has that name; the message lists them.
    """
    from fxsparse.errors import ConfigError
    from fxsparse.graph import capture
    from fxsparse.passes import Stage
    from fxsparse.planning import plan

    if after in (None, CAPTURED):
        captured = capture(built.model, built.example_inputs)
        return _with_refusals(Stage(CAPTURED, captured.module), captured.refusals)
    decided = plan(built.model, built.example_inputs)
    stages = {stage.name: stage for stage in decided.stages().stages}
    if after not in stages:
        raise ConfigError(f"`--after` (={after}) is no pass; choose one of {', '.join(stages)}")
    return _with_refusals(stages[after], decided.refusals)


def described_file(path: str, after: str | None) -> str:
    """What an ONNX file holds.

    Raises:
        ConfigError: a pass is asked for: a file has none.
        ExportError: the file cannot be read.
    """
    from fxsparse.errors import ConfigError
    from fxsparse.exporters import read_contents

    if after is not None:
        raise ConfigError(f"`--after` (={after}) is for models: a file holds what the last pass left; leave it out")
    return str(read_contents(path))


def _with_refusals(stage: Stage, refusals: Sequence[Refusal]) -> str:
    return "\n".join([str(stage).rstrip(), *map(str, refusals)])
