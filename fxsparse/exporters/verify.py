"""Equality of an ONNX file and a PyTorch model, shown in onnxruntime on random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters.inputs import Inputs, first_line
from fxsparse.exporters.program import Flat
from fxsparse.graph import preserved_rng

_WIDTHS = (1.0, 4.0)


@dataclass(frozen=True)
class Verification:
    """What to verify on.

    Attributes:
        batch_sizes: batch sizes to run, each at least 1; a model of fixed batch runs at the example's.
        draws: inputs for each batch size: the example first, then random ones of one and of four times its deviation.
        seed: seed of the random inputs.
        tolerance: largest difference allowed, relative to the largest value of the output in that run. None derives it:
            ten times the error that float32 PyTorch itself makes against float64 on these inputs, at least 64 units
            in the last place (8 for half precision), at most 1e-3.

    Raises:
        ConfigError: for a value out of range.
    """

    batch_sizes: tuple[int, ...] = (1, 2, 5, 16)
    draws: int = 4
    seed: int = 0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"`batch_sizes` (={self.batch_sizes}) must name at least one size of 1 or more")
        if self.draws < 1:
            raise ConfigError(f"`draws` (={self.draws}) must be at least 1")
        if self.tolerance is not None and not 0.0 <= self.tolerance < 1.0:
            raise ConfigError(f"`tolerance` (={self.tolerance}) must be in [0, 1): it is relative to the output")


@dataclass(frozen=True)
class Parity:
    """What the verification found.

    Attributes:
        batch_sizes: the batch sizes that ran.
        samples: number of samples compared.
        worst_absolute: largest absolute difference of any output from the reference.
        worst_relative: largest difference relative to the largest value of that output in that run.
        allowed: the largest relative difference that was allowed, of the output that came closest to it.
        float32_error: largest relative error of PyTorch itself, in the model's own precision, against the reference.
        reference: the dtype in which the reference ran.
    """

    batch_sizes: tuple[int, ...]
    samples: int
    worst_absolute: float
    worst_relative: float
    allowed: float
    float32_error: float
    reference: str

    def __str__(self) -> str:
        return (
            f"worst |difference| {self.worst_absolute:.2g}, relative {self.worst_relative:.2g} "
            f"of {self.allowed:.2g} allowed (PyTorch itself {self.float32_error:.2g}) against {self.reference} PyTorch "
            f"on {self.samples} samples in batches of {', '.join(map(str, self.batch_sizes))}"
        )


def feed_of(session: Any, inputs: Inputs, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Arrays by input name, for those inputs that the session still has."""
    wanted = {value.name for value in session.get_inputs()}
    return {name: t.numpy() for name, t in zip(inputs.names, tensors, strict=True) if name in wanted}


def verify(session: Any, model: nn.Module, inputs: Inputs, options: Verification) -> Parity:
    """Compare a session with a model on many inputs.

    Args:
        session: an onnxruntime session.
        model: a private copy of the model, in eval mode on the CPU; its precision is changed here.
        inputs: the example, with the batch axis that the file has.
        options: what to run.

    Returns:
        The differences found; all are within the tolerance.

    Raises:
        ExportError: a difference beyond the tolerance, another shape or dtype, an output that is never finite, a model
            that does not repeat itself, or an error in onnxruntime.
    """
    cases = _cases(inputs, options)
    found = [_run_session(session, inputs, case) for case in cases]
    with preserved_rng():
        own = [_run(model, inputs, case) for case in cases]
        _check_repeats(own[-1], _run(model, inputs, cases[-1]), session)
        exact, reference = _reference(model, inputs, cases, own)
    sizes = [size_of(inputs, case) for case in cases]
    names = [value.name for value in session.get_outputs()]
    columns = []
    for i, name in enumerate(names):
        got, rounded, expected = ([run[i] for run in runs] for runs in (found, own, exact))
        columns.append(_compare(name, got, rounded, expected, sizes, options.tolerance))
    tightest = max(columns, key=lambda c: c[1] / c[2] if c[2] else 0.0)
    return Parity(
        batch_sizes=tuple(sorted(set(sizes))),
        samples=sum(sizes),
        worst_absolute=max(c[0] for c in columns),
        worst_relative=max(c[1] for c in columns),
        allowed=tightest[2],
        float32_error=max(c[3] for c in columns),
        reference=reference,
    )


def size_of(inputs: Inputs, tensors: Sequence[Tensor]) -> int:
    """The batch size of a case; of a fixed one the first axis of the first input that has one."""
    position = min(inputs.batched, default=next((i for i, t in enumerate(tensors) if t.ndim), None))
    return 1 if position is None else int(tensors[position].shape[0])


def _cases(inputs: Inputs, options: Verification) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(options.seed)
    sizes = options.batch_sizes if inputs.batched else (inputs.batch,) * len(options.batch_sizes)
    cases = []
    for size in sizes:
        cases.append(inputs.resized(size))
        cases += [inputs.draw(size, generator, _WIDTHS[i % len(_WIDTHS)]) for i in range(options.draws - 1)]
    return cases


