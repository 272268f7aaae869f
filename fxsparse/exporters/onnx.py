"""A trained sparse model -> one verified ONNX file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError, ExportError, FxSparseError
from fxsparse.exporters import placement
from fxsparse.exporters.files import replacing
from fxsparse.exporters.inputs import Inputs, first_line, read_inputs
from fxsparse.exporters.latency import Latency, measure
from fxsparse.exporters.metadata import describe, digest_of, layers_of
from fxsparse.exporters.program import Program, export_program, output_names, quiet, tidy
from fxsparse.exporters.reasons import why_not_faster
from fxsparse.exporters.report import ExportReport, Target
from fxsparse.exporters.runtime import open_session
from fxsparse.exporters.verify import Parity, Verification, feed_of, size_of
from fxsparse.exporters.verify import verify as verify_session
from fxsparse.graph import count, isolated_clone, preserved_rng
from fxsparse.nn import MaskedWeight, MaskOwner, masked_weights
from fxsparse.planning import finalize

_LARGEST = 2**31 - 1  # bytes that one protobuf message can hold
_FASTER = 1.05  # speedups below this are noise


@dataclass(frozen=True, eq=False)
class _Ticket:
    """The model on its way: with masks, and folded."""

    masked: nn.Module
    folded: nn.Module
    weights: Mapping[str, MaskedWeight]
    inputs: Inputs
    lineage: Mapping[str, Any]


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
        verify: True to compare onnxruntime with PyTorch in float64 on random inputs; a `Verification` to say on which.
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
    options = _options(target, verify)
    with replacing(path) as temporary, preserved_rng():
        ticket = _prepare(model, example_inputs, _plain(lineage))
        taken = [*ticket.inputs.names, *ticket.folded.state_dict(keep_vars=True)]
        program = export_program(ticket.folded, ticket.inputs, output_names(_outputs(ticket), taken), opset)
        return _write(path, temporary, ticket, program, target, options, latency)


def _options(target: Target, verify: bool | Verification) -> Verification | None:
    if not isinstance(target, Target):
        raise ConfigError(f"`target` (={target!r}) must be one of {', '.join(map(str, Target))}")
    if not isinstance(verify, bool | Verification):
        raise ConfigError(f"`verify` (={verify!r}) must be True, False or a Verification")
    return Verification() if verify is True else verify or None


def _plain(lineage: Mapping[str, Any] | None) -> Mapping[str, Any]:
    try:
        json.dumps(lineage, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`lineage` (={lineage!r}) must be plain JSON values: {error}") from error
    return {} if lineage is None else lineage


def _prepare(model: nn.Module, example_inputs: Any, lineage: Mapping[str, Any]) -> _Ticket:
    _check_exportable(model)
    names = [name for name, _ in model.named_parameters()]
    masked = isolated_clone(model, copied=names).cpu().eval()
    inputs = read_inputs(masked, example_inputs)
    for tensor in (*masked.parameters(), *inputs.tensors):
        if tensor.dtype is torch.bfloat16:
            raise ExportError("the model or its inputs are bfloat16, which onnxruntime lacks: cast both to float32")
    weights = masked_weights(masked)
    try:
        folded = finalize(masked) if weights else isolated_clone(masked, copied=names)
    except FxSparseError as error:
        raise ExportError(f"the masks cannot be folded: {error}") from error
    return _Ticket(masked, folded.eval(), weights, inputs, lineage)


def _check_exportable(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
    for path, module in model.named_modules():
        if isinstance(module, MaskOwner):
            try:
                module.check_mask_edit()
            except ConfigError as error:
                raise ExportError(f"`{path or 'the model'}` cannot be exported: {error}") from error
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            raise ExportError(f"parameter `{name}` holds NaN or infinity: export an earlier state of the training")
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size > _LARGEST:
        raise ExportError(f"the model holds {size:,} bytes, one ONNX file at most {_LARGEST:,}: export its parts alone")


def _outputs(ticket: _Ticket) -> Any:
    args, kwargs = ticket.inputs.build([tensor.clone() for tensor in ticket.inputs.tensors])
    with torch.no_grad():
        return ticket.masked(*args, **kwargs)


def _write(
    path: Path,
    temporary: Path,
    ticket: _Ticket,
    program: Program,
    target: Target,
    options: Verification | None,
    latency: bool,
) -> ExportReport:
    unused = _check_entered(program, ticket)
    proto, places = _optimised(program, ticket)
    inputs, weights = program.inputs, ticket.weights
    layers = layers_of(weights, places)
    dense_bytes = proto.ByteSize()
    batch = "dynamic" if inputs.batched else str(size_of(inputs, inputs.tensors))
    for key, value in describe(ticket.masked, layers, digest_of(weights), batch, ticket.lineage).items():
        proto.metadata_props.add(key=key, value=value)
    temporary.write_bytes(proto.SerializeToString(deterministic=True))
    session = open_session(temporary)
    parity = None if options is None else _verify(session, ticket, inputs, options)
    measured = _measure(session, placement.dense_twin(proto, places, weights), inputs) if latency else None
    macs_dense, macs_effective, uncounted = _count(ticket)
    parameters = sum(parameter.numel() for parameter in ticket.masked.parameters())
    slow = measured is not None and measured.speedup < _FASTER
    return ExportReport(
        path=path,
        target=target,
        opset=next(entry.version for entry in proto.opset_import if entry.domain == ""),
        batch=batch,
        bytes=temporary.stat().st_size,
        dense_bytes=dense_bytes,
        parameters=parameters,
        alive=parameters - sum(layer.numel - layer.alive for layer in layers),
        macs_dense=macs_dense,
        macs_effective=macs_effective,
        layers=layers,
        verification=parity,
        latency=measured,
        reasons=why_not_faster([w.spec.pattern for w in weights.values()], target) if slow else (),
        notes=(*_input_notes(inputs), *_unlocated(ticket, places, unused), *uncounted),
    )


def _optimised(program: Program, ticket: _Ticket) -> tuple[Any, list[placement.Placement]]:
    """The message after the exporter's own optimisation, and where the masked weights lie in it."""
    from onnx import numpy_helper

    with quiet():
        program.onnx.optimize()
        proto = program.onnx.model_proto
    tidy(proto, program.inputs)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    return proto, placement.locate(ticket.weights, {n: _folded(ticket, n) for n in ticket.weights}, arrays)


