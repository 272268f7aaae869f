"""`fxsparse regroup`: a ticket with unstructured masks becomes one that stock runtimes are fast with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fxsparse.data import Splits
    from fxsparse.lottery import Ticket
    from fxsparse.training.loop import EpochRow, Task

DIGITS = "digits"


def regroup(
    ticket: Annotated[Path, typer.Argument(metavar="TICKET", help="A ticket directory with trained weights.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The ticket directory to write.")],
    pattern: Annotated[str, typer.Option(help="shared:64, or any other pattern's word.")] = "shared:64",
    data: Annotated[str, typer.Option(help="digits, or a folder of IDX files (MNIST, Fashion-MNIST).")] = DIGITS,
    split_seed: Annotated[int, typer.Option(min=0, help="Chooses the members of the parts of the data.")] = 0,
    any_data: Annotated[bool, typer.Option("--any-data", help="Take other data than the ticket was found on.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Calibration samples; 0 = magnitudes decide.")] = 1024,
    epochs: Annotated[int, typer.Option(min=0, help="Passes of the fine-tuning; 0 = none.")] = 5,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of Adam, falling to zero by cosine.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a step of the fine-tuning.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawn samples and their order.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FACTORY", help="Builds a model that is not one of fxsparse.models."),
    ] = None,
    onnx: Annotated[Path | None, typer.Option("--onnx", metavar="FILE", help="Export the result, too.")] = None,
) -> None:
    """Put rows of similar weights into groups that share their inputs, compensate, fine-tune; measure every step.

    Example: fxsparse regroup runs/demo-.../tickets/lenet_300_100-imp-seed0.ticket --to lenet-shared.ticket
    """
    from fxsparse.cli.factory import Built, load_factory
    from fxsparse.cli.options import parse_pattern
    from fxsparse.lottery import load_ticket
    from fxsparse.lottery.regroup_ticket import regroup_ticket
    from fxsparse.training.loop import evaluate

    wanted = parse_pattern(pattern)
    found = load_ticket(ticket)
    splits = _splits(data, split_seed)
    if not any_data:
        _check_data(found, splits, data)
    built = load_factory(model) if model else Built(found.build(), None)
    made, report = regroup_ticket(
        found,
        to,
        _task(splits, max(1, epochs), batch_size, learning_rate),
        wanted,
        model=built.model,
        example_inputs=built.example_inputs,
        samples=samples,
        finetune=epochs > 0,
        seed=seed,
        progress=_tell,
    )
    typer.echo(str(report))
    finished = made.apply(load_factory(model).model if model else made.build(), final=True)
    typer.echo(f"test accuracy {100 * evaluate(finished, splits.test).accuracy:.2f} %")
    typer.echo(str(to))
    if onnx is not None:
        from fxsparse.exporters import export_onnx
        from fxsparse.sparsity import SharedSupport

        inputs = built.example_inputs if built.example_inputs is not None else made.example_inputs()
        lower = True if isinstance(wanted, SharedSupport) else None
        typer.echo(str(export_onnx(finished, onnx, inputs, lower=lower, lineage=made.origin)))


def _splits(data: str, seed: int) -> Splits:
    from fxsparse.data import digits, idx_folder

    return digits(seed) if data == DIGITS else idx_folder(data, seed=seed)


def _check_data(ticket: Ticket, splits: Splits, data: str) -> None:
    from fxsparse.errors import ConfigError

    known = ticket.lineage.get("data_fingerprint")
    if known and known != splits.fingerprint:
        raise ConfigError(
            f"`--data` (={data}) is not what the ticket was found on ({known[:12]}..., not "
            f"{splits.fingerprint[:12]}...): name its data and `--split-seed`, or say --any-data"
        )


def _task(splits: Splits, epochs: int, batch_size: int, learning_rate: float) -> Task:
    import torch
    from torch.optim.lr_scheduler import CosineAnnealingLR

    from fxsparse.errors import ConfigError
    from fxsparse.training.loop import Task

    def never() -> torch.nn.Module:
        raise ConfigError("a regrouped ticket is not built anew")

    return Task(
        build=never,
        train=splits.train,
        validation=splits.validation,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=learning_rate),
        scheduler=lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
    )


def _tell(stage: str, row: EpochRow | None) -> None:
    if row is None:
        typer.echo(f"{stage} ...", err=True)
    elif row.validation is not None:
        accuracy = 100 * row.validation.accuracy
        typer.echo(f"  epoch {row.epoch}: loss {row.train_loss:.4f}, validation {accuracy:.2f} %", err=True)
