"""Sizes of all values of an ONNX graph: as far as they follow from the file, and on given inputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir

from fxsparse.exporters.file_inputs import Feed


def infer(model: ir.Model) -> None:
    """Fill in the sizes that follow from the operators; what a foreign operator makes stays unknown."""
    from onnx_ir.passes.common import ShapeInferencePass

    try:
        with _quiet():
            ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    except ir.serde.SerdeError:  # a value of a kind that `onnx_ir` lacks, a map
        _infer_tensors(model)


def _infer_tensors(model: ir.Model) -> None:
    """As `infer`, of tensors alone."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True)
    types = {value.name: value.type.tensor_type for value in inferred.graph.value_info}
    for node in model.graph:
        for value in node.outputs:
            found = types.get(value.name)
            if found is None or value.shape is not None or not found.HasField("shape"):
                continue
            dims = found.shape.dim
            value.type = ir.TensorType(ir.DataType(found.elem_type))
            value.shape = ir.Shape([d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in dims])


def on_feed(model: ir.Model, feed: Feed) -> dict[str, tuple[int, ...]]:
    """Sizes of the values on these inputs, by name; values of unknown size are left out."""
    copy = model.clone()
    for node in copy.graph:
        for value in node.outputs:
            value.shape = None
    for value in copy.graph.inputs:
        if value.name in feed:
            value.shape = ir.Shape(feed[value.name].shape)
    infer(copy)
    values = [value for node in copy.graph for value in node.outputs] + list(copy.graph.inputs)
    return {
        value.name: tuple(int(size) for size in value.shape.numpy())
        for value in values
        if value.name and value.shape is not None and value.shape.is_static()
    }


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("onnx_ir")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
