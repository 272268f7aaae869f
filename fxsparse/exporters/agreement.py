"""How close an 8-bit file is to the float model on the user's data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError, DataError, ExportError
from fxsparse.exporters.inputs import Inputs
from fxsparse.exporters.reference import outputs_on
from fxsparse.exporters.targets import Int8
from fxsparse.exporters.verify import run_session


@dataclass(frozen=True)
class Agreement:
    """What an 8-bit file gives, against the masked float model.

    Attributes:
        errors: floating output -> ||int8 - float|| / ||float|| over all samples (Frobenius norms).
        top1: output of 2 or 3 floating axes -> share of rows whose largest entry over the last axis is the same one,
            and output of whole numbers -> share of equal entries.
        samples: number of samples.
        source: what it was measured on.
        reference: dtype of the float model's run.
    """

    errors: Mapping[str, float]
    top1: Mapping[str, float]
    samples: int
    source: str
    reference: str

    @property
    def worst_error(self) -> float:
        """Largest relative error of an output."""
        return max(self.errors.values(), default=0.0)

    @property
    def worst_top1(self) -> float:
        """Smallest top-1 agreement of an output; 1 where there is no such output."""
        return min(self.top1.values(), default=1.0)

    def __str__(self) -> str:
        top1 = f", top-1 agreement {self.worst_top1:.4f}" if self.top1 else ""
        said = f"relative error {self.worst_error:.2g}{top1} against {self.reference} PyTorch"
        return f"{said} on {self.samples} samples of the {self.source}"


def read_calibration(calibration: Iterable[Any], inputs: Inputs, most: int) -> list[list[Tensor]]:
    """The user's data as tensors, item for item.

    Args:
        calibration: each item is what `example_inputs` is: a tuple of positional inputs, or ``(args, kwargs)``; a bare
            tensor is a tuple of one.
        inputs: the example that they have to be like.
        most: how many items are read.

    Raises:
        ConfigError: it cannot be iterated over.
        DataError: there is no item, or one that does not fit or is not finite; the message tells which.
    """
    try:
        items = iter(calibration)
    except TypeError as error:
        kind = type(calibration).__name__
        raise ConfigError(f"`calibration` (={kind}) must be an iterable of inputs, [(x,), ...] for example") from error
    found = []
    for i, item in enumerate(islice(items, most)):
        try:
            tensors = inputs.read(item)
        except ConfigError as error:
            raise DataError(
                f"item {i} of `calibration` does not fit: {error}; give items like the example inputs, without targets"
            ) from error
        for name, tensor in zip(inputs.names, tensors, strict=True):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise DataError(f"item {i} of `calibration`: input `{name}` holds NaN or infinity; leave it out")
        found.append(tensors)
    if not found:
        raise DataError("`calibration` is empty: give some typical inputs, a few hundred samples are plenty")
    return found


def compare(session: Any, model: nn.Module, inputs: Inputs, batches: Sequence[list[Tensor]], source: str) -> Agreement:
    """Measure an 8-bit session against the masked model.

    Args:
        session: of the 8-bit file.
        model: the masked model in eval mode on the CPU.
        inputs: the inputs of the file.
        batches: what to run on.
        source: what `batches` are, in words.

    Raises:
        DataError: the float model itself gives no finite number there.
        ExportError: the session fails.
    """
    names = [value.name for value in session.get_outputs()]
    exact, dtype = outputs_on(model, inputs, batches)
    squares = np.zeros((len(names), 2))
    votes = np.zeros((len(names), 2), dtype=np.int64)
    for i, (tensors, expected) in enumerate(zip(batches, exact, strict=True)):
        got = run_session(session, inputs, tensors)
        for at, (a, b) in enumerate(zip(got, expected, strict=True)):
            _check_finite(names[at], b, i, source)
            if b.dtype.kind == "f":
                squares[at] += _squares(a, b)
            votes[at] += _votes(a, b)
    floats = [at for at in range(len(names)) if exact[0][at].dtype.kind == "f"]
    return Agreement(
        errors={names[at]: _ratio(*squares[at]) for at in floats},
        top1={names[at]: float(votes[at, 0] / votes[at, 1]) for at in range(len(names)) if votes[at, 1]},
        samples=sum(_samples(inputs, tensors) for tensors in batches),
        source=source,
        reference=dtype,
    )


def check(found: Agreement, options: Int8) -> None:
    """Raise ExportError where an 8-bit file is further from the model than `options` allow."""
    name = max(found.errors, key=lambda each: found.errors[each], default="")
    if not found.worst_error <= options.max_error:
        raise ExportError(
            f"the 8-bit file is too far from the model: output `{name}` has relative error {found.worst_error:.3g} on "
            f"the {found.source}, `max_error` (={options.max_error}) is allowed. Give more typical calibration data, "
            "name sensitive layers in `exclude`, use Target.INT8_DYNAMIC, or allow more"
        )
    if found.worst_top1 < options.min_agreement:
        raise ExportError(
            f"the 8-bit file agrees with the model in the largest entry on {found.worst_top1:.4f} of the "
            f"{found.source}, `min_agreement` (={options.min_agreement}) is asked for: name sensitive layers in "
            "`exclude`, or ask for less"
        )


def _samples(inputs: Inputs, tensors: Sequence[Tensor]) -> int:
    return int(tensors[min(inputs.batched)].shape[0]) if inputs.batched else 1


def _check_finite(name: str, expected: Any, item: int, source: str) -> None:
    if expected.dtype.kind == "f" and expected.size and not np.isfinite(expected).any():
        raise DataError(f"output `{name}` of the model is not finite on item {item} of the {source}: look for NaN")


def _squares(got: Any, expected: Any) -> tuple[float, float]:
    """Squared norms of the difference and of the expected, over its finite entries."""
    if got.shape != expected.shape:
        return float("inf"), 1.0
    finite = np.isfinite(expected)
    wide = got.astype(np.float64)
    same = np.array_equal(np.where(finite, 0.0, wide), np.where(finite, 0.0, expected), equal_nan=True)
    if not same or not np.isfinite(wide[finite]).all():
        return float("inf"), 1.0
    difference = wide[finite] - expected[finite]
    return float((difference**2).sum()), float((expected[finite].astype(np.float64) ** 2).sum())


def _votes(got: Any, expected: Any) -> tuple[int, int]:
    """How many rows agree in their largest entry, of how many; entries where the output is whole numbers."""
    if got.shape != expected.shape:
        return 0, 1
    if expected.dtype.kind != "f":
        return int(np.count_nonzero(got == expected)), int(expected.size)
    if expected.ndim not in (2, 3) or expected.shape[-1] < 2 or not expected.size:
        return 0, 0
    same = got.argmax(-1) == expected.argmax(-1)
    return int(np.count_nonzero(same)), int(same.size)


def _ratio(difference: float, expected: float) -> float:
    if expected == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float(np.sqrt(difference / expected))


def example_batches(inputs: Inputs) -> list[list[Tensor]]:
    """The example, and random inputs of its kind: what a dynamic file is compared on without data."""
    generator = torch.Generator().manual_seed(0)
    return [list(inputs.tensors), *(inputs.vary(max(2, inputs.batch), generator) for _ in range(7))]
