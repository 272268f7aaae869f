"""Large ONNX files without a second copy of their weights: read by place, written tensor by tensor."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

LARGE = 2**20  # bytes of a tensor from which on it is left in its file
_GRAPH, _INITIALIZER, _RAW = 7, 5, 9  # field numbers: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data


def skeleton(path: Path) -> tuple[bytes, set[str]]:
    """The message of a file in which large tensors of the main graph are references to places in the file itself.

    Returns:
        The message, and the names of those tensors.

    Raises:
        ValueError: the file is no such message, or ends too early.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        parts: list[bytes] = []
        names: set[str] = set()
        for number, start, body, end in _fields(held, 0, len(held)):
            if number != _GRAPH:
                parts.append(held[start:end])
                continue
            inner: list[bytes] = []
            for field, first, content, last in _fields(held, body, end):
                large = field == _INITIALIZER and last - content >= LARGE
                found = _reference(held, content, last, path.name) if large else None
                if found is None:
                    inner.append(held[first:last])
                else:
                    names.add(found[1])
                    inner.append(_message(_INITIALIZER, found[0]))
            parts.append(_message(_GRAPH, b"".join(inner)))
        return b"".join(parts), names


def write_model(model: ir.Model, proto: Any, file: BinaryIO) -> None:
    """Write a message whose large tensors, as `hollow` left them, come from the model one after the other.

    Raises:
        ValueError: the message would be larger than 2 GB.
    """
    large = _large(model)
    stored = {t.name: t for t in proto.graph.initializer if t.name in large}
    kept = [t for t in proto.graph.initializer if t.name not in stored]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    heads = {}
    for name, tensor in stored.items():
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        size = _value(model, name).nbytes
        head = tensor.SerializeToString(deterministic=True) + _tag(_RAW) + _varint(size)
        heads[name] = _tag(_INITIALIZER) + _varint(len(head) + size) + head
    total = len(graph) + sum(len(head) + _value(model, name).nbytes for name, head in heads.items())
    if total >= 2**31:
        raise ValueError(f"a message of {total:,} bytes is larger than ONNX takes")
    file.write(proto.SerializeToString(deterministic=True) + _tag(_GRAPH) + _varint(total) + graph)
    for name, head in heads.items():
        file.write(head)
        file.write(_value(model, name).tobytes())


def hollow(model: ir.Model, least: int = LARGE) -> Any:
    """The message of a model without the content of tensors of the main graph of `least` bytes or more."""
    held = {name: model.graph.initializers[name].const_value for name in _large(model, least)}
    try:
        for name, tensor in held.items():
            assert tensor is not None
            empty = ir.ExternalTensor("none", 0, tensor.nbytes, tensor.dtype, shape=_shape(tensor), name=name)
            model.graph.initializers[name].const_value = empty
        return ir.to_proto(model)
    finally:
        for name, tensor in held.items():
            model.graph.initializers[name].const_value = tensor


def forget(model: ir.Model) -> None:
    """Let the system take back the memory of tensors that were read from files; they are read again when needed."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.raw is not None:
                value.const_value.raw.madvise(mmap.MADV_DONTNEED)


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape([int(size) for size in tensor.shape.numpy()])


def _large(model: ir.Model, least: int = LARGE) -> set[str]:
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {n for n, t in found.items() if t is not None and not t.dtype.is_string() and t.nbytes >= least}


def _value(model: ir.Model, name: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor


def _reference(held: mmap.mmap, start: int, end: int, location: str) -> tuple[bytes, str] | None:
    """A tensor's message with a reference to its bytes, and its name; None where they are no raw bytes."""
    import onnx

    rest, place = [], None
    for number, first, content, last in _fields(held, start, end):
        if number == _RAW:
            place = content, last - content
        else:
            rest.append(held[first:last])
    if place is None:
        return None
    tensor = onnx.TensorProto.FromString(b"".join(rest))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(place[0])), ("length", str(place[1]))):
        tensor.external_data.add(key=key, value=value)
    return tensor.SerializeToString(), tensor.name


def _fields(held: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, start, start of the content and end of every field of a message."""
    at = start
    while at < end:
        key, content = _read_varint(held, at, end)
        kind = key & 7
        if kind == 0:
            _, last = _read_varint(held, content, end)
        elif kind == 2:
            size, content = _read_varint(held, content, end)
            last = content + size
        elif kind in (1, 5):
            last = content + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"byte {at:,} is no field of a message")
        if last > end:
            raise ValueError(f"it ends before byte {last:,}: it is truncated")
        yield key >> 3, at, content, last
        at = last


def _read_varint(held: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = held[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError(f"byte {at:,} is no field of a message")


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    made.append(value)
    return bytes(made)


def _tag(number: int) -> bytes:
    return _varint(number << 3 | 2)


def _message(number: int, content: bytes) -> bytes:
    return _tag(number) + _varint(len(content)) + content
