"""`fxsparse export`: a ticket on disk becomes a verified ONNX file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxsparse.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fxsparse.exporters import Axes, Int8, Optimize, Target

TARGETS = ("stock", "int8", "int8-dynamic", "tensorrt")
GOALS = ("latency", "size")
RULES = ("fixed", "batch", "sequence")


def export(
    ticket: Annotated[Path, typer.Argument(metavar="TICKET", help="A ticket directory with trained weights.")],
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE", help="The file to write.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FACTORY", help="Builds a model that is not one of fxsparse.models."),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set; torch's default if left out.")] = None,
    target: Annotated[str, typer.Option(metavar="|".join(TARGETS), help="What the file is made for.")] = "stock",
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Typical inputs for int8: .npz by input name, or .npy for one input; axis 0 is samples.",
        ),
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative output error that an int8 file may have; 0.1 by default.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="A layer that stays float in an int8 file; may be repeated."),
    ] = None,
    optimize: Annotated[
        str | None, typer.Option(metavar="|".join(GOALS), help="Measure the forms of each layer and keep the best.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds for measuring single layers; 60 by default.")] = None,
    compact: Annotated[
        bool | None, typer.Option("--compact/--no-compact", help="Cut dead channels out; by default where it does.")
    ] = None,
    lower: Annotated[
        bool | None, typer.Option("--lower/--no-lower", help="Lower shared supports; by default where there are some.")
    ] = None,
    dynamic: Annotated[
        str,
        typer.Option(
            metavar="|".join((*RULES, "NAME:AXIS=SIZE,...")), help="Free axes: a rule, or x:0=batch,x:1=sequence."
        ),
    ] = "batch",
    sparse: Annotated[bool, typer.Option("--sparse", help="Store weights by their alive entries.")] = False,
) -> None:
    """Turn a ticket into an ONNX file, checked in onnxruntime; nothing is left behind when the check fails.

    Example: fxsparse export runs/demo-.../tickets/lenet_300_100-imp-seed0.ticket --onnx lenet.onnx
    """
    from fxsparse.cli.factory import Built, load_factory
    from fxsparse.exporters import export_onnx
    from fxsparse.lottery import load_ticket

    chosen = parse_target(target)
    axes, goal, options = parse_dynamic(dynamic), parse_goal(optimize), parse_int8(max_error, exclude)
    found = load_ticket(ticket)
    built = load_factory(model) if model else Built(found.build(), None)
    inputs = built.example_inputs if built.example_inputs is not None else found.example_inputs()
    ready = found.apply(built.model, final=True)
    data = None if calibration is None else read_samples(calibration, ready, inputs)
    report = export_onnx(
        ready,
        onnx,
        inputs,
        target=chosen,
        opset=opset,
        lineage=found.origin,
        calibration=data,
        int8=options,
        compact=compact,
        lower=lower,
        optimize=goal,
        budget=budget,
        dynamic=axes,
        sparse_initializers=sparse,
    )
    typer.echo(str(report))


def parse_target(text: str) -> Target:
    """A target from its word; ConfigError lists them."""
    from fxsparse.exporters import Target

    return Target(_word(text, TARGETS, "target"))


def parse_goal(text: str | None) -> Optimize | None:
    """What to optimise, from its word; ConfigError lists them."""
    from fxsparse.exporters import Optimize

    return None if text is None else Optimize(_word(text, GOALS, "optimize"))


def parse_int8(max_error: float | None, exclude: list[str] | None) -> Int8 | None:
    """The options of an 8-bit target; None where none was given."""
    from fxsparse.exporters import Int8

    if max_error is None and not exclude:
        return None
    bound = Int8().max_error if max_error is None else max_error
    return Int8(max_error=bound, exclude=tuple(exclude or ()))


def parse_dynamic(text: str) -> Axes:
    """Free axes: a rule by its word, or ``name:axis=size`` joined by commas.

    Raises:
        ConfigError: neither.

    >>> parse_dynamic("ids:0=batch,ids:1=sequence")
    {'ids': {0: 'batch', 1: 'sequence'}}
    """
    from fxsparse.exporters import Dynamic

    if ":" not in text:
        return Dynamic(_word(text, RULES, "dynamic"))
    axes: dict[str, dict[int, str]] = {}
    for part in text.split(","):
        place, _, size = part.partition("=")
        name, _, axis = place.rpartition(":")
        if not (name and size.isidentifier() and axis.lstrip("-").isdigit()):
            raise ConfigError(f"`dynamic` (={text}) is no list of NAME:AXIS=SIZE, as in x:0=batch,x:1=sequence")
        axes.setdefault(name, {})[int(axis)] = size
    return axes


def read_samples(path: Path, model: Any, example_inputs: Any, size: int = 32) -> Iterable[Any]:
    """Calibration data from a file of arrays, in batches.

    Args:
        path: ``.npz`` with one array for each input by its name, or ``.npy`` for a model of one input; axis 0 counts
            samples.
        model: the model, whose `forward` names the inputs.
        example_inputs: its example.
        size: samples of a batch; that of the example where the batch is not free is up to the caller.

    Raises:
        DataError: the file cannot be read, or lacks an input.
    """
    from zipfile import BadZipFile

    import numpy as np
    import torch

    from fxsparse.exporters.inputs import read_inputs

    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            held = None if isinstance(loaded, np.ndarray) else dict(loaded)
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(f"`calibration` (={path}) cannot be read ({why}): name a .npy or .npz file") from error
    except (ValueError, EOFError, BadZipFile) as error:  # what is no array looks like a pickle
        raise DataError(f"`calibration` (={path}) holds no plain arrays: save it with numpy.savez") from error
    inputs = read_inputs(model.eval(), example_inputs)
    arrays: Mapping[str, Any] = {inputs.names[0]: loaded} if held is None else held
    missing = [name for name in inputs.names if name not in arrays]
    if missing:
        raise DataError(
            f"`calibration` (={path}) lacks input `{missing[0]}`; it holds {', '.join(arrays) or 'nothing'}, the "
            f"model takes {', '.join(inputs.names)}"
        )
    for name in inputs.names:
        if arrays[name].dtype.kind not in "fiub":
            raise DataError(f"`calibration` (={path}): `{name}` holds {arrays[name].dtype}, no numbers: save such")
    tensors = [torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in inputs.names]
    count = min((len(tensor) for tensor in tensors if tensor.ndim), default=0)
    step = size if inputs.batched else int(inputs.tensors[0].shape[0])
    batches = []
    for start in range(0, count, step):
        if not inputs.batched and start + step > count:
            break
        pieces = [t[start : start + step] for t in tensors]
        batches.append(inputs.build(pieces))
    return batches


def _word(text: str, words: tuple[str, ...], name: str) -> str:
    chosen = text.strip().lower()
    if chosen not in words:
        raise ConfigError(f"`{name}` (={text}) is none of {', '.join(words)}")
    return chosen
