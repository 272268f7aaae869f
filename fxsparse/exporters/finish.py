"""The end of an export: metadata, sparse storage, latencies, the file at its place, the report."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxsparse.errors import ExportError, FxSparseError
from fxsparse.exporters import placement
from fxsparse.exporters.candidates import Candidate, Kitchen, weights_in
from fxsparse.exporters.encodings import is_two_four, store_sparse
from fxsparse.exporters.forms import LayerForm, forms_of
from fxsparse.exporters.inputs import Inputs, first_line
from fxsparse.exporters.latency import Latency, measure
from fxsparse.exporters.metadata import Layer, describe, digest_of, layers_of
from fxsparse.exporters.prepare import Subject
from fxsparse.exporters.quantize import quantize
from fxsparse.exporters.quantize_places import places_in_int8
from fxsparse.exporters.reasons import why_not_faster
from fxsparse.exporters.reference import size_of
from fxsparse.exporters.report import ExportReport
from fxsparse.exporters.runtime import open_session
from fxsparse.exporters.shrink import PLAIN
from fxsparse.exporters.targets import Int8, Target
from fxsparse.exporters.verify import feed_of
from fxsparse.graph import count
from fxsparse.nn import masked_weights

_FASTER = 1.05  # speedups below this are noise

Macs = tuple[int | None, int | None, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Job:
    """One call of `export_onnx`.

    Attributes:
        path: where the file goes.
        target: what it is made for.
        subject: the model.
        lineage: where it comes from.
        macs: multiply-accumulates of one sample, dense and effective, and what could not be counted.
        latency: whether to measure.
        sparse: whether to store zeros sparse.
    """

    path: Path
    target: Target
    subject: Subject
    lineage: Mapping[str, Any]
    macs: Macs
    latency: bool
    sparse: bool

    def annotate(self, proto: Any, places: list[placement.Placement], inputs: Inputs) -> None:
        """Write the metadata into a message."""
        self.write(proto, layers_of(masked_weights(self.subject.masked), places), inputs)

    def write(
        self,
        proto: Any,
        layers: tuple[Layer, ...],
        inputs: Inputs,
        forms: tuple[LayerForm, ...] = (),
        variant: str = "",
    ) -> None:
        """Write the metadata into a message, in place of what stands there."""
        weights = masked_weights(self.subject.masked)
        known = {form.name: form.form for form in forms}
        described = describe(
            self.subject.masked,
            layers,
            digest_of(weights),
            _batch(inputs),
            self.lineage,
            target=self.target.value,
            axes={inputs.names[i]: axes for i, axes in inputs.axes().items()},
            variant=variant,
            extra={n: {"form": known.get(n, "dense"), "two_four": is_two_four(w)} for n, w in weights.items()},
        )
        kept = [(entry.key, entry.value) for entry in proto.metadata_props if entry.key not in described]
        del proto.metadata_props[:]
        for key, value in [*kept, *described.items()]:
            proto.metadata_props.add(key=key, value=value)


def finish(job: Job, kitchen: Kitchen, kept: Candidate, temporary: Path, put: Callable[[Path], None]) -> ExportReport:
    """Complete the chosen file, move it to `temporary`, and report.

    Args:
        job: the call.
        kitchen: where the file was made.
        kept: the file.
        temporary: where it goes.
        put: moves a file of weights beside the place.

    Raises:
        ExportError: it cannot be written, or does not load in its last form.
    """
    weights = masked_weights(job.subject.masked)
    variant, exported = kept.variant, kept.exported
    held = {name: weights_in(variant, exported, name) for name in weights}
    forms = forms_of(weights, variant, job.target, kept.choices, kept.quantized, held)
    layers = layers_of(weights, exported.places, variant.subject.weights)
    dense_bytes = exported.dense_bytes
    twin = None
    notes: list[str] = []
    if job.latency:
        twin, dense_bytes = _dense(kitchen, job, kept, notes)
    elif variant.label != PLAIN:
        dense_bytes += _bytes(job.subject.folded) - _bytes(variant.subject.folded)
    layers, sparse = _complete(job, kept, layers, forms)
    if job.sparse and not sparse:
        notes.append("no initializer is stored sparse: none in the file is smaller that way")
    measured = _measure(job, kitchen, kept, twin, notes) if job.latency else None
    data = exported.data if kept.quantized is None else None
    size = kept.bytes
    os.replace(kept.file, temporary)
    if data is not None:
        put(data)
    return _report(job, kept, layers, forms, sparse, measured, dense_bytes, size, data, tuple(notes))


def _complete(
    job: Job, kept: Candidate, layers: tuple[Layer, ...], forms: tuple[LayerForm, ...]
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Write the last metadata and, where asked for, sparse initializers into the file."""
    import onnx

    variant, exported = kept.variant, kept.exported
    if kept.quantized is None and exported.data is None and not job.sparse:
        from fxsparse.exporters.file_io import read_file  # both stand on onnx
        from fxsparse.exporters.file_wire import hollow, write_model

        model = read_file(kept.file).model
        proto = hollow(model)
        job.write(proto, layers, exported.inputs, forms, variant.label)
        fresh = kept.file.with_suffix(".fresh")
        with fresh.open("wb") as file:
            write_model(model, proto, file)
        os.replace(fresh, kept.file)
        return layers, ()
    proto = onnx.load(kept.file, load_external_data=False)
    if kept.quantized is not None:
        places = places_in_int8(proto, exported.places, variant.subject.weights)
        layers = layers_of(masked_weights(job.subject.masked), places, variant.subject.weights)
    sparse = store_sparse(proto) if job.sparse else ()
    job.write(proto, layers, exported.inputs, forms, variant.label)
    kept.file.write_bytes(proto.SerializeToString(deterministic=True))
    if sparse:
        open_session(kept.file)
    return layers, sparse


