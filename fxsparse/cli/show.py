"""`fxsparse show`: a model's graph, as captured or after a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fxsparse.cli.factory import Built
    from fxsparse.graph import Refusal
    from fxsparse.passes import Stage

CAPTURED = "captured"


def show(
    model: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="Builds the model, or (model, example_inputs).")
    ],
    after: Annotated[
        str | None,
        typer.Option(metavar="PASS", help="swap_modules, insert_masks, mask_parameters or fold_masks."),
    ] = None,
) -> None:
    """Print a model's graph, readable: as captured, or after a pass.

    Example: fxsparse show fxsparse.models:lenet_300_100 --after swap_modules
    """
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


def _with_refusals(stage: Stage, refusals: Sequence[Refusal]) -> str:
    return "\n".join([str(stage).rstrip(), *map(str, refusals)])
