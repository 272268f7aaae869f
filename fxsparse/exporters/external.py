"""Models beyond what one protobuf message can hold: weights in a file of their own beside the model."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fxsparse.errors import ExportError

LIMIT = 2**31 - 1 - 2**24
"""Bytes of weights from which on they lie in a file of their own: one message holds 2^31 - 1, names and nodes too."""

_ALIGNMENT = 4096  # of each tensor in the file, so that a runtime can map it
_SMALLEST = 1024  # bytes from which on a tensor goes there; shapes and scalars stay where shape inference sees them


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A folder beside `path` for the files on the way there; it is gone afterwards.

    Raises:
        ExportError: when it cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        message = f"`path` (={path}) cannot be written ({error.strerror}): choose a writable directory"
        raise ExportError(message) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bytes_of(model: Any) -> int:
    """Bytes of all initializers of an `onnx_ir.Model`."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def move_out(model: Any, folder: Path, name: str) -> Path:
    """Write the large initializers of an `onnx_ir.Model` to a file in `folder` and leave references to it.

    Args:
        model: the model, changed in place.
        folder: where the file goes.
        name: name of the ONNX file; the weights' is ``<name>.<first digits of its SHA-256>.data``, so that no two
            models share it.

    Returns:
        The file of the weights.
    """
    import onnx_ir

    held = [v for v in model.graph.initializers.values() if v.const_value.nbytes >= _SMALLEST]
    temporary = folder / f"{name}.data"
    digest, spans = hashlib.sha256(), {}
    with temporary.open("wb") as file:
        for value in held:
            offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
            file.write(b"\0" * (offset - file.tell()))
            raw = value.const_value.tobytes()
            digest.update(raw)
            file.write(raw)
            spans[value.name] = offset, len(raw)
        file.flush()
        os.fsync(file.fileno())
    final = folder / f"{name}.{digest.hexdigest()[:12]}.data"
    temporary.rename(final)
    for value in held:
        offset, length = spans[value.name]
        tensor = value.const_value
        value.const_value = onnx_ir.ExternalTensor(
            final.name, offset, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=str(folder)
        )
    return final


def data_files(path: Path) -> set[str]:
    """Names of the files beside an ONNX file that hold its weights; empty where it cannot be read."""
    import onnx

    with suppress(Exception):  # whatever stands there is about to be replaced
        proto = onnx.load(path, load_external_data=False)
        entries = (e for t in proto.graph.initializer for e in t.external_data if e.key == "location")
        return {entry.value for entry in entries}
    return set()


@contextmanager
def beside(path: Path) -> Iterator[Callable[[Path], None]]:
    """Yield a function that puts a file of weights beside `path`; the block replaces `path` itself after that.

    Where the block fails the file goes again. Weights that the file at `path` had in such a file of its own are removed
    at the end; so a reader meets either the old pair or the new one.
    """
    pattern = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{12}}\.data")
    old = {name for name in (data_files(path) if path.is_file() else ()) if pattern.fullmatch(name)}
    put: set[str] = set()

    def move(data: Path) -> None:
        put.add(data.name)
        os.replace(data, path.with_name(data.name))

    try:
        yield move
    except BaseException:
        for name in put - old:
            path.with_name(name).unlink(missing_ok=True)
        raise
    for name in old - put:
        path.with_name(name).unlink(missing_ok=True)
