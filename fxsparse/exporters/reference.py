"""What PyTorch computes on many inputs, and how far its own rounding moves it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxsparse.errors import ConfigError, DataError, ExportError
from fxsparse.exporters.inputs import Inputs, first_line
from fxsparse.exporters.program import Flat
from fxsparse.graph import isolated_clone, preserved_rng
from fxsparse.passes.compact_verify import run_copy
from fxsparse.passes.compact_widen import widened, worth_streaming

_SPREADS = ((1.0, 0.0), (4.0, 0.0), (0.25, 0.0), (4.0, 2.0), (4.0, -2.0), (1.0, 3.0), (1.0, -3.0))  # width, shift


@dataclass(frozen=True)
class Verification:
    """What to verify on.

    Attributes:
        batch_sizes: batch sizes to run, each at least 1; a model of fixed batch runs at the example's. Sizes at which
            the model itself fails are left out; where only one is left, those around the example's are added.
        draws: inputs for each batch size: the example first, then random ones of one, four and a quarter times its
            deviation, from the fifth on also of another mean. Where the model refuses one, the example takes its place,
            with its rows in random order and its floats moved by 5 %.
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


@dataclass(frozen=True, eq=False)
class Case:
    """One run.

    Attributes:
        tensors: its inputs.
        size: its batch size.
        own: outputs of the model in its own precision.
        exact: outputs in float64; else in its own precision, inputs and parameters moved by a unit in the last place.
    """

    tensors: list[Tensor]
    size: int
    own: list[Any]
    exact: list[Any]


@dataclass(frozen=True, eq=False)
class Reference:
    """All runs.

    Attributes:
        inputs: the inputs that they were made for.
        cases: the runs.
        dtype: "float64", or "same-precision" where `Case.exact` is not.
        notes: batch sizes that were left out and inputs that had to stay close to the example, in words.
    """

    inputs: Inputs
    cases: tuple[Case, ...]
    dtype: str
    notes: tuple[str, ...]


def reference(model: nn.Module, inputs: Inputs, options: Verification) -> Reference:
    """Run `model` on the inputs of `options`.

    Args:
        model: the model in eval mode on the CPU; it stays as it is.
        inputs: the example, with the batch axis that the file is to have.
        options: what to run.

    Raises:
        ExportError: the model does not repeat itself.
    """
    with preserved_rng():
        private = isolated_clone(model)
        sizes, notes = _sizes(private, inputs, options)
        tensors, own, close = _draw(private, inputs, sizes, options)
        notes += _draw_lengths(private, inputs, sizes, options, tensors, own)
        _check_repeats(own[0], _run(private, inputs, tensors[0]))
        exact, dtype = _exact(private, inputs, tensors, options.seed)
    _check_finite(exact)
    if close:
        said = f"{close} of {len(own)} verified inputs stay close to the example"
        notes.append(f"{said}: the model fails on wider random ones")
    cases = [
        Case(each, size_of(inputs, each), mine, other) for each, mine, other in zip(tensors, own, exact, strict=True)
    ]
    return Reference(inputs, tuple(cases), dtype, tuple(notes))


def outputs_on(model: nn.Module, inputs: Inputs, batches: Sequence[list[Tensor]]) -> tuple[list[list[Any]], str]:
    """What `model` computes on given inputs: in float64, else in its own precision; and which of both.

    Raises:
        DataError: the model fails on an item.
    """
    with preserved_rng():
        try:
            return _doubled(model, inputs, batches), "float64"
        except Exception:  # a forward that names its dtype fails in another
            own = isolated_clone(model)
        found = []
        for i, tensors in enumerate(batches):
            try:
                found.append(_run(own, inputs, tensors))
            except Exception as error:  # whatever the user's forward raises is the reason
                said = f"the model fails on item {i} of the data ({first_line(error)}): give inputs that it takes"
                raise DataError(said) from error
        return found, "same-precision"


