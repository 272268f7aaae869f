"""`fxsparse show`: a model's graph, as captured or after a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fxsparse.cli.factory import Built
    from fxsparse.passes import Stage

CAPTURED, FOLDED = "captured", "fold_masks"


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

    typer.echo(str(stage_of(load_factory(model), after)))


def stage_of(built: Built, after: str | None) -> Stage:
    """The model as captured (`after` None or "captured"), or after the named pass.

    Raises:
        ConfigError: no pass has that name; the message lists them.
    """
    from fxsparse.errors import ConfigError
    from fxsparse.graph import capture
    from fxsparse.passes import FoldMasks, Stage
    from fxsparse.planning import plan

    if after in (None, CAPTURED):
        return Stage(CAPTURED, capture(built.model, built.example_inputs).module)
    decided = plan(built.model, built.example_inputs)
    names = [each.name for each in decided.pipeline().passes]
    if after in names:
        return decided.stages().stage(after)
    if after != FOLDED:
        raise ConfigError(f"`--after` (={after}) is no pass; choose one of {', '.join([CAPTURED, *names, FOLDED])}")
    result = FoldMasks()(decided.apply(), built.example_inputs)
    return Stage(FOLDED, result.module, result.records)
