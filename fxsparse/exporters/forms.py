"""What became of each masked weight in a file, what that gains, and why: the table of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fxsparse.exporters.autotune import Choice
from fxsparse.exporters.encodings import is_two_four
from fxsparse.exporters.quantize import Quantized
from fxsparse.exporters.shrink import Variant
from fxsparse.exporters.targets import Target
from fxsparse.nn import MaskedWeight
from fxsparse.passes.lower_shared_support import Form
from fxsparse.sparsity import Channel, SharedSupport


@dataclass(frozen=True)
class LayerForm:
    """What was done with one masked weight.

    Attributes:
        name: name of the parameter.
        pattern: its pattern, as written in Python.
        density: alive fraction before anything was removed.
        form: what it is in the file, in words.
        gain: time of the dense float layer over that of this form; None where it is not known.
        measured: whether `gain` was measured here; else it is what the rule expects.
        reason: why; "no speed-up expected: ..." where that is the truth.
    """

    name: str
    pattern: str
    density: float
    form: str
    gain: float | None
    measured: bool
    reason: str

    def __str__(self) -> str:
        gain = "" if self.gain is None else f" {self.gain:.2f}x {'measured' if self.measured else 'expected'};"
        return f"{self.name}: density {self.density:.4f}, {self.pattern} -> {self.form};{gain} {self.reason}"


def forms_of(
    weights: Mapping[str, MaskedWeight],
    variant: Variant,
    target: Target,
    choices: Mapping[str, Choice],
    quantized: Quantized | None,
    initializers: Mapping[str, tuple[str, ...]],
) -> tuple[LayerForm, ...]:
    """One row for each masked weight, in the order of the model.

    Args:
        weights: the masked weights of the model as it was given.
        variant: the form in which it was exported.
        target: what the file is made for.
        choices: what the autotuner found, by the weight's name.
        quantized: what is 8-bit, for such a target.
        initializers: weight's name -> initializers of the float file that hold it.
    """
    return tuple(
        _form(name, weight, variant, target, choices.get(name), _is_int8(name, quantized, initializers))
        for name, weight in weights.items()
    )


def _form(
    name: str, weight: MaskedWeight, variant: Variant, target: Target, choice: Choice | None, int8: bool | None
) -> LayerForm:
    mask, pattern = weight.mask, weight.spec.pattern
    shape, record = variant.shape_of(name), variant.records.get(name)
    lowered = record is not None and record.form is not Form.DENSE
    steps = [f"compacted {_by(tuple(mask.shape))} to {_by(shape)}"] if shape is not None else []
    steps += [record.form.value] if record is not None and lowered else [] if steps else ["dense"]
    steps += ["int8"] if int8 else []
    form = record.form if record is not None else Form.DENSE
    gain = None if choice is None else choice.gain_of(form, bool(int8))
    measured = gain is not None
    if choice is not None and measured:
        reason = choice.reason
        if (choice.form, bool(choice.int8)) != (form, bool(int8)):
            reason += "; this form was kept because the whole file is better with it"
    elif record is not None:
        reason = choice.reason if choice is not None else record.reason
        gain = None if int8 else record.gain if lowered else 1.0  # the rule knows of float only
    else:
        reason = _reason(weight, target, shape is not None)
    density = float(mask.float().mean()) if mask.numel() else 1.0
    return LayerForm(name, str(pattern), density, ", ".join(steps), gain, measured, reason)


def _reason(weight: MaskedWeight, target: Target, shortened: bool) -> str:
    pattern = weight.spec.pattern
    if target is Target.TENSORRT:
        inputs = is_two_four(weight)
        said = "2:4 along the inputs: TensorRT can use sparse tensor cores"
        return said if inputs else "no speed-up expected: its zeros are not 2:4 along the inputs"
    if shortened:
        return "dead channels are gone, what is left is dense"
    if bool(weight.mask.all()):
        return "no speed-up expected: every weight is alive"
    if isinstance(pattern, SharedSupport):
        return "no speed-up expected: it is not read as a plain layer that can be lowered"
    if isinstance(pattern, Channel):
        return "no speed-up expected: its dead channels are coupled to channels that live"
    return f"no speed-up expected: dense kernels multiply the scattered zeros of {pattern} like any other number"


def _is_int8(name: str, quantized: Quantized | None, initializers: Mapping[str, tuple[str, ...]]) -> bool | None:
    if quantized is None:
        return None
    found = [quantized.weights[each] for each in (*initializers.get(name, ()), name) if each in quantized.weights]
    return any(found)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