class _Decisions(TorchFunctionMode):
    """Collects the truth values that Python reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        result = func(*args, **(kwargs or {}))
        if func in (Tensor.__bool__, Tensor.item) and isinstance(result, bool):
            self.found.append(result)
        return result


def one_sided(model: nn.Module, runs: Reference) -> int:
    """How many of the decisions that Python takes on values came out the same in all runs."""
    taken = []
    private = isolated_clone(model)
    for case in runs.cases:
        with preserved_rng(), _Decisions() as decisions:
            _run(private, runs.inputs, case.tensors)
        taken.append(decisions.found)
    return sum(len(set(column)) == 1 for column in zip(*taken, strict=False))


def size_of(inputs: Inputs, tensors: Sequence[Tensor]) -> int:
    """The batch size of a case; of a fixed one the first axis of the first input that has one."""
    position = min(inputs.batched, default=next((i for i, t in enumerate(tensors) if t.ndim), None))
    return 1 if position is None else int(tensors[position].shape[0])


def _sizes(model: nn.Module, inputs: Inputs, options: Verification) -> tuple[list[int], list[str]]:
    """The batch sizes to run, and notes on those that the model does not take."""
    if not inputs.batched:
        return [inputs.batch] * len(options.batch_sizes), []
    failures = {size: _failure(model, inputs, size) for size in dict.fromkeys(options.batch_sizes)}
    sizes = [size for size in options.batch_sizes if not failures[size]]
    if any(failures.values()) and len(set(sizes)) < 2:
        near = (inputs.batch, inputs.batch + 1, 2 * inputs.batch)
        sizes += [size for size in near if size not in sizes and not _failure(model, inputs, size)]
    notes = [
        f"not verified at batch size {size}, where the model itself fails: {why}"
        for size, why in failures.items()
        if why
    ]
    return sizes, notes


def _failure(model: nn.Module, inputs: Inputs, size: int) -> str:
    try:
        _run(model, inputs, inputs.resized(size))
    except Exception as error:  # whatever the user's forward raises is the reason
        return first_line(error)
    return ""


def _draw(
    model: nn.Module, inputs: Inputs, sizes: Sequence[int], options: Verification
) -> tuple[list[list[Tensor]], list[list[Any]], int]:
    """Inputs, outputs of the model on them, and how many of the inputs had to stay close to the example."""
    generator = torch.Generator().manual_seed(options.seed)
    tensors, own, close = [], [], 0
    for size in sizes:
        tensors.append(inputs.resized(size))
        own.append(_run(model, inputs, tensors[-1]))
        known = _finite(own[-1])
        for i in range(options.draws - 1):
            wide = inputs.draw(size, generator, *_SPREADS[i % len(_SPREADS)])
            near = inputs.vary(size, generator)
            for given in (wide, near):
                found = _tried(model, inputs, given)
                if found is not None and (not known or _finite(found)):
                    tensors.append(given)
                    own.append(found)
                    close += given is near
                    break
    return tensors, own, close


def _draw_lengths(
    model: nn.Module,
    inputs: Inputs,
    sizes: Sequence[int],
    options: Verification,
    tensors: list[list[Tensor]],
    own: list[list[Any]],
) -> list[str]:
    """Add runs at other sizes of the free axes, one axis after the other; notes where the model fails there."""
    notes = []
    batches = list(dict.fromkeys(sizes))[:2]
    few = replace(options, draws=min(2, options.draws))
    for name, size in inputs.lengths().items():
        for other in dict.fromkeys(max(1, each) for each in (size + 1, size - 1, size // 2, 2 * size)):
            try:
                more, outputs, _ = _draw(model, inputs.at({name: other}), batches, few)
            except Exception as error:  # whatever the user's forward raises is the reason
                notes.append(f"not verified at {other} for axis `{name}`, where the model fails: {first_line(error)}")
                continue
            tensors += more
            own += outputs
    return notes


def _tried(model: nn.Module, inputs: Inputs, tensors: Sequence[Tensor]) -> list[Any] | None:
    """The outputs, None where the model fails, or reads beyond its tables: then it does not repeat itself."""
    try:
        found = _run(model, inputs, tensors)
        if all(tensor.is_floating_point() for tensor in tensors) or _equal(found, _run(model, inputs, tensors)):
            return found
    except Exception:  # a random input need not be one that forward takes
        return None
    return None


def _finite(outputs: Sequence[Any]) -> bool:
    """Whether every floating output has a finite entry."""
    floats = [y for y in outputs if np.issubdtype(y.dtype, np.floating) and y.size]
    return all(bool(np.isfinite(y).any()) for y in floats)


def _run(model: nn.Module, inputs: Inputs, tensors: Sequence[Tensor]) -> list[Any]:
    with torch.no_grad():
        return [t.clone().numpy() for t in Flat(model, inputs)(*(tensor.clone() for tensor in tensors))]


def _check_repeats(first: Sequence[Any], second: Sequence[Any]) -> None:
    if not _equal(first, second):
        raise ExportError(
            "verification failed: the PyTorch model's output differs between two equal calls; "
            "remove the randomness or state (dropout that is always on, a counter) from its eval mode"
        )


def _equal(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.floating)) for a, b in zip(first, second, strict=True)
    )


def _check_finite(runs: Sequence[Sequence[Any]]) -> None:
    for i, column in enumerate(zip(*runs, strict=False)):
        floats = [y for y in column if np.issubdtype(y.dtype, np.floating) and y.size]
        if floats and not any(np.isfinite(y).any() for y in floats):
            raise ExportError(f"verification failed: output {i} is never finite, so nothing is shown: look for NaN")


def _doubled(model: nn.Module, inputs: Inputs, cases: Sequence[list[Tensor]]) -> list[list[Any]]:
    """The outputs in float64; of a large model without a float64 copy of all its parameters, where that works."""
    wide = [[t.double() if t.is_floating_point() else t for t in case] for case in cases]
    if worth_streaming(model):
        with suppress(Exception):  # code that asks a parameter for its dtype sees another one than operators do
            copy = run_copy(model, torch.float64)
            with widened(copy, torch.float64):
                return [_run(copy, inputs, case) for case in wide]
    copy = isolated_clone(model).double()
    return [_run(copy, inputs, case) for case in wide]


def _exact(model: nn.Module, inputs: Inputs, cases: Sequence[list[Tensor]], seed: int) -> tuple[list[list[Any]], str]:
    """The outputs in float64; in the model's own precision, slightly moved, where it cannot run so."""
    try:
        return _doubled(model, inputs, cases), "float64"
    except Exception:  # a forward that names its dtype fails in another
        generator = torch.Generator().manual_seed(seed)
        moved = isolated_clone(model, copied=[name for name, _ in model.named_parameters()])
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.copy_(inputs.rounded([parameter], generator)[0])
        return [_run(moved, inputs, inputs.rounded(case, generator)) for case in cases], "same-precision"
