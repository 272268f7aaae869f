"""ONNX files of any origin: read with every check that needs no run, written whole or not at all."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters.external import beside, move_out, staging
from fxsparse.exporters.file_wire import LARGE, forget, hollow, skeleton, write_model
from fxsparse.exporters.files import replacing
from fxsparse.exporters.inputs import first_line
from fxsparse.exporters.runtime import open_session

_IN_MEMORY = 2**26  # bytes of tensors up to which a session gets a message instead of a file
_TYPE = "fxsparse.type"  # what `onnx_ir` cannot hold, as bytes


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """A file that was read.

    Attributes:
        path: the file.
        model: its content; tensors in other files are mapped into memory, not read.
        data: the other files that hold tensors.
    """

    path: Path
    model: ir.Model
    data: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Size on disk, of all files together."""
        return sum(path.stat().st_size for path in (self.path, *self.data))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return tensor_bytes(self.model)


def read_file(path: str | os.PathLike[str]) -> OnnxFile:
    """Read an ONNX file and check that its tensors are all there.

    Raises:
        ExportError: the file is missing, is no ONNX, or a file that it names is missing, too short or elsewhere.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"`path` (={path}): there is no such file")
    try:
        model, inside = _deserialized(path)
        if not model.opset_imports or not (model.graph.outputs or len(model.graph)):
            raise ValueError("it has no graph")
    except Exception as error:  # the parser's own error shares no base class with OSError
        raise ExportError(f"`path` (={path}) cannot be read as ONNX ({first_line(error)}): export it again") from error
    data = {
        _checked_location(path, tensor)
        for tensor in _tensors(model)
        if isinstance(tensor, ir.ExternalTensor) and tensor.name not in inside
    }
    return OnnxFile(path, model, tuple(sorted(data)))


def _deserialized(path: Path) -> tuple[ir.Model, set[str]]:
    """The content, and the tensors that are read from the file itself when needed.

    Types that `onnx_ir` lacks (maps, as scikit-learn's classifiers give) are kept aside.

    Raises:
        Exception: whatever the parsers meet.
    """
    import onnx

    message, inside = skeleton(path) if path.stat().st_size > 2 * LARGE else (path.read_bytes(), set())
    proto = onnx.load_model_from_string(message)
    del message
    kept = [value for value in proto.graph.value_info if not _has_map(value.type)]
    if len(kept) < len(proto.graph.value_info):
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(kept)
    foreign = {value.name: value.type.SerializeToString() for value in proto.graph.output if _has_map(value.type)}
    for value in proto.graph.output:
        if value.name in foreign:
            value.ClearField("type")
    model = ir.serde.deserialize_model(proto)
    ir.external_data.set_base_dir(model.graph, str(path.parent))
    for value in model.graph.outputs:
        if value.name in foreign:
            value.meta[_TYPE] = foreign[value.name]
    return model, inside


def _has_map(type_proto: Any) -> bool:
    kind = type_proto.WhichOneof("value")
    inner = type_proto.sequence_type if kind == "sequence_type" else type_proto.optional_type
    return kind == "map_type" or (kind in ("sequence_type", "optional_type") and _has_map(inner.elem_type))


def _restore_types(model: ir.Model, proto: Any) -> None:
    """Give outputs the types that `onnx_ir` lacks."""
    for value, written in zip(model.graph.outputs, proto.graph.output, strict=True):
        if _TYPE in value.meta:
            written.type.ParseFromString(value.meta[_TYPE])


def _checked_location(path: Path, tensor: ir.ExternalTensor) -> Path:
    location = str(tensor.location)
    if os.path.isabs(location) or ".." in Path(location).parts:
        raise ExportError(
            f"`path` (={path}): tensor `{tensor.name}` names a file outside its folder (={location}), which is not "
            "read: put the data beside the file"
        )
    file = path.parent / location
    if not file.is_file():
        raise ExportError(f"`path` (={path}): the file (={location}) with tensor `{tensor.name}` is missing: copy both")
    needed = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
    if tensor.length is not None and tensor.length < tensor.nbytes:
        raise ExportError(
            f"`path` (={path}): tensor `{tensor.name}` of {tensor.nbytes:,} bytes has `length` (={tensor.length}): "
            "export it again"
        )
    if (size := file.stat().st_size) < needed:
        raise ExportError(
            f"`path` (={path}): the file (={location}) ends at byte {size:,}, tensor `{tensor.name}` at {needed:,}: "
            "it is truncated, copy it again"
        )
    return file


def place(model: ir.Model, out: Path, check: Callable[[Path], None], *, external: bool) -> None:
    """Write a model, have it checked, and only then put it at `out`.

    Args:
        model: what to write.
        out: the place.
        check: called with the path of the written file before it is put in place; raises to stop.
        external: whether the large tensors go into a data file beside it.

    Raises:
        ExportError: the place cannot be written. Nothing is left behind, and what was there stays.
    """
    with beside(out) as put, replacing(out) as temporary:
        if external:
            with staging(out) as folder:
                model = model.clone()
                _take_in(model, main=False)
                put(move_out(model, folder, out.name))
                proto = ir.to_proto(model)
                _restore_types(model, proto)
                temporary.write_bytes(proto.SerializeToString(deterministic=True))
        else:
            write_file(model, temporary)
        check(temporary)


def write_file(model: ir.Model, path: Path) -> None:
    """Write a model with all tensors inside.

    Raises:
        ExportError: its tensors take more than 2 GB.
    """
    with path.open("wb") as file:
        _write(model, file)


def to_bytes(model: ir.Model) -> bytes:
    """The message, tensors inside."""
    file = io.BytesIO()
    _write(model, file)
    return file.getvalue()


def _write(model: ir.Model, file: BinaryIO) -> None:
    _take_in(model, main=True)
    proto = hollow(model)
    _restore_types(model, proto)
    try:
        write_model(model, proto, file)
    except ValueError as error:
        raise ExportError(f"the model cannot be written as one message ({first_line(error)})") from error


def _take_in(model: ir.Model, *, main: bool) -> None:
    """Hold external tensors in memory: those of subgraphs, with `main` small ones of the main graph as well."""
    for graph in model.graphs():
        if graph is model.graph and not main:
            continue
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and (graph is not model.graph or tensor.nbytes < LARGE):
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


@contextmanager
def session_of(model: ir.Model, threads: int = 1) -> Iterator[Any]:
    """An onnxruntime session of a model in memory; that of a large one reads it from a temporary folder.

    Raises:
        ExportError: onnxruntime refuses it.
    """
    if tensor_bytes(model) <= _IN_MEMORY:
        yield open_session(to_bytes(model), threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        copy = model.clone()
        _take_in(copy, main=False)
        try:
            move_out(copy, Path(folder), file.name)
            ir.save(copy, file, format="protobuf")
        except OSError as error:
            raise ExportError(f"`{folder}` cannot be written ({error.strerror}): make room for a copy") from error
        forget(model)
        yield open_session(file, threads)


def check_out(source: OnnxFile, out: Path) -> None:
    """Raise ConfigError where writing `out` would touch the source, which stays as it is."""
    if out.exists() and out.samefile(source.path):
        raise ConfigError(f"`out` (={out}) is the source, which is left as it is: name another file")
    for data in source.data:
        if data.name.startswith(f"{out.name}.") and data.parent.resolve() == out.parent.resolve():
            raise ConfigError(f"`out` (={out}) owns the data file (={data.name}) of the source: name another file")


def tensor_bytes(model: ir.Model) -> int:
    """Bytes of all tensors that a model stores."""
    return sum(tensor.nbytes for tensor in _tensors(model))


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute, ir.Attr):
                    yield attribute.as_tensor()
