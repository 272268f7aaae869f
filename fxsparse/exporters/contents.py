"""What an ONNX file holds, read without running it: inputs, outputs, initializers and their zeros, metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fxsparse.errors import ExportError
from fxsparse.exporters.metadata import SCHEMA, metadata_of

_SHOWN = ("version", "torch", "batch", "density", "mask_digest")


@dataclass(frozen=True)
class Slot:
    """An input or output: its name, dtype in ONNX's words, and sizes (a name where the size is free)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Initializer:
    """One stored tensor.

    Attributes:
        name: its name.
        dtype: its type in ONNX's words.
        shape: its shape.
        zeros: number of entries that are zero; None where the values lie in another file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    zeros: int | None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Contents:
    """An ONNX file; `str` gives a text.

    Attributes:
        path: the file.
        bytes: its size.
        opsets: operator set version by domain ("" = ONNX's own).
        producer: who wrote it, as it says.
        nodes: how often each operator occurs, in the graph itself.
        inputs: what it takes.
        outputs: what it gives.
        initializers: the stored tensors, in the order of the file.
        metadata: what fxsparse wrote into it (see `read_metadata`); empty where it is not by fxsparse.
    """

    path: Path
    bytes: int
    opsets: Mapping[str, int]
    producer: str
    nodes: Mapping[str, int]
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    initializers: tuple[Initializer, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in self.opsets.items())
        operators = ", ".join(f"{count} {kind}" for kind, count in self.nodes.items())
        lines = [
            f"{self.path}: {self.bytes:,} bytes, opset {opsets}, by {self.producer or 'an unknown writer'}",
            *(f"input   {slot}" for slot in self.inputs),
            *(f"output  {slot}" for slot in self.outputs),
            f"nodes   {operators or 'none'}",
            *self._metadata_lines(),
            "",
            *self._table(),
        ]
        return "\n".join(lines)

    def _metadata_lines(self) -> list[str]:
        if not self.metadata:
            return [f"no metadata of schema {SCHEMA}: this fxsparse did not write it"]
        said = [f"{key} {self.metadata[key]}" for key in _SHOWN if key in self.metadata]
        lines = [f"fxsparse {', '.join(said).removeprefix('version ')}"]
        lines += [f"lineage {key} = {value}" for key, value in self.metadata["lineage"].items()]
        return lines

    def _table(self) -> list[str]:
        weights = {
            name: layer
            for layer in self.metadata.get("layers", ())
            for name in (*layer["initializers"], *layer["parts"])
        }
        rows = [("initializer", "dtype", "shape", "zeros", "sparsity", "pattern", "weight")]
        for stored in self.initializers:
            layer = weights.get(stored.name, {})
            zeros, share = ("?", "?") if stored.zeros is None else (f"{stored.zeros:,}", _share(stored))
            shape = "x".join(map(str, stored.shape)) or "scalar"
            rows.append(
                (stored.name, stored.dtype, shape, zeros, share, layer.get("pattern", ""), layer.get("name", ""))
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        known = [stored for stored in self.initializers if stored.zeros is not None]
        dead, numel = sum(stored.zeros or 0 for stored in known), sum(stored.numel for stored in known)
        total = f"{len(self.initializers)} initializers; {dead:,} of {numel:,} stored entries are zero"
        outside = len(self.initializers) - len(known)
        return [*lines, "", total + (f"; {outside} lie in other files, which were not read" if outside else "")]


def _share(stored: Initializer) -> str:
    return f"{(stored.zeros or 0) / stored.numel:.4g}" if stored.numel else "-"


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """Read an ONNX file; no session is opened and no other file is read.

    Raises:
        ExportError: when the file cannot be read as ONNX.
    """
    import onnx

    path = Path(path)
    try:
        model = onnx.load(path, load_external_data=False)
        if not model.HasField("graph") or not model.opset_import:
            raise ValueError("it has no graph")
        stored = tuple(_initializer(tensor) for tensor in model.graph.initializer)
        metadata = metadata_of(model) or {}
    except Exception as error:  # the parser's own error shares no base class with OSError
        said = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ExportError(f"`path` (={path}) cannot be read as ONNX ({said}): export it again") from error
    names = {tensor.name for tensor in stored}
    kinds = [node.op_type for node in model.graph.node]
    return Contents(
        path,
        path.stat().st_size,
        {entry.domain: entry.version for entry in model.opset_import},
        " ".join(part for part in (model.producer_name, model.producer_version) if part),
        {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        tuple(_slot(value) for value in model.graph.input if value.name not in names),
        tuple(_slot(value) for value in model.graph.output),
        stored,
        metadata,
    )


def _slot(value: Any) -> Slot:
    tensor = value.type.tensor_type
    sizes = (d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    return Slot(value.name, _dtype(tensor.elem_type), tuple(sizes))


def _initializer(tensor: Any) -> Initializer:
    from onnx import TensorProto, numpy_helper

    outside = tensor.data_location == TensorProto.EXTERNAL
    zeros = None if outside else int(np.count_nonzero(numpy_helper.to_array(tensor) == 0))
    return Initializer(tensor.name, _dtype(tensor.data_type), tuple(tensor.dims), zeros)


def _dtype(code: int) -> str:
    from onnx import TensorProto

    return str(TensorProto.DataType.Name(code)).lower() if code else "?"
