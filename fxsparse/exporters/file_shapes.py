"""Sizes of all values of an ONNX graph: as far as they follow from the file, and on given inputs."""

from __future__ import annotations

import onnx_ir as ir

from fxsparse.exporters.file_forward import read_sizes
from fxsparse.exporters.file_inputs import Feed
from fxsparse.exporters.file_wire import hollow

_READ = 4096  # bytes up to which inference reads the content of a tensor: a list of sizes, at most


def infer(model: ir.Model) -> None:
    """Fill in the sizes that follow from the operators; what a foreign operator makes stays unknown."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(hollow(model, _READ), data_prop=True)
    types = {value.name: value.type.tensor_type for value in (*inferred.graph.value_info, *inferred.graph.output)}
    for node in model.graph:
        for value in node.outputs:
            found = types.get(value.name)
            if found is None or not found.elem_type:
                continue
            if value.type is None:
                value.type = ir.TensorType(ir.DataType(found.elem_type))
            if found.HasField("shape"):
                dims = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in found.shape.dim]
                value.shape = _merged(value.shape, dims)
    read_sizes(model)


def _merged(known: ir.Shape | None, found: list[int | str | None]) -> ir.Shape:
    """Sizes that were known, and those that were found where they were free."""
    if known is None or len(known) != len(found):
        return ir.Shape(found)
    return ir.Shape([old if isinstance(old, int) or new is None else new if isinstance(new, int) or old.value is None
                     else old for old, new in zip(known, found, strict=True)])  # fmt: skip


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
