"""Equality of an ONNX file and a PyTorch model, shown in onnxruntime on random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from fxsparse.errors import ExportError
from fxsparse.exporters.inputs import Inputs, first_line
from fxsparse.exporters.reference import Case, Reference

_UNSTABLE = 1e-3  # a run on which PyTorch disagrees with itself by more shows nothing
_LARGEST = 1e-3  # relative difference that is allowed at most


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
        varied: whether any output was more than one constant number over all runs.
        notes: runs that show nothing, outputs that never change, inputs that had to stay close to the example.
    """

    batch_sizes: tuple[int, ...]
    samples: int
    worst_absolute: float
    worst_relative: float
    allowed: float
    float32_error: float
    reference: str
    varied: bool = True
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"worst |difference| {self.worst_absolute:.2g}, relative {self.worst_relative:.2g} "
            f"of {self.allowed:.2g} allowed (PyTorch itself {self.float32_error:.2g}) against {self.reference} PyTorch "
            f"on {self.samples} samples in batches of {', '.join(map(str, self.batch_sizes))}"
        )


@dataclass(frozen=True)
class _Column:
    """The differences of one output over all runs."""

    absolute: float
    relative: float
    allowed: float
    noise: float
    constant: bool = False


@dataclass(frozen=True)
class _Run:
    """A case with what onnxruntime gave; `loose` where PyTorch itself is not stable on it."""

    case: Case
    got: list[Any]
    loose: bool


