"""A float64 copy of an ONNX model, and runs of it: what shows that a rewriting is exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fxsparse.errors import ExportError
from fxsparse.exporters.file_io import tensor_bytes, to_bytes
from fxsparse.exporters.inputs import first_line
from fxsparse.exporters.runtime import open_session

LARGEST = 400_000_000  # bytes of tensors above which no float64 copy is made
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class Runner(Protocol):
    """Whatever runs a model as an onnxruntime session does."""

    def run(self, names: Sequence[str] | None, feed: Any) -> list[Any]:
        """All outputs, in order."""


class CannotRun(ExportError):
    """Nothing here runs a model in float64, which says nothing against the model."""


def double(model: ir.Model) -> ir.Model:
    """A copy of a model that computes in float64.

    Constants, inputs, outputs, casts and statistics become float64; an operand that its operator takes in float32 only
    (the scales of a Resize) is cast back.

    Raises:
        ExportError: the model is too large for a copy, or works on 8-bit numbers.
    """
    if (size := tensor_bytes(model)) > LARGEST:
        raise ExportError(f"its tensors take {size:,} bytes, a float64 copy was not made")
    copy = model.clone()
    for graph in copy.graphs():
        for value in graph.initializers.values():
            _widen_value(value)
            if value.const_value is not None:
                value.const_value = _wide(value.const_value)
        for value in graph.inputs:
            _widen_value(value)
        _widen_nodes(list(graph), copy)
    for function in copy.functions.values():
        _widen_nodes(list(function), copy)
    return copy


@contextmanager
def runner_of(model: ir.Model) -> Iterator[Runner]:
    """Something that runs a float64 model: onnxruntime, else ONNX's reference with torch's convolutions.

    Raises:
        CannotRun: neither can.
    """
    message = to_bytes(model)
    try:
        session = open_session(message, optimised=False)  # some fusions keep factors in float32
    except ExportError:
        pass  # it lacks float64 for some operator
    else:
        yield _Guarded(session)
        return
    try:
        found = _reference(message)
    except Exception as error:  # whatever the reference meets
        raise CannotRun("float64 runs neither in onnxruntime nor in ONNX's reference") from error
    yield _Guarded(found)


class _Guarded:
    """A runner whose errors are of one kind."""

    def __init__(self, inner: Runner) -> None:
        self.inner = inner

    def run(self, names: Sequence[str] | None, feed: Any) -> list[Any]:
        """Run, as a session does."""
        try:
            return self.inner.run(names, feed)
        except Exception as error:  # whatever the reference or onnxruntime meets
            raise CannotRun(f"float64 does not run ({first_line(error)})") from error


def _widen_nodes(nodes: Sequence[ir.Node], model: ir.Model) -> None:
    for node in nodes:
        for name, attribute in list(node.attributes.items()):
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR:
                node.attributes[name] = ir.AttrTensor(name, _wide(attribute.as_tensor()))
            elif name in ("to", "dtype", "output_datatype") and attribute.type == ir.AttributeType.INT:
                if attribute.as_int() in _FLOATS:
                    node.attributes[name] = ir.AttrInt64(name, ir.DataType.DOUBLE)
        _widen_constant(node)
        for value in node.outputs:
            _widen_value(value)
        _narrow_operands(node, model)


def _widen_constant(node: ir.Node) -> None:
    """A Constant of one number or a list has another attribute for it, a ConstantOfShape has float32 zeros."""
    if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.zeros(1)))
    for name, plural in (("value_float", False), ("value_floats", True)):
        if node.op_type == "Constant" and name in node.attributes:
            given = node.attributes.pop(name)
            values = list(given.as_floats()) if plural else given.as_float()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.asarray(values, np.float64)))


def _narrow_operands(node: ir.Node, model: ir.Model) -> None:
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, int(model.opset_imports.get(node.domain, 1)), node.domain)
    except onnx.defs.SchemaError:
        return
    for index, value in enumerate(node.inputs):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)] if schema.inputs else None
        if value is None or formal is None or value.dtype != ir.DataType.DOUBLE:
            continue
        allowed = formal.types
        if "tensor(float)" in allowed and "tensor(double)" not in allowed:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            cast.outputs[0].name = f"{value.name}_{node.name}_{index}_narrow"
            node.prepend(cast)
            node.replace_input_with(index, cast.outputs[0])


def _widen_value(value: ir.Value) -> None:
    if value.dtype in _FLOATS and isinstance(value.type, ir.TensorType):
        value.type = ir.TensorType(ir.DataType.DOUBLE)


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype not in _FLOATS:
        return tensor
    return ir.Tensor(tensor.numpy().astype(np.float64), name=tensor.name)


def _reference(message: bytes) -> Runner:
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator: Any = ReferenceEvaluator(onnx.load_model_from_string(message), new_ops=_torch_operators())
    found: Runner = evaluator
    return found


def _torch_operators() -> list[Any]:
    """Convolutions by torch, as those of the reference are slow; normalisations in the precision of their operand."""
    import torch
    from onnx.reference.op_run import OpRun

    class Conv(OpRun):
        op_domain = ""

        def _run(  # noqa: PLR0913 - the attributes of the operator
            self,
            x: NDArray[Any],
            w: NDArray[Any],
            b: NDArray[Any] | None = None,
            auto_pad: str | None = None,
            dilations: Sequence[int] | None = None,
            group: int | None = None,
            kernel_shape: Sequence[int] | None = None,
            pads: Sequence[int] | None = None,
            strides: Sequence[int] | None = None,
        ) -> tuple[NDArray[Any]]:
            rank = w.ndim - 2
            steps, spread = tuple(strides or (1,) * rank), tuple(dilations or (1,) * rank)
            low, high = _padding(x.shape[2:], w.shape[2:], steps, spread, auto_pad or "NOTSET", pads)
            padded = np.pad(x, [(0, 0), (0, 0), *zip(low, high, strict=True)])
            given: Any = [None if part is None else torch.from_numpy(np.array(part)) for part in (padded, w, b)]
            convolve: Any = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1]
            return (convolve(*given, stride=steps, dilation=spread, groups=group or 1).numpy(),)

    class LayerNormalization(OpRun):
        op_domain = ""

        def _run(
            self,
            x: NDArray[Any],
            scale: NDArray[Any],
            shift: NDArray[Any] | None = None,
            axis: int | None = None,
            epsilon: float | None = None,
            stash_type: int | None = None,
        ) -> tuple[NDArray[Any], ...]:
            first = -1 if axis is None else axis
            axes = tuple(range(first % x.ndim, x.ndim))
            mean = x.mean(axis=axes, keepdims=True)
            spread = 1 / np.sqrt(x.var(axis=axes, keepdims=True) + (1e-5 if epsilon is None else epsilon))
            made = (x - mean) * spread * scale
            return (made if shift is None else made + shift, mean, spread)

    return [Conv, LayerNormalization]


def _padding(
    size: Sequence[int],
    kernel: Sequence[int],
    steps: Sequence[int],
    spread: Sequence[int],
    auto: str,
    pads: Sequence[int] | None,
) -> tuple[list[int], list[int]]:
    rank = len(size)
    if auto in ("NOTSET", "VALID"):
        given = list(pads or [0] * 2 * rank) if auto == "NOTSET" else [0] * 2 * rank
        return given[:rank], given[rank:]
    total = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(size, kernel, steps, spread, strict=True)
    ]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return (less, more) if auto == "SAME_UPPER" else (more, less)
