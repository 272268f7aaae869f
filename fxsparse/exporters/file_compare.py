"""Two ONNX models on the same random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters.file_double import CannotRun, Runner
from fxsparse.exporters.file_inputs import Feed, Signature, fitting, flat
from fxsparse.exporters.inputs import first_line

Array = NDArray[Any]
EXACT = 1e-12  # of the output's largest value: what rounding in float64 may make
_LEAST = 64 * float(np.finfo(np.float32).eps)
_DERIVED = 1e-4  # of the output's largest value, where no float64 run says how large float32's own error is


@dataclass(frozen=True)
class Difference:
    """How far the outputs of one run are apart.

    Attributes:
        absolute: largest difference of any entry.
        relative: largest difference over the largest value of its output.
        unequal: entries of outputs that are no floats which differ.
    """

    absolute: float = 0.0
    relative: float = 0.0
    unequal: int = 0

    def worse(self, other: Difference) -> Difference:
        """The larger of both in each figure."""
        return Difference(
            max(self.absolute, other.absolute), max(self.relative, other.relative), self.unequal + other.unequal
        )


@dataclass(frozen=True)
class Comparison:
    """Two models on random inputs.

    Attributes:
        samples: samples that were compared.
        batch_sizes: in calls of these sizes.
        single: the differences in the models' own precision.
        allowed: relative difference that was allowed there.
        exact: the differences of their float64 copies; None where these do not run, `reason` says why.
        reason: why there is no float64 comparison.
        constant: whether every output was one number throughout, which shows little.
        blind: outputs, by their places, that held no finite number anywhere.
    """

    samples: int
    batch_sizes: tuple[int, ...]
    single: Difference
    allowed: float
    exact: Difference | None
    reason: str
    constant: bool
    blind: tuple[int, ...] = ()

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.batch_sizes))
        proof = (
            f"float64 copies differ by {self.exact.relative:.2g}, relative to the output"
            if self.exact is not None
            else f"float64 was not compared: {self.reason}"
        )
        if self.blind:
            proof += f"; nothing is shown of output {', '.join(map(str, self.blind))}, which holds no finite number"
        return (
            f"worst |difference| {self.single.absolute:.2g}, relative {self.single.relative:.2g} of "
            f"{self.allowed:.2g} allowed on {self.samples} samples in batches of {sizes}; {proof}"
        )


def feeds_of(session: Any, signature: Signature, batches: Sequence[int] = (1, 2, 5), seed: int = 0) -> list[Feed]:
    """Random inputs at several batch sizes; at the fixed one only, where the batch is fixed."""
    fixed = signature.fixed_batch
    sizes = [fixed] * len(batches) if fixed is not None else list(batches)
    filling = fitting(session, signature, sizes[0], seed)
    feeds = [signature.draw(size, seed + 1 + turn, filling) for turn, size in enumerate(sizes)]
    usable = [feed for feed in feeds if _runs(session, feed)]
    if not usable:
        raise ExportError(f"the file runs on no random input at batch sizes {sizes}: give sizes of its free axes")
    return usable


def widest(feed: Feed) -> Feed:
    """The same inputs with floats in float64."""
    return {name: value.astype(np.float64) if value.dtype.kind == "f" else value for name, value in feed.items()}


def outputs_of(runner: Runner, feeds: Sequence[Feed]) -> list[list[Array]]:
    """All outputs of all runs."""
    return [flat(runner.run(None, feed)) for feed in feeds]


def differences(outputs: Sequence[Sequence[Array]], runner: Runner, feeds: Sequence[Feed]) -> tuple[Difference, bool]:
    """The worst difference of a model from given outputs over all runs, and whether no output ever changes.

    Raises:
        CannotRun: nothing runs the model in float64.
        ExportError: the model stops, or gives other shapes or types.
    """
    worst = Difference()
    for expected, feed in zip(outputs, feeds, strict=True):
        try:
            got = flat(runner.run(None, feed))
        except CannotRun:
            raise
        except Exception as error:  # onnxruntime's errors share no base class
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
            raise ExportError(f"verification failed: it stops on inputs {shapes} ({first_line(error)})") from error
        worst = worst.worse(difference(expected, got))
    first = [output.ravel()[:1] for output in outputs[0]]
    constant = all(
        bool((out == one).all()) for outs in outputs for out, one in zip(outs, first, strict=True) if one.size
    )
    return worst, constant


def difference(expected: Sequence[Array], got: Sequence[Array]) -> Difference:
    """How far two lists of outputs are apart.

    Raises:
        ExportError: another number of outputs, or other shapes or types.
    """
    if len(expected) != len(got):
        raise ExportError(f"verification failed: {len(got)} outputs instead of {len(expected)}")
    worst = Difference()
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ExportError(f"verification failed: output {i} is {b.dtype} {b.shape} instead of {a.dtype} {a.shape}")
        worst = worst.worse(_apart(a, b))
    return worst


def _apart(a: Array, b: Array) -> Difference:
    if a.dtype.kind != "f":
        return Difference(unequal=int(np.count_nonzero(a != b)))
    finite = np.isfinite(a)
    if not np.array_equal(np.where(finite, 0, a), np.where(np.isfinite(b) | finite, 0, b), equal_nan=True):
        return Difference(np.inf, np.inf)
    if not np.isfinite(b[finite]).all():
        return Difference(np.inf, np.inf)
    apart = float(np.abs(a[finite].astype(np.float64) - b[finite].astype(np.float64)).max(initial=0.0))
    scale = float(np.abs(a[finite]).max(initial=0.0))
    return Difference(apart, apart / scale if scale else (np.inf if apart > 0 else 0.0))


def blind(outputs: Sequence[Sequence[Array]]) -> tuple[int, ...]:
    """The outputs, by their places, that hold entries but no finite number in any run.

    Raises:
        ExportError: no output holds one, so that nothing can be compared.
    """
    shown, found = set(), set()
    for run in outputs:
        for i, array in enumerate(run):
            if array.dtype.kind != "f" or np.isfinite(array).any():
                shown.add(i)
            elif array.size:
                found.add(i)
    if found and not shown:
        raise ExportError(
            "the outputs hold no finite number on random inputs, so equality cannot be shown: mend the model, or leave "
            "verification out"
        )
    return tuple(sorted(found - shown))


def relative_to(exact: Sequence[Array], own: Sequence[Array]) -> float:
    """How far outputs are from those of the float64 copy, over the largest value of each."""
    pairs = [(a, b.astype(a.dtype)) for a, b in zip(exact, own, strict=True) if a.dtype.kind == b.dtype.kind == "f"]
    return max((_apart(a, b).relative for a, b in pairs if a.shape == b.shape), default=0.0)


def check_tolerance(tolerance: float | None) -> None:
    """Raise ConfigError where it is no relative difference."""
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ConfigError(f"`tolerance` (={tolerance}) must be a number of 0 or more, as in 1e-4")


def allowed_for(own: float | None, tolerance: float | None) -> float:
    """The relative difference that is allowed in a model's own precision.

    Args:
        own: its own rounding error against float64; None where that is not known.
        tolerance: what the user allows.
    """
    if tolerance is not None:
        return tolerance
    return _DERIVED if own is None else min(max(10 * own, _LEAST), 1e-2)


def check_equal(single: Difference, allowed: float, exact: Difference | None) -> None:
    """Raise ExportError where the differences are larger than allowed.

    Whole numbers may differ only where the float64 copies agree: there they are near ties.
    """
    if exact is not None and (exact.unequal or not exact.relative <= EXACT):
        raise ExportError(
            f"verification failed: the float64 copies differ by {exact.absolute:.3g}, {exact.relative:.3g} of the "
            f"output's largest value, in {exact.unequal} whole numbers; allowed is {EXACT:g}"
        )
    if not single.relative <= allowed:
        raise ExportError(
            f"verification failed: outputs differ by {single.absolute:.3g}, {single.relative:.3g} of their largest "
            f"value; allowed is {allowed:.3g}"
        )
    if single.unequal and exact is None:
        raise ExportError(f"verification failed: {single.unequal} whole numbers of the outputs differ")


def _runs(session: Any, feed: Feed) -> bool:
    try:
        session.run(None, feed)
    except Exception:  # onnxruntime's errors share no base class
        return False
    return True