def _run_session(session: Any, inputs: Inputs, tensors: Sequence[Tensor]) -> list[Any]:
    try:
        return list(session.run(None, feed_of(session, inputs, tensors)))
    except Exception as error:  # onnxruntime's errors share no base class
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(inputs.names, tensors, strict=True))
        raise ExportError(f"verification failed: onnxruntime stops on inputs {shapes} ({first_line(error)})") from error


def _run(model: nn.Module, inputs: Inputs, tensors: Sequence[Tensor]) -> list[Any]:
    with torch.no_grad():
        return [t.clone().numpy() for t in Flat(model, inputs)(*(tensor.clone() for tensor in tensors))]


def _check_repeats(first: Sequence[Any], second: Sequence[Any], session: Any) -> None:
    for value, a, b in zip(session.get_outputs(), first, second, strict=True):
        if not np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.floating)):
            raise ExportError(
                f"verification failed: output `{value.name}` of the PyTorch model differs between two equal calls; "
                "remove the randomness or state (dropout that is always on, a counter) from its eval mode"
            )


def _reference(
    model: nn.Module, inputs: Inputs, cases: Sequence[Sequence[Tensor]], own: list[list[Any]]
) -> tuple[list[list[Any]], str]:
    """The model's outputs in float64, or its own where it cannot run so."""
    wide = [[t.double() if t.is_floating_point() else t for t in case] for case in cases]
    try:
        model.double()
        return [_run(model, inputs, case) for case in wide], "float64"
    except Exception:  # a forward that names its dtype fails in another
        return own, "same-precision"


def _compare(
    name: str, found: list[Any], own: list[Any], exact: list[Any], sizes: list[int], tolerance: float | None
) -> tuple[float, float, float, float]:
    """(worst absolute, worst relative, allowed relative, error of PyTorch itself) of one output over all runs."""
    for got, expected in zip(found, own, strict=True):
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise ExportError(
                f"verification failed: output `{name}` is {got.dtype} {got.shape} in onnxruntime "
                f"and {expected.dtype} {expected.shape} in PyTorch"
            )
    if not np.issubdtype(own[0].dtype, np.floating):
        return _compare_whole(name, found, own, exact)
    if not any(np.isfinite(y).any() for y in exact) and any(y.size for y in exact):
        raise ExportError(f"verification failed: output `{name}` is never finite, so nothing is shown: look for NaN")
    # what overflows in the model's own precision must overflow alike
    exact = [np.where(np.isfinite(a), b, a) for a, b in zip(own, exact, strict=True)]
    limits = np.finfo(own[0].dtype)
    tiny, eps = float(limits.tiny), float(limits.eps)
    floor = (64 if eps < 1e-4 else 8) * eps
    noise = max(_relative(a, b, tiny) for a, b in zip(own, exact, strict=True))
    allowed = tolerance if tolerance is not None else min(max(10 * noise, floor), max(1e-3, floor))
    worst_absolute = worst_relative = 0.0
    for got, expected, size in zip(found, exact, sizes, strict=True):
        relative, absolute = _relative(got, expected, tiny), _absolute(got, expected)
        if not relative <= allowed:
            raise ExportError(
                f"verification failed: output `{name}` differs by {absolute:.3g} at batch size {size}, {relative:.3g} "
                f"of its largest value; allowed is {allowed:.3g}. The exported graph does not compute what the model "
                "computes: look for Python state or branches on values in `forward`"
            )
        worst_relative, worst_absolute = max(worst_relative, relative), max(worst_absolute, absolute)
    return worst_absolute, worst_relative, allowed, noise


def _compare_whole(name: str, found: list[Any], own: list[Any], exact: list[Any]) -> tuple[float, float, float, float]:
    for got, a, b in zip(found, own, exact, strict=True):
        wrong = int(np.count_nonzero((got != a) & (got != b)))
        if wrong:
            said = f"output `{name}` ({got.dtype}) differs in {wrong} of {got.size} entries"
            raise ExportError(f"verification failed: {said}, where the model rounds to whole values or compares")
    return 0.0, 0.0, 0.0, 0.0


def _absolute(got: Any, expected: Any) -> float:
    finite = np.isfinite(expected)
    return float(np.abs(got[finite].astype(np.float64) - expected[finite]).max(initial=0.0))


def _relative(got: Any, expected: Any, tiny: float) -> float:
    """Largest difference over the largest finite expected value, both beyond `tiny`, below which numbers lose digits.

    Infinite where the entries that are not finite differ.
    """
    finite = np.isfinite(expected)
    wide = got.astype(np.float64)
    if not np.array_equal(np.where(finite, 0.0, wide), np.where(finite, 0.0, expected), equal_nan=True):
        return float("inf")
    difference = _absolute(got, expected)
    if not difference > tiny:
        return 0.0 if difference <= tiny else float("inf")
    scale = float(np.abs(expected[finite]).max(initial=0.0))
    return difference / scale if scale else float("inf")
