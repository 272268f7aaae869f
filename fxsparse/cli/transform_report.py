"""`fxsparse transform-report`: what a transform would do to every weight."""

from __future__ import annotations

from typing import Annotated

import typer


def transform_report(
    model: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="Builds the model, or (model, example_inputs).")
    ],
    sparsity: Annotated[float, typer.Option(help="Dead fraction, in [0, 1).")] = 0.9,
    pattern: Annotated[str, typer.Option(help="unstructured, 2:4, block:4x4, channel, shared-support:64, ...")] = (
        "unstructured"
    ),
    distribution: Annotated[str, typer.Option(help="uniform, erk or global.")] = "uniform",
    include: Annotated[list[str] | None, typer.Option(help="Only these weights (name or glob; repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not these weights (name or glob; repeatable).")] = None,
) -> None:
    """Say what would be masked in a model, by which route, and what not, and why. Nothing is changed.

    Example: fxsparse transform-report fxsparse.models:lenet_300_100 --sparsity 0.9 --distribution erk
    """
    from fxsparse.cli.factory import load_factory
    from fxsparse.cli.options import parse_distribution, parse_pattern
    from fxsparse.planning import plan

    legal, shares = parse_pattern(pattern), parse_distribution(distribution)
    built = load_factory(model)
    decided = plan(
        built.model,
        built.example_inputs,
        sparsity=sparsity,
        pattern=legal,
        distribution=shares,
        include=include or None,
        exclude=exclude or None,
    )
    typer.echo(str(decided))
