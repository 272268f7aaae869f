"""A plain model -> an ONNX program, by torch's exporter, with flat inputs and outputs and the parameters' own names."""

from __future__ import annotations

import ast
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import ExportError
from fxsparse.exporters.inputs import Inputs, first_line
from fxsparse.graph import preserved_rng

OLDEST_OPSET = 18
"""The operator set in which torch's exporter is written; it only converts to older ones, and not always rightly."""

MODULE_KEY = "fxsparse.module"
"""Key of a node's metadata: the path of the module that it computes for."""

_PREFIX = "model."
_LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")
_BATCH = "batch"


@dataclass(frozen=True, eq=False)
class Program:
    """An exported program.

    Attributes:
        onnx: the `torch.onnx.ONNXProgram`, not yet optimised.
        inputs: the inputs with the batch axis that the program really has.
        outputs: names of the outputs.
    """

    onnx: Any
    inputs: Inputs
    outputs: tuple[str, ...]


class Flat(nn.Module):
    """A model as a function from tensors to a tuple of tensors.

    Nested, keyword and non-tensor inputs are rebuilt inside, so that the exporter sees none of them: it would read a
    trailing dict as keywords, reorder keywords and refuse ``**kwargs`` of dynamic shape.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model; the tensors among its outputs in their flattened order."""
        args, kwargs = self.inputs.build(tensors)
        return tuple(leaf for leaf in pytree.tree_leaves(self.model(*args, **kwargs)) if isinstance(leaf, Tensor))


def output_names(outputs: Any, taken: Sequence[str]) -> tuple[str, ...]:
    """Names of the outputs: the keys of dicts, the positions in tuples; none of `taken`.

    Raises:
        ExportError: when an output is neither a tensor nor None, or there is no tensor among them.
    """
    names: list[str] = []
    for path, leaf in pytree.tree_flatten_with_path(outputs)[0]:
        keys = [str(getattr(k, "idx", getattr(k, "key", getattr(k, "name", k)))) for k in path]
        name = re.sub(r"\W", "_", "_".join(keys)) or "output"
        name = f"output_{name}" if name[0].isdigit() else name
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor):
            raise ExportError(
                f"output `{name}` (={leaf!r}) is no tensor and ONNX has no place for it: "
                "return tensors only, or export a wrapper that drops it"
            )
        while name in taken or name in names:
            name += "_out"
        names.append(name)
    if not names:
        raise ExportError("the model returns no tensor: nothing can be exported")
    return tuple(names)


def export_program(model: nn.Module, inputs: Inputs, outputs: tuple[str, ...], opset: int | None) -> Program:
    """Export a plain model in eval mode on the CPU; with a dynamic batch where it can be, else with a fixed one.

    Raises:
        ExportError: when torch cannot export the model, or not in this `opset`.
    """
    _check_opset(opset)
    program = None
    if inputs.batched:
        size = max(2, inputs.batch)  # torch.export takes a size of 1 for a constant
        try:
            program = _export(model, inputs, inputs.resized(size), outputs, opset)
            if not _is_dynamic(program, inputs):
                inputs = inputs.fixed(f"torch.export found that the model works at batch size {size} only")
                program = None
        except Exception as error:
            inputs = inputs.fixed(f"torch.export with a dynamic batch: {first_line(root_cause(error))}")
    if program is None:
        try:
            program = _export(model, inputs, list(inputs.tensors), outputs, opset)
        except Exception as error:
            raise ExportError(
                f"torch cannot export this model to ONNX ({first_line(root_cause(error))}): "
                "rewrite that part of `forward`, or export the part of the model around it"
            ) from error
    version = program.model.opset_imports.get("")
    if opset is not None and version != opset:
        said = f"`opset` (={opset}) could not be reached, torch wrote {version}"
        raise ExportError(f"{said}: leave it out for the default")
    _strip_prefix(program)
    return Program(program, inputs, outputs)


def _check_opset(opset: int | None) -> None:
    from onnx import defs

    if opset is not None and not OLDEST_OPSET <= opset <= defs.onnx_opset_version():
        said = "too old" if opset < OLDEST_OPSET else "too new"
        raise ExportError(
            f"`opset` (={opset}) is {said}: the installed torch and onnx take {OLDEST_OPSET} to "
            f"{defs.onnx_opset_version()}, leave it out for the default"
        )


def _export(
    model: nn.Module, inputs: Inputs, tensors: list[Tensor], outputs: tuple[str, ...], opset: int | None
) -> Any:
    shapes = tuple({0: _BATCH} if i in inputs.batched else None for i in range(len(tensors)))
    options: dict[str, Any] = {} if opset is None else {"opset_version": opset}
    with quiet(), preserved_rng(), torch.no_grad():
        return torch.onnx.export(
            Flat(model, inputs).eval(),
            tuple(tensors),
            dynamo=True,
            optimize=False,
            verbose=False,
            external_data=False,
            input_names=list(inputs.names),
            output_names=list(outputs),
            dynamic_shapes=(shapes,) if inputs.batched else None,
            **options,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter: warnings and log lines about torch's own code, graphs printed to stderr on a failure."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain of errors."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _is_dynamic(program: Any, inputs: Inputs) -> bool:
    graph_inputs = {value.name: value for value in program.model.graph.inputs}
    return all(not isinstance(graph_inputs[inputs.names[i]].shape[0], int) for i in inputs.batched)


def _strip_prefix(program: Any) -> None:
    for value in list(program.model.graph.initializers.values()):
        if value.name.startswith(_PREFIX):
            value.name = value.name.removeprefix(_PREFIX)


def tidy(proto: Any, inputs: Inputs) -> None:
    """Leave in a model only what its reader needs.

    The batch axis is called "batch" everywhere. The exporter's notes on nodes and values go: they hold source lines and
    paths of this machine; a node keeps the path of its module as `MODULE_KEY`.
    """
    batched = {inputs.names[i] for i in inputs.batched}
    symbols = {v.type.tensor_type.shape.dim[0].dim_param for v in proto.graph.input if v.name in batched}
    for graph in _graphs(proto.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            value.ClearField("metadata_props")
            for dimension in value.type.tensor_type.shape.dim:
                if dimension.dim_param in symbols:
                    dimension.dim_param = _BATCH
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
