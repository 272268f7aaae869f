"""Sizes of all values of an ONNX graph: as far as they follow from the file, and on given inputs."""

from __future__ import annotations

import onnx_ir as ir

from fxsparse.exporters.file_graph import integer, sizes, whole
from fxsparse.exporters.file_inputs import Feed
from fxsparse.exporters.file_wire import hollow

_READ = 4096  # bytes up to which inference reads the content of a tensor: a list of sizes, at most


def infer(model: ir.Model) -> None:
    """Fill in the sizes that follow from the operators; what a foreign operator makes stays unknown."""
    _infer_once(model)
    if _from_targets(model):
        _infer_once(model)
    _join_names(model)


def _infer_once(model: ir.Model) -> None:
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


def _from_targets(model: ir.Model) -> bool:
    """Read sizes of reshaped values off shapes that are put together of single entries; whether there were any.

    Before operator set 14 inference does not.
    """
    read = False
    for node in model.graph:
        known = sizes(node.outputs[0])
        if node.op_type != "Reshape" or node.inputs[1] is None or (known is not None and None not in known):
            continue
        maker = node.inputs[1].producer()
        if maker is None or maker.op_type != "Concat" or any(sizes(part) != [1] for part in maker.inputs):
            continue
        entries = [(whole(part) or [-1])[0] for part in maker.inputs]
        made = _merged(node.outputs[0].shape, [size if size > 0 else None for size in entries])
        read = read or made != node.outputs[0].shape
        node.outputs[0].shape = made
    return read


def _merged(known: ir.Shape | None, found: list[int | str | None]) -> ir.Shape:
    """Sizes that were known, and those that were found where they were free."""
    if known is None or len(known) != len(found):
        return ir.Shape(found)
    return ir.Shape([old if isinstance(old, int) or new is None else new if isinstance(new, int) or old.value is None
                     else old for old, new in zip(known, found, strict=True)])  # fmt: skip


def _join_names(model: ir.Model) -> None:
    """Let free sizes that a Slice or Split passes on keep their names; inference makes up new ones."""
    known: dict[str, str] = {}
    for node in model.graph:
        x = node.inputs[0] if node.inputs else None
        if node.op_type not in ("Slice", "Split") or x is None or x.shape is None:
            continue
        cut = _cut_axes(node, len(x.shape))
        for out in node.outputs if cut is not None else ():
            for axis, (size, old) in enumerate(zip(out.shape or (), x.shape, strict=False)):
                a, b = (each.value if isinstance(each, ir.SymbolicDim) else None for each in (size, old))
                if a and b and cut is not None and axis not in cut and a.startswith("unk__"):
                    known[a] = known.get(b, b)
    if not known:
        return
    for node in model.graph:
        for out in node.outputs:
            if out.shape is not None and any(isinstance(d, ir.SymbolicDim) and d.value in known for d in out.shape):
                out.shape = ir.Shape([known.get(d.value or "", d.value) if isinstance(d, ir.SymbolicDim) else d
                                      for d in out.shape])  # fmt: skip


def _cut_axes(node: ir.Node, rank: int) -> set[int] | None:
    """The axes that a Slice or Split cuts; None where they are not known."""
    if node.op_type == "Split":
        return {integer(node, "axis", 0) % rank}
    if len(node.inputs) < 4 or node.inputs[3] is None:
        return None
    axes = whole(node.inputs[3])
    return None if axes is None else {axis % rank for axis in axes}


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
