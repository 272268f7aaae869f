"""A plain model -> an ONNX program, by TorchScript tracing: what torch.export cannot take.

A trace holds the branches that the example took, so a traced file counts only after verification on many inputs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from fxsparse.errors import ExportError
from fxsparse.exporters.causes import reason_of
from fxsparse.exporters.inputs import Inputs
from fxsparse.exporters.program import Flat, example_of, quiet, strip_prefix
from fxsparse.graph import preserved_rng

NEWEST_OPSET = 20
"""The newest operator set that the legacy exporter writes."""

_DEFAULT_OPSET = 18


class TracedProgram:
    """A traced model with the interface of `torch.onnx.ONNXProgram` as far as the export uses it.

    Attributes:
        model: the `onnx_ir.Model`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def optimize(self) -> None:
        """Leave the graph as it is: onnxscript's optimiser, made for the other exporter, breaks some traced graphs."""

    @property
    def model_proto(self) -> Any:
        """The model as a protobuf message."""
        from onnx_ir import serde

        return serde.serialize_model(self.model)


def trace_program(
    model: nn.Module, inputs: Inputs, outputs: Mapping[str, int], opset: int | None, explicit: bool
) -> TracedProgram:
    """Export a plain model in eval mode on the CPU by torch's legacy exporter (``dynamo=False``).

    The arguments are those of `export_program`.

    Raises:
        ExportError: when torch cannot trace or translate the model, or `opset` is newer than `NEWEST_OPSET`.
    """
    if opset is not None and opset > NEWEST_OPSET:
        raise ExportError(f"`opset` (={opset}) is newer than {NEWEST_OPSET}, the newest of the legacy exporter")
    tensors, _ = example_of(inputs)
    buffer: Any = io.BytesIO()
    axes = {name: {axis: f"{name}_{axis}" for axis in range(rank)} for name, rank in outputs.items()}
    axes |= {inputs.names[i]: free for i, free in inputs.axes().items()}
    try:
        with _unlogged(), quiet(), preserved_rng(), torch.no_grad():
            torch.onnx.export(
                Flat(model, inputs, explicit).eval(),
                tuple(tensors),
                buffer,
                dynamo=False,
                verbose=False,
                input_names=list(inputs.names),
                output_names=list(outputs),
                dynamic_axes=axes,
                opset_version=opset or _DEFAULT_OPSET,
                do_constant_folding=False,
            )
        return _program(buffer)
    except Exception as error:  # torch raises whatever it meets
        raise ExportError(reason_of(error, model)) from error


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch's own log of the tracer off: torch turns it on for good, and it prints whole graphs to stdout."""
    switch, before = torch._C._jit_set_onnx_log_enabled, torch._C._jit_is_onnx_log_enabled()
    switch(False)  # an export by someone else may have turned it on
    try:
        with mock.patch.object(torch._C, "_jit_set_onnx_log_enabled", lambda _: None):
            yield
    finally:
        switch(before)


def _program(buffer: io.BytesIO) -> TracedProgram:
    import onnx
    from onnx_ir import serde

    model = serde.deserialize_model(onnx.load_model_from_string(buffer.getvalue()))
    strip_prefix(model)
    return TracedProgram(model)
