"""A plain model -> an ONNX program, by torch's exporter, with flat inputs and outputs and the parameters' own names."""

from __future__ import annotations

import ast
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import ExportError
from fxsparse.exporters.causes import reason_of
from fxsparse.exporters.inputs import BATCH, Inputs
from fxsparse.exporters.outputs import flatten_outputs
from fxsparse.exporters.switches import ExplicitAttention
from fxsparse.graph import preserved_rng

OLDEST_OPSET = 18
"""The operator set in which torch's exporter is written; it only converts to older ones, and not always rightly."""

MODULE_KEY = "fxsparse.module"
"""Key of a node's metadata: the path of the module that it computes for."""

_PREFIX = "model."
_LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")


class Flat(nn.Module):
    """A model as a function from tensors to a tuple of tensors.

    Nested, keyword and non-tensor inputs are rebuilt inside, so that the exporter sees none of them: it would read a
    trailing dict as keywords, reorder keywords and refuse ``**kwargs`` of dynamic shape.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, explicit: bool = False) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.explicit = explicit

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model; the tensors among its outputs in their flattened order."""
        args, kwargs = self.inputs.build(tensors)
        with ExplicitAttention() if self.explicit else nullcontext():
            found = [*flatten_outputs(self.model(*args, **kwargs)).tensors.values()]
        seen = {id(tensor) for tensor in tensors}
        for i, tensor in enumerate(found):  # ONNX names values: an output that is another one too needs its own
            if id(tensor) in seen:
                found[i] = tensor.clone()
            seen.add(id(tensor))
        return tuple(found)


def export_program(
    model: nn.Module, inputs: Inputs, outputs: Mapping[str, int], opset: int | None, explicit: bool
) -> Any:
    """Export a plain model in eval mode on the CPU by torch.export.

    Args:
        model: the model.
        inputs: the example; its batch and its other free axes are dynamic in the file.
        outputs: names of the outputs, each with its number of axes.
        opset: operator set of the file, None for torch's default.
        explicit: whether scaled dot-product attention is written out.

    Returns:
        A `torch.onnx.ONNXProgram`, not yet optimised.

    Raises:
        ExportError: when torch cannot export the model, or not in this `opset`.
    """
    tensors, size = example_of(inputs)
    axes = inputs.axes()
    shapes = tuple(axes.get(i) for i in range(len(tensors)))
    options: dict[str, Any] = {} if opset is None else {"opset_version": opset}
    try:
        with quiet(), preserved_rng(), torch.no_grad():
            program: Any = torch.onnx.export(
                Flat(model, inputs, explicit).eval(),
                tuple(tensors),
                dynamo=True,
                optimize=False,
                verbose=False,
                external_data=False,
                input_names=list(inputs.names),
                output_names=list(outputs),
                dynamic_shapes=(shapes,) if axes else None,
                **options,
            )
    except Exception as error:  # torch and onnxscript raise whatever they meet
        raise ExportError(reason_of(error, model)) from error
    _check_dynamic(program, inputs, size)
    strip_prefix(program.model)
    return program


def example_of(inputs: Inputs) -> tuple[list[Tensor], int]:
    """The example as an exporter needs it, and its batch size: a free axis of size 1 would be taken for a constant."""
    wide = inputs.at({name: max(2, size) for name, size in inputs.lengths().items()})
    size = max(2, inputs.batch)
    return (wide.resized(size) if inputs.batched else [tensor.clone() for tensor in wide.tensors]), size


def check_opset(opset: int | None) -> None:
    """Raise ExportError for an `opset` that neither torch nor onnx can write."""
    from onnx import defs

    if opset is not None and not OLDEST_OPSET <= opset <= defs.onnx_opset_version():
        said = "too old" if opset < OLDEST_OPSET else "too new"
        raise ExportError(
            f"`opset` (={opset}) is {said}: the installed torch and onnx take {OLDEST_OPSET} to "
            f"{defs.onnx_opset_version()}, leave it out for the default"
        )


def check_reached(version: int | None, opset: int | None) -> None:
    """Raise ExportError when the operator set of a program is not the one that was asked for."""
    if opset is not None and version != opset:
        said = f"`opset` (={opset}) could not be reached, torch wrote {version}"
        raise ExportError(f"{said}: leave it out for the default")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter: warnings and log lines about torch's own code, graphs printed to stderr on a failure."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_dynamic(program: Any, inputs: Inputs, size: int) -> None:
    graph_inputs = {value.name: value for value in program.model.graph.inputs}
    for i, axes in inputs.axes().items():
        for axis, name in axes.items():
            found = graph_inputs[inputs.names[i]].shape[axis]
            if isinstance(found, int):
                said = f"batch size {size}" if name == BATCH else f"{found} for axis `{name}`"
                raise ExportError(f"torch.export found that the model works at {said} only")


def strip_prefix(model: Any) -> None:
    """Give the initializers of an `onnx_ir.Model` of a `Flat` the names that the parameters have in its model."""
    for value in list(model.graph.initializers.values()):
        if value.name.startswith(_PREFIX):
            value.name = value.name.removeprefix(_PREFIX)


def tidy(proto: Any, inputs: Inputs) -> None:
    """Leave in a model only what its reader needs.

    The free axes have their own names everywhere, "batch" for one. The exporter's notes on nodes and values go: they
    hold source lines and paths of this machine; a node keeps the path of its module as `MODULE_KEY`.
    """
    names = {inputs.names[i]: axes for i, axes in inputs.axes().items()}
    symbols = {
        value.type.tensor_type.shape.dim[axis].dim_param: name
        for value in proto.graph.input
        for axis, name in names.get(value.name, {}).items()
    }
    for graph in _graphs(proto.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            value.ClearField("metadata_props")
            for dimension in value.type.tensor_type.shape.dim:
                if dimension.dim_param in symbols:
                    dimension.dim_param = symbols[dimension.dim_param]
        for node in graph.node:
            scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
            paths = [scope for scope in ast.literal_eval(scopes)[:-1] if scope.startswith(_PREFIX)]
            node.ClearField("metadata_props")
            if paths:
                node.metadata_props.add(key=MODULE_KEY, value=paths[-1].removeprefix(_PREFIX))
        for tensor in graph.initializer:
            tensor.ClearField("metadata_props")
        graph.ClearField("metadata_props")


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)
