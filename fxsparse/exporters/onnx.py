"""A trained sparse model -> one verified ONNX file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fxsparse.errors import ConfigError, FxSparseError
from fxsparse.exporters import placement
from fxsparse.exporters.attempts import Exported, Search
from fxsparse.exporters.files import replacing
from fxsparse.exporters.inputs import Inputs, first_line
from fxsparse.exporters.latency import Latency, measure
from fxsparse.exporters.metadata import describe, digest_of, layers_of
from fxsparse.exporters.prepare import Subject, prepare
from fxsparse.exporters.program import check_opset
from fxsparse.exporters.reasons import why_not_faster
from fxsparse.exporters.reference import Verification, size_of
from fxsparse.exporters.report import ExportReport, Target
from fxsparse.exporters.runtime import open_session
from fxsparse.exporters.verify import feed_of
from fxsparse.graph import count, preserved_rng
from fxsparse.nn import MaskedWeight

_LARGE = 10**8  # MACs of one sample from which on every run counts
_FASTER = 1.05  # speedups below this are noise


_Macs = tuple[int | None, int | None, tuple[str, ...]]


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    target: Target = Target.STOCK,
    verify: bool | Verification = True,
    opset: int | None = None,
    latency: bool = True,
    lineage: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Export a model with its masks folded, check it in onnxruntime, and only then put it at `path`.

    The model is exported as it is in eval mode on the CPU; it stays as it was, and so does all global state. The batch
    (axis 0 of every input of the example's batch size) is dynamic where torch can export it so. Dead weights are zeros
    in the file, and its `metadata_props` hold densities, mask digest and provenance (`read_metadata`).

    Args:
        model: any module, with masks or without.
        path: the file to write; a file that is there is replaced, at the end and at once.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``.
        target: the runtime that the file is made for.
        verify: True to compare onnxruntime with PyTorch in float64 on random inputs, fewer for a model of more than a
            hundred million MACs; a `Verification` to say on which.
        opset: ONNX operator set, 18 or newer; None for torch's default.
        latency: whether to time the file against its dense twin, for about half a second.
        lineage: where the model comes from, as plain JSON values, for the metadata; a ticket's id and lineage, say.

    Returns:
        What was written and measured; print it.

    Raises:
        ExportError: anything that keeps a verified file from being written: torch or onnxruntime refuses, `opset` is
            too old, an output is no tensor, values differ, a resurrection phase is open, weights are not finite, the
            place cannot be written. Nothing is left behind, and what was at `path` stays.
        ConfigError: arguments of the wrong form.
    """
    path = Path(path)
    _check_options(target, verify)
    plain = _plain(lineage)
    check_opset(opset)
    with replacing(path) as temporary, preserved_rng():
        subject = prepare(model, example_inputs)
        counted = _count(subject)
        options = _options(verify, counted[0])
        annotate = partial(_annotate, subject, plain)
        exported = Search(subject, temporary, opset, options, annotate).run()
        return _report(path, temporary, subject, exported, counted, target, latency)


def _check_options(target: Target, verify: bool | Verification) -> None:
    if not isinstance(target, Target):
        raise ConfigError(f"`target` (={target!r}) must be one of {', '.join(map(str, Target))}")
    if not isinstance(verify, bool | Verification):
        raise ConfigError(f"`verify` (={verify!r}) must be True, False or a Verification")


def _options(verify: bool | Verification, macs: int | None) -> Verification | None:
    if verify is True:
        return Verification(batch_sizes=(1, 3), draws=3) if macs is not None and macs > _LARGE else Verification()
    return verify or None


def _plain(lineage: Mapping[str, Any] | None) -> Mapping[str, Any]:
    try:
        json.dumps(lineage, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`lineage` (={lineage!r}) must be plain JSON values: {error}") from error
    return {} if lineage is None else lineage


def _annotate(
    subject: Subject, lineage: Mapping[str, Any], proto: Any, places: list[placement.Placement], inputs: Inputs
) -> None:
    weights = subject.weights
    described = describe(subject.masked, layers_of(weights, places), digest_of(weights), _batch(inputs), lineage)
    for key, value in described.items():
        proto.metadata_props.add(key=key, value=value)


def _batch(inputs: Inputs) -> str:
    return "dynamic" if inputs.batched else str(size_of(inputs, inputs.tensors))


def _report(
    path: Path,
    temporary: Path,
    subject: Subject,
    exported: Exported,
    counted: _Macs,
    target: Target,
    latency: bool,
) -> ExportReport:
    inputs, weights = exported.inputs, subject.weights
    layers = layers_of(weights, exported.places)
    measured = _measure(temporary, exported, weights) if latency else None
    macs_dense, macs_effective, uncounted = counted
    parameters = sum(parameter.numel() for parameter in subject.masked.parameters())
    slow = measured is not None and measured.speedup < _FASTER
    return ExportReport(
        path=path,
        target=target,
        opset=exported.opset,
        batch=_batch(inputs),
        exporter=exported.exporter,
        switches=exported.switches,
        bytes=temporary.stat().st_size,
        dense_bytes=exported.dense_bytes,
        parameters=parameters,
        alive=parameters - sum(layer.numel - layer.alive for layer in layers),
        macs_dense=macs_dense,
        macs_effective=macs_effective,
        layers=layers,
        verification=exported.parity,
        latency=measured,
        reasons=why_not_faster([w.spec.pattern for w in weights.values()], target) if slow else (),
        notes=(*_input_notes(inputs), *subject.notes, *exported.notes, *uncounted),
    )


def _measure(file: Path, exported: Exported, weights: Mapping[str, MaskedWeight]) -> Latency:
    inputs = exported.inputs
    sessions = {"dense": open_session(_dense_twin(file, exported, weights)), "ticket": open_session(file)}
    medians, runs = measure(sessions, feed_of(sessions["ticket"], inputs, inputs.tensors))
    return Latency(medians["dense"], medians["ticket"], size_of(inputs, inputs.tensors), threads=1, runs=runs)


def _dense_twin(file: Path, exported: Exported, weights: Mapping[str, MaskedWeight]) -> bytes:
    import onnx

    return placement.dense_twin(onnx.load(file, format="protobuf"), exported.places, weights)


def _count(subject: Subject) -> _Macs:
    """MACs of one sample, dense and effective, and what could not be counted."""
    inputs = subject.inputs
    for size in dict.fromkeys((1, inputs.batch)):
        tensors = inputs.resized(size)
        try:
            counted = count(subject.masked, inputs.build(tensors), samples=size_of(inputs, tensors))
        except FxSparseError as error:
            reason = first_line(error)
            continue
        uncounted = tuple(f"not counted in MACs: {item}" for item in counted.uncounted)
        return counted.macs_dense, counted.macs_effective, uncounted
    return None, None, (f"MACs were not counted: {reason}",)


def _input_notes(inputs: Inputs) -> list[str]:
    notes = [f"the batch size is fixed: {inputs.reason}"] if inputs.reason else []
    notes += [f"input {constant} is no tensor: the graph holds this value" for constant in inputs.constants]
    pairs = [inputs.names[i] for i in sorted(inputs.complexes)]
    notes += [f"input `{name}` is complex: the file takes pairs (real, imaginary) on a last axis" for name in pairs]
    whole = [n for n, t in zip(inputs.names, inputs.tensors, strict=True) if not t.is_floating_point()]
    return notes + [f"input `{name}` was verified on values of the example only" for name in whole]
