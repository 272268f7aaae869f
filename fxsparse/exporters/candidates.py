"""The files that an export may keep: as they are, compacted, lowered, 8-bit; the first that holds, or the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxsparse.errors import ExportError
from fxsparse.exporters import agreement, shrink
from fxsparse.exporters.attempts import Exported, Free, Search, Settings
from fxsparse.exporters.autotune import Choice, Tuner
from fxsparse.exporters.inputs import Inputs
from fxsparse.exporters.latency import measure
from fxsparse.exporters.prepare import Subject
from fxsparse.exporters.quantize import Quantized, quantize
from fxsparse.exporters.reference import Reference
from fxsparse.exporters.runtime import open_session
from fxsparse.exporters.shrink import Variant
from fxsparse.exporters.targets import Int8, Optimize, Target
from fxsparse.exporters.verify import feed_of
from fxsparse.passes.lower_shared_support import Form


@dataclass(frozen=True, eq=False)
class Candidate:
    """A verified file.

    Attributes:
        variant: the form of the model in it.
        exported: the float file.
        file: the file itself; the float one, or its 8-bit twin.
        quantized: what is 8-bit in `file`; None where it is the float one.
        agreement: how close it is to the model then; None where that was not wanted.
        choices: what the autotuner found for its layers.
        notes: what was decided.
    """

    variant: Variant
    exported: Exported
    file: Path
    quantized: Quantized | None = None
    agreement: agreement.Agreement | None = None
    choices: Mapping[str, Choice] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of the file and of its weights."""
        outside = self.exported.data.stat().st_size if self.quantized is None and self.exported.data else 0
        return self.file.stat().st_size + outside


@dataclass(frozen=True, eq=False)
class Plan:
    """What is asked for.

    Attributes:
        target: the runtime.
        settings: of every search.
        compact: whether dead channels go; None where that removes something.
        lower: whether shared supports are lowered; None where there are some.
        int8: options of an 8-bit target.
        batches: the user's calibration data; None where there is none.
        tuner: chooses the forms of the layers; None for the rule.
    """

    target: Target
    settings: Settings
    compact: bool | None
    lower: bool | None
    int8: Int8
    batches: Sequence[list[Tensor]] | None
    tuner: Tuner | None