def feed_of(session: Any, inputs: Inputs, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Arrays by input name, for those inputs that the session still has."""
    wanted = {value.name for value in session.get_inputs()}
    return {name: t.numpy() for name, t in zip(inputs.names, tensors, strict=True) if name in wanted}


def verify(session: Any, expected: Reference, tolerance: float | None = None) -> Parity:
    """Compare a session with the runs of a model.

    Runs on which PyTorch itself moves by more than 1e-3 (or to another length) when it is rounded otherwise, as by a
    near tie of scores in a detector, are left out. Where less than half of the runs remain, those of them that agree
    to 1e-3 with PyTorch in its own precision count as well.

    Args:
        session: an onnxruntime session.
        expected: the runs of the model.
        tolerance: as in `Verification`.

    Returns:
        The differences found; all are within the tolerance.

    Raises:
        ExportError: a difference beyond the tolerance, another shape or dtype, too few runs that show something, or an
            error in onnxruntime.
    """
    names = [value.name for value in session.get_outputs()]
    _check_structure(expected.cases, names)
    found = [run_session(session, expected.inputs, case.tensors) for case in expected.cases]
    kept = _comparable(found, expected.cases, names)
    strict = all(not run.loose for run in kept)
    tolerance = tolerance if strict or tolerance is not None else _LARGEST
    columns = [_compare(name, i, kept, tolerance) for i, name in enumerate(names)]
    tightest = max(columns, key=lambda c: c.relative / c.allowed if c.allowed else 0.0)
    return Parity(
        batch_sizes=tuple(sorted({run.case.size for run in kept})),
        samples=sum(run.case.size for run in kept),
        worst_absolute=max(c.absolute for c in columns),
        worst_relative=max(c.relative for c in columns),
        allowed=tightest.allowed,
        float32_error=max(c.noise for c in columns),
        reference=expected.dtype if strict else "same-precision",
        varied=not all(c.constant for c in columns),
        notes=(*expected.notes, *_notes(names, columns, len(expected.cases), len(kept))),
    )


def _check_structure(cases: Sequence[Case], names: Sequence[str]) -> None:
    for case in cases:
        if not len(case.own) == len(case.exact) == len(names):
            raise ExportError(
                f"verification failed: the model returns {len(case.own)} tensors at batch size {case.size} and "
                f"{len(names)} for the example: return the same structure for all inputs"
            )


def run_session(session: Any, inputs: Inputs, tensors: Sequence[Tensor]) -> list[Any]:
    """The outputs of a session; ExportError where onnxruntime stops."""
    try:
        return list(session.run(None, feed_of(session, inputs, tensors)))
    except Exception as error:  # onnxruntime's errors share no base class
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(inputs.names, tensors, strict=True))
        raise ExportError(f"verification failed: onnxruntime stops on inputs {shapes} ({first_line(error)})") from error


def _comparable(found: list[list[Any]], cases: Sequence[Case], names: Sequence[str]) -> list[_Run]:
    """The runs that show something: stable ones; where they are few, also those that agree with PyTorch as it is."""
    free = _free_lengths(cases)
    strict, loose = [], []
    for got, case in zip(found, cases, strict=True):
        if _settled(case) and not _other_length(got, case, free):
            _check_shapes(names, got, case)
            strict.append(_Run(case, got, False))
        elif _agrees(got, case):
            own = replace(case, exact=[y.astype(np.float64) if y.dtype.kind == "f" else y for y in case.own])
            loose.append(_Run(own, got, True))
    if 2 * len(strict) >= len(cases):
        return strict
    if 2 * (len(strict) + len(loose)) < len(cases):
        raise ExportError(
            f"verification failed: {len(strict)} of {len(cases)} runs can be compared, on the others the model itself "
            "changes its outputs when its numbers are rounded otherwise (near ties that it sorts or thresholds): "
            "give example inputs on which it is stable, or export the part before the decisions"
        )
    return strict + loose


def _settled(case: Case) -> bool:
    """Whether PyTorch gives the same when it is rounded otherwise."""
    return all(_near(own, exact) for own, exact in zip(case.own, case.exact, strict=True))


def _agrees(got: list[Any], case: Case) -> bool:
    return all(
        a.shape == b.shape and a.dtype == b.dtype and (_near(a, b) if b.dtype.kind == "f" else np.array_equal(a, b))
        for a, b in zip(got, case.own, strict=True)
    )


def _near(own: Any, exact: Any) -> bool:
    if own.shape != exact.shape:
        return False
    if own.dtype.kind != "f":
        return True
    overflowed = np.where(np.isfinite(own), exact, own)
    relative = _relative(own, overflowed, float(np.finfo(own.dtype).tiny))
    return relative <= max(_UNSTABLE, 8 * float(np.finfo(own.dtype).eps))


def _other_length(got: list[Any], case: Case, free: set[int]) -> bool:
    """Whether an output whose length depends on values has another length here."""
    return any(
        i in free and a.ndim == b.ndim and a.shape != b.shape
        for i, (a, b) in enumerate(zip(got, case.own, strict=True))
    )


def _check_shapes(names: Sequence[str], got: list[Any], case: Case) -> None:
    for name, a, b in zip(names, got, case.own, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ExportError(
                f"verification failed: output `{name}` is {a.dtype} {a.shape} in onnxruntime "
                f"and {b.dtype} {b.shape} in PyTorch"
            )


def _free_lengths(cases: Sequence[Case]) -> set[int]:
    """Positions of the outputs whose shape depends on values: it differs for inputs of the same shapes."""
    shapes: dict[tuple[tuple[tuple[int, ...], ...], int], set[tuple[int, ...]]] = {}
    for case in cases:
        given = tuple(tuple(tensor.shape) for tensor in case.tensors)
        for outputs in (case.own, case.exact):
            for i, output in enumerate(outputs):
                shapes.setdefault((given, i), set()).add(output.shape)
    return {i for (_, i), found in shapes.items() if len(found) > 1}


def _compare(name: str, i: int, runs: Sequence[_Run], tolerance: float | None) -> _Column:
    found = [run.got[i] for run in runs]
    own, exact = [run.case.own[i] for run in runs], [run.case.exact[i] for run in runs]
    if not np.issubdtype(own[0].dtype, np.floating):
        return _compare_whole(name, found, own, exact)
    # what overflows in the model's own precision must overflow alike
    exact = [np.where(np.isfinite(a), b, a) for a, b in zip(own, exact, strict=True)]
    limits = np.finfo(own[0].dtype)
    tiny, eps = float(limits.tiny), float(limits.eps)
    floor = (64 if eps < 1e-4 else 8) * eps
    noise = max(_relative(a, b, tiny) for a, b in zip(own, exact, strict=True))
    allowed = tolerance if tolerance is not None else min(max(10 * noise, floor), max(_LARGEST, floor))
    worst_absolute = worst_relative = 0.0
    for got, expected, run in zip(found, exact, runs, strict=True):
        relative, absolute = _relative(got, expected, tiny), _absolute(got, expected)
        if not relative <= allowed:
            raise ExportError(
                f"verification failed: output `{name}` differs by {absolute:.3g} at batch size {run.case.size}, "
                f"{relative:.3g} of its largest value; allowed is {allowed:.3g}. The exported graph does not compute "
                "what the model computes: look for Python state or branches on values in `forward`"
            )
        worst_relative, worst_absolute = max(worst_relative, relative), max(worst_absolute, absolute)
    return _Column(worst_absolute, worst_relative, allowed, noise, _never_changes(own))


def _compare_whole(name: str, found: list[Any], own: list[Any], exact: list[Any]) -> _Column:
    for got, a, b in zip(found, own, exact, strict=True):
        wrong = int(np.count_nonzero((got != a) & (got != b)))
        if wrong:
            said = f"output `{name}` ({got.dtype}) differs in {wrong} of {got.size} entries"
            raise ExportError(f"verification failed: {said}, where the model rounds to whole values or compares")
    return _Column(0.0, 0.0, 0.0, 0.0, _never_changes(own))


def _never_changes(outputs: Sequence[Any]) -> bool:
    """Whether all entries of all runs are one number, or there is none."""
    values = [y.ravel()[0] for y in outputs if y.size]
    return all(bool((y == values[0]).all()) for y in outputs if y.size)


def _notes(names: Sequence[str], columns: Sequence[_Column], runs: int, kept: int) -> list[str]:
    notes = [
        f"output `{name}` is empty or one number for all inputs, so the verification shows little of it"
        for name, column in zip(names, columns, strict=True)
        if column.constant
    ]
    if kept < runs:
        notes.append(f"{runs - kept} of {runs} runs were not compared: the model is not stable under rounding there")
    return notes


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