def _check_entered(program: Program, ticket: _Ticket) -> set[str]:
    """The weights that the graph does not use; all others must have entered it bit for bit."""
    initializers = program.onnx.model.graph.initializers
    unused = set()
    for name, weight in ticket.weights.items():
        stored = next((initializers[alias] for alias in weight.names if alias in initializers), None)
        if stored is None or not stored.uses():
            unused.add(name)
        elif not torch.equal(torch.from_numpy(stored.const_value.numpy().copy()), _folded(ticket, name)):
            raise ExportError(f"`{name}`: torch's exporter changed the values of this weight; report it with the model")
    return unused


def _folded(ticket: _Ticket, name: str) -> Tensor:
    return ticket.folded.get_parameter(name).detach()


def _verify(session: Any, ticket: _Ticket, inputs: Inputs, options: Verification) -> Parity:
    names = [name for name, _ in ticket.masked.named_parameters()]
    return verify_session(session, isolated_clone(ticket.masked, copied=names), inputs, options)


def _measure(session: Any, dense: bytes, inputs: Inputs) -> Latency:
    sessions = {"dense": open_session(dense), "ticket": session}
    medians, runs = measure(sessions, feed_of(session, inputs, inputs.tensors))
    return Latency(medians["dense"], medians["ticket"], size_of(inputs, inputs.tensors), threads=1, runs=runs)


def _count(ticket: _Ticket) -> tuple[int | None, int | None, tuple[str, ...]]:
    """MACs of one sample, dense and effective, and what could not be counted."""
    tensors = ticket.inputs.resized(1)
    try:
        counted = count(ticket.masked, ticket.inputs.build(tensors), samples=size_of(ticket.inputs, tensors))
    except FxSparseError as error:
        return None, None, (f"MACs were not counted: {first_line(error)}",)
    uncounted = tuple(f"not counted in MACs: {item}" for item in counted.uncounted)
    return counted.macs_dense, counted.macs_effective, uncounted


def _unlocated(ticket: _Ticket, places: list[placement.Placement], unused: set[str]) -> list[str]:
    found = {place.weight for place in places}
    return [
        f"`{name}` is not used for these inputs, so the file does not hold it"
        if name in unused
        else f"`{name}` was merged with other constants by the exporter's constant folding"
        for name in ticket.weights
        if name not in found
    ]


def _input_notes(inputs: Inputs) -> list[str]:
    notes = [f"the batch size is fixed: {inputs.reason}"] if inputs.reason else []
    notes += [f"input {constant} is no tensor: the graph holds this value" for constant in inputs.constants]
    whole = [n for n, t in zip(inputs.names, inputs.tensors, strict=True) if not t.is_floating_point()]
    return notes + [f"input `{name}` was verified on values of the example only" for name in whole]
