"""The autotuner: every layer in each form that it may take, alone in onnxruntime; the best form is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fxsparse.errors import ConfigError, FxSparseError
from fxsparse.exporters.autotune_micro import Micro, arrays_of, micro_of, seen_inputs
from fxsparse.exporters.inputs import first_line
from fxsparse.exporters.latency import measure
from fxsparse.exporters.runtime import open_session
from fxsparse.exporters.targets import Optimize
from fxsparse.passes.lower_shared_support import Form, Layer, LayerRecord, lower_shared_support

DEFAULT_BUDGET = 60.0
"""Seconds that a tuning takes at most, unless another budget is given."""

FASTER = 1.05
"""Speed-ups below this are noise."""

INT8 = "int8"


def words(form: Form, int8: bool) -> str:
    """The name of a form in the numbers of a `Choice`."""
    return f"{form.value}, {INT8}" if int8 else form.value


@dataclass(frozen=True)
class Choice:
    """What the tuner found for one weight.

    Attributes:
        form: the form to take.
        int8: whether its product is 8-bit; None where that was no question.
        gain: measured time of the dense float layer over that of the choice (bytes where size was the aim); None where
            nothing was measured.
        reason: why, with the numbers.
        numbers: what was measured for each form, by its words: milliseconds, or bytes.
    """

    form: Form
    int8: bool | None
    gain: float | None
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def gain_of(self, form: Form, int8: bool) -> float | None:
        """Measured number of the dense float layer over that of another form; None where that was not measured."""
        found = self.numbers.get(words(form, int8))
        return self.numbers[Form.DENSE.value] / found if found else None


@dataclass
class Tuner:
    """One tuning run; layers of equal shape and structure are measured once.

    Args:
        optimize: what to make small.
        budget: seconds that all measurements together may take.
        quantize: makes an 8-bit twin of a serialised float model, given a feed; None where the target is float.

    Raises:
        ConfigError: the budget is not a positive number.
    """

    optimize: Optimize
    budget: float = DEFAULT_BUDGET
    quantize: Callable[[bytes, Mapping[str, Any]], bytes] | None = None
    _known: dict[Any, tuple[dict[str, float], int]] = field(default_factory=dict)
    _spent: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | float) or not 0 < self.budget < 1e9:
            raise ConfigError(f"`budget` (={self.budget!r}) must be seconds of measuring, above 0")

    def choose(
        self, model: nn.Module, run: Callable[[nn.Module], object], records: Sequence[LayerRecord]
    ) -> dict[str, Choice]:
        """The best form of each layer.

        Args:
            model: the folded model.
            run: runs a model on the example.
            records: what lowering does by its own rule: the layers, and what to fall back to.
        """
        wanted = [record for record in records if len(record.layer.forms) > 1 or self.quantize is not None]
        seen = seen_inputs(model, run, [record.name for record in wanted])
        return {record.name: self._choice(model, record, seen.get(record.name)) for record in wanted}

    def _choice(self, model: nn.Module, record: LayerRecord, given: Tensor | None) -> Choice:
        micro = None if given is None else micro_of(model, record.name, given)
        if micro is None:
            return _unmeasured(record, "it cannot be taken out of the model alone")
        try:
            found = self._numbers(micro, record.layer)
        except FxSparseError as error:
            return _unmeasured(record, f"it does not run alone: {first_line(error)}")
        if found is None:
            return _unmeasured(record, f"the budget of {self.budget:g} s was spent")
        return _best(*found, unit=_UNITS[self.optimize], int8=self.quantize is not None)

    def _numbers(self, micro: Micro, layer: Layer) -> tuple[dict[str, float], int] | None:
        key = (*micro.key, layer.forms, layer.group, round(layer.k, 3), round(layer.density, 3))
        if key in self._known:
            return self._known[key]
        if self._spent >= self.budget:
            return None
        start = time.perf_counter()
        try:
            self._known[key] = self._measure(micro, layer)
        finally:
            self._spent += time.perf_counter() - start
        return self._known[key]

    def _measure(self, micro: Micro, layer: Layer) -> tuple[dict[str, float], int]:
        files: dict[str, bytes] = {}
        feed = arrays_of(micro.example)
        for form in layer.forms:
            module = micro.module
            if form is not Form.DENSE:
                single, inside = {"weight": form}, self.quantize is None
                module = lower_shared_support(module, (micro.example,), choose=single, bias_inside=inside).model
            files[form.value] = micro.export(module)
            if self.quantize is not None:
                small = _quantized(self.quantize, files[form.value], feed)
                files |= {words(form, True): small} if small is not None else {}
        if self.optimize is Optimize.SIZE:
            return {name: float(len(file)) for name, file in files.items()}, 1
        sessions = {name: open_session(file) for name, file in files.items()}
        left = max(0.05, min(0.3 * len(sessions), self.budget - self._spent))
        return measure(sessions, feed, left)


_UNITS = {Optimize.LATENCY: "ms", Optimize.SIZE: "bytes"}


def _quantized(quantize: Callable[[bytes, Mapping[str, Any]], bytes], file: bytes, feed: Any) -> bytes | None:
    try:
        return quantize(file, feed)
    except FxSparseError:  # onnxruntime has no 8-bit form of this layer
        return None


def _unmeasured(record: LayerRecord, why: str) -> Choice:
    return Choice(record.form, None, None, f"not measured, {why}; by rule: {record.reason}")


def _best(numbers: Mapping[str, float], runs: int, unit: str, int8: bool) -> Choice:
    """The smallest number; the dense float layer where nothing is clearly smaller."""
    dense = numbers[Form.DENSE.value]
    name = min(numbers, key=lambda each: numbers[each])
    said = ", ".join(f"{each} {_number(value, unit)}" for each, value in numbers.items())
    how = f"measured alone: {said}" + (f" (medians of {runs} interleaved runs)" if unit == "ms" else "")
    if dense / numbers[name] < FASTER:
        reason = f"no speed-up expected: {how}" if unit == "ms" else how
        return Choice(Form.DENSE, False if int8 else None, 1.0, reason, numbers)
    form, small = next((form, small) for form in Form for small in (False, True) if words(form, small) == name)
    return Choice(form, small if int8 else None, dense / numbers[name], how, numbers)


def _number(value: float, unit: str) -> str:
    return f"{value:.4f} ms" if unit == "ms" else f"{value:,.0f} bytes"