class Kitchen:
    """Makes the candidates of one model.

    Args:
        subject: the model.
        plan: what is asked for.
        folder: where files may be written.
        name: name of the file at its place.
    """

    def __init__(self, subject: Subject, plan: Plan, folder: Path, name: str) -> None:
        self.subject = subject
        self.plan = plan
        self.folder = folder
        self.name = name
        self._references: dict[Any, Reference] = {}
        self._made = 0

    @property
    def _float(self) -> bool:
        return not self.plan.target.is_int8

    def best(self) -> Candidate:
        """The candidate to keep.

        Raises:
            ExportError: no file computes what the model computes.
        """
        base = shrink.plain(self.subject)
        small = shrink.compacted(base, self.plan.compact)
        if self.plan.tuner is not None:
            return self._tuned(base, small, self.plan.tuner)
        lowered = shrink.lowered(small, self.plan.lower, bias_inside=self._float)
        return self._first([lowered, small, base])

    def _first(self, variants: Sequence[Variant]) -> Candidate:
        """The first that can be exported; one that was changed has to keep all free axes."""
        notes: tuple[str, ...] = ()
        distinct = [v for i, v in enumerate(variants) if all(v.subject is not w.subject for w in variants[:i])]
        for variant in distinct[:-1]:
            try:
                return self._candidate(replace(variant, notes=notes + variant.notes))
            except ExportError as error:
                notes += (f"not {variant.label}: {error}",)
        last = distinct[-1]
        return self._candidate(replace(last, notes=notes + last.notes))

    def _tuned(self, base: Variant, small: Variant, tuner: Tuner) -> Candidate:
        """The fastest (smallest) of: as it is, compacted, lowered by the rule, lowered as measured layer by layer."""
        by_rule = shrink.lowered(small, self.plan.lower, look=True, bias_inside=self._float)
        records = list(by_rule.records.values())
        choices = tuner.choose(small.subject.folded, self._run, records) if records else {}
        forms = {
            name: choice.form for name, choice in choices.items() if choice.form in by_rule.records[name].layer.forms
        }
        variants: list[tuple[Variant, Mapping[str, Choice]]] = [(base, {}), (small, {}), (by_rule, {})]
        if any(form is not by_rule.records[name].form for name, form in forms.items()):
            variants.insert(
                0, (shrink.lowered(small, self.plan.lower, forms, look=True, bias_inside=self._float), choices)
            )
        else:
            variants[2] = (by_rule, choices)
        found: list[Candidate] = []
        notes: list[str] = []
        done: list[Subject] = []
        for variant, chosen in variants:
            if any(variant.subject is subject for subject in done):
                continue
            done.append(variant.subject)
            try:
                found.append(self._candidate(variant, chosen, last=variant is base))
            except ExportError as error:
                if variant is base and not found:
                    raise
                notes.append(f"not {variant.label}: {error}")
        return self._pick(found, choices, tuner.optimize, tuple(notes))

    def _pick(
        self, found: Sequence[Candidate], choices: Mapping[str, Choice], optimize: Optimize, notes: tuple[str, ...]
    ) -> Candidate:
        if optimize is Optimize.SIZE:
            numbers = {i: float(each.bytes) for i, each in enumerate(found)}
            said = [f"{each.variant.label} {each.bytes:,} bytes" for each in found]
        else:
            sessions = {str(i): open_session(each.file) for i, each in enumerate(found)}
            inputs = found[0].exported.inputs
            medians, _ = measure(sessions, feed_of(sessions["0"], inputs, inputs.tensors), 0.3 * len(found))
            numbers = {int(i): ms for i, ms in medians.items()}
            said = [f"{each.variant.label} {numbers[i]:.3f} ms" for i, each in enumerate(found)]
        best = min(numbers, key=lambda i: numbers[i])
        note = f"tuned for {optimize.value}, whole files: {', '.join(said)}"
        kept = found[best]
        return replace(kept, choices=kept.choices or choices, notes=(*kept.notes, *notes, note))

    def dense(self) -> Exported:
        """The float file of the model as it was given, not verified: what its dense twin is made of.

        Raises:
            ExportError: torch cannot export it.
        """
        settings = replace(self.plan.settings, options=None, external=False, least=Free.NONE)
        return Search(self.subject, self._place(), settings).run()

    def quantized_twin(self, model: bytes, kept: Candidate) -> Path:
        """The 8-bit file of a float model, by the options and the data of a candidate.

        Raises:
            ExportError: onnxruntime cannot make it.
        """
        source, file = self._place(), self._place()
        source.write_bytes(model)
        session, inputs = open_session(source), kept.exported.inputs
        batches = self.plan.batches if self.plan.batches is not None else agreement.example_batches(inputs)
        feeds = [feed_of(session, inputs, tensors) for tensors in batches]
        plain = replace(self.plan.int8, exclude=())
        quantize(source, file, self.plan.target, feeds, plain)
        return file

    def _run(self, model: nn.Module) -> object:
        inputs = self.subject.inputs
        args, kwargs = inputs.build([tensor.clone() for tensor in inputs.tensors])
        return model(*args, **kwargs)

    def _candidate(self, variant: Variant, choices: Mapping[str, Choice] | None = None, last: bool = True) -> Candidate:
        changed = variant.subject is not self.subject
        settings = replace(self.plan.settings, least=Free.ALL) if changed or not last else self.plan.settings
        exported = Search(variant.subject, self._place(), settings, self._references).run()
        chosen = dict(choices or {})
        if not self.plan.target.is_int8:
            return Candidate(variant, exported, exported.file, choices=chosen, notes=variant.notes)
        return self._quantized(variant, exported, chosen)

    def _place(self) -> Path:
        """A file in a folder of its own: the files of weights that belong to candidates do not meet."""
        folder = self.folder / str(self._made)
        self._made += 1
        folder.mkdir()
        return folder / self.name

    def _quantized(self, variant: Variant, exported: Exported, choices: Mapping[str, Choice]) -> Candidate:
        inputs, options = exported.inputs, self.plan.int8
        given = self.plan.batches
        batches = self._checked(given, inputs) if given is not None else agreement.example_batches(inputs)
        source = "calibration data" if given is not None else "example and inputs close to it"
        session = open_session(exported.file)
        feeds = [feed_of(session, inputs, tensors) for tensors in batches]
        keep = {
            initializer: "float was measured to be faster"
            for name in choices
            if choices[name].int8 is False
            for initializer in weights_in(variant, exported, name)
        }
        file = self._place()
        quantized = quantize(exported.file, file, self.plan.target, feeds, options, keep)
        found = None
        if self.plan.settings.options is not None:
            found = agreement.compare(open_session(file), self.subject.masked, inputs, batches, source)
            agreement.check(found, options)
        return Candidate(variant, exported, file, quantized, found, choices, variant.notes)

    def _checked(self, batches: Sequence[list[Tensor]], inputs: Inputs) -> Sequence[list[Tensor]]:
        """The calibration data, where the file takes it: its free axes may be fewer than the model's."""
        shapes = [tuple(t.shape) for t in inputs.tensors]
        free = inputs.axes()
        for i, tensors in enumerate(batches):
            for at, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
                if any(
                    a != b and axis not in free.get(at, {})
                    for axis, (a, b) in enumerate(zip(tensor.shape, shape, strict=True))
                ):
                    raise ExportError(
                        f"item {i} of `calibration` has shape {tuple(tensor.shape)} for input `{inputs.names[at]}`, "
                        f"and the file takes {shape} only ({inputs.reason}): give items of that shape"
                    )
        return batches


def weights_in(variant: Variant, exported: Exported, name: str) -> tuple[str, ...]:
    """Initializers of a float file that hold a weight, in whatever form."""
    whole = tuple(place.initializer for place in exported.places if place.weight == name)
    record = variant.records.get(name)
    if record is None or record.form is Form.DENSE:
        return whole
    return (*whole, *record.tensors)