def _dense(kitchen: Kitchen, job: Job, kept: Candidate, notes: list[str]) -> tuple[bytes | None, int]:
    """The same model with every weight alive, as it was before any rewrite; and its size without metadata."""
    import onnx

    exported, subject = kept.exported, kept.variant.subject
    if exported.data is not None:
        notes.append("latency was not measured: the weights lie in a file of their own")
        return None, exported.dense_bytes
    if kept.variant.label != PLAIN:
        subject = job.subject
        try:
            exported = kitchen.dense()
        except ExportError as error:
            notes.append(f"the dense model could not be exported: {first_line(error)}")
            return None, exported.dense_bytes
    proto = onnx.load(exported.file, format="protobuf")
    return placement.dense_twin(proto, exported.places, subject.weights), exported.dense_bytes


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _measure(job: Job, kitchen: Kitchen, kept: Candidate, twin: bytes | None, notes: list[str]) -> Latency | None:
    if twin is None:
        return None
    inputs = kept.exported.inputs
    models: dict[str, Path | bytes] = {"dense": twin, "ticket": kept.file}
    if kept.quantized is not None:
        models["ticket float"] = kept.exported.file
        try:
            models["dense int8"] = kitchen.quantized_twin(twin, kept)
        except FxSparseError as error:
            notes.append(f"the dense model was not measured in 8 bits: {first_line(error)}")
    sessions = {name: open_session(model) for name, model in models.items()}
    medians, runs = measure(sessions, feed_of(sessions["ticket"], inputs, inputs.tensors), 0.25 * len(sessions))
    size = size_of(inputs, inputs.tensors)
    return Latency(medians["dense"], medians["ticket"], size, threads=1, runs=runs, variants=medians)


def _report(
    job: Job,
    kept: Candidate,
    layers: tuple[Layer, ...],
    forms: tuple[LayerForm, ...],
    sparse: tuple[str, ...],
    measured: Latency | None,
    dense_bytes: int,
    size: int,
    data: Path | None,
    notes: tuple[str, ...],
) -> ExportReport:
    exported, variant = kept.exported, kept.variant
    macs_dense, macs_effective, uncounted = job.macs
    parameters = sum(parameter.numel() for parameter in job.subject.masked.parameters())
    slow = measured is not None and measured.speedup < _FASTER
    patterns = [weight.spec.pattern for weight in masked_weights(job.subject.masked).values()]
    reasons = why_not_faster(patterns, job.target, variant.lowered, variant.compaction is not None) if slow else ()
    return ExportReport(
        path=job.path,
        target=job.target,
        opset=exported.opset,
        batch=_batch(exported.inputs),
        exporter=exported.exporter,
        switches=exported.switches,
        bytes=size,
        dense_bytes=dense_bytes,
        parameters=parameters,
        alive=parameters - sum(layer.numel - layer.alive for layer in layers),
        macs_dense=macs_dense,
        macs_effective=macs_effective,
        layers=layers,
        verification=exported.parity,
        latency=measured,
        reasons=reasons,
        notes=(
            *_input_notes(exported.inputs),
            *job.subject.notes,
            *kept.notes,
            *exported.notes,
            *uncounted,
            *notes,
        ),
        variant=variant.label,
        data=job.path.with_name(data.name) if data is not None else None,
        forms=forms,
        quantized=kept.quantized,
        agreement=kept.agreement,
        sparse=sparse,
    )


def micro_quantizer(target: Target, options: Int8, folder: Path) -> Callable[[bytes, Mapping[str, Any]], bytes]:
    """A function that makes the 8-bit twin of one serialised layer; files go through `folder`."""
    plain = Int8(per_channel=options.per_channel, method=options.method, reduce_range=options.reduce_range)

    def twin(model: bytes, feed: Mapping[str, Any]) -> bytes:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            source, file = Path(place) / "float.onnx", Path(place) / "int8.onnx"
            source.write_bytes(model)
            quantize(source, file, target, [feed], plain)
            return file.read_bytes()

    return twin


def counted(subject: Subject) -> Macs:
    """MACs of one sample, dense and effective, and what could not be counted."""
    inputs = subject.inputs
    for size in dict.fromkeys((1, inputs.batch)):
        tensors = inputs.resized(size)
        try:
            found = count(subject.masked, inputs.build(tensors), samples=size_of(inputs, tensors))
        except FxSparseError as error:
            reason = first_line(error)
            continue
        uncounted = tuple(f"not counted in MACs: {item}" for item in found.uncounted)
        return found.macs_dense, found.macs_effective, uncounted
    return None, None, (f"MACs were not counted: {reason}",)


def _batch(inputs: Inputs) -> str:
    return "dynamic" if inputs.batched else str(size_of(inputs, inputs.tensors))


def _input_notes(inputs: Inputs) -> list[str]:
    notes = [f"the batch size is fixed: {inputs.reason}"] if inputs.reason else []
    notes += [f"axis `{name}` is free" for name in inputs.free]
    notes += [f"input {constant} is no tensor: the graph holds this value" for constant in inputs.constants]
    pairs = [inputs.names[i] for i in sorted(inputs.complexes)]
    notes += [f"input `{name}` is complex: the file takes pairs (real, imaginary) on a last axis" for name in pairs]
    whole = [n for n, t in zip(inputs.names, inputs.tensors, strict=True) if not t.is_floating_point()]
    return notes + [f"input `{name}` was verified on values of the example only" for name in whole]
