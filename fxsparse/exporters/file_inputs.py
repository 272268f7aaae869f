"""Random inputs for any ONNX file, from its signature alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters.inputs import first_line

Feed = dict[str, NDArray[Any]]
_SIZES = (16, 8, 32, 64, 224, 1)  # tried for free sizes that are not the batch
_KINDS = {
    "FLOAT": "float32", "DOUBLE": "float64", "FLOAT16": "float16", "BOOL": "bool", "STRING": "object",
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
}  # fmt: skip
_FOLLOWED = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Expand")
_INDEXED = ("Gather", "GatherElements")


@dataclass(frozen=True)
class Wanted:
    """One input.

    Attributes:
        name: its name.
        dtype: numpy's name of its type.
        dims: sizes; a name or None where the size is free.
        limit: for whole numbers, the first value that is no valid index; None where nothing bounds them.
    """

    name: str
    dtype: str
    dims: tuple[int | str | None, ...]
    limit: int | None = None


@dataclass(frozen=True)
class Filling:
    """One way to fill the free sizes and values.

    Attributes:
        other: size of free axes that are not the batch.
        ones: whether whole numbers are all 1 instead of random.
        first_only: whether only the name of the first input's axis 0 is the batch.
    """

    other: int
    ones: bool
    first_only: bool


@dataclass(frozen=True)
class Signature:
    """The inputs of a file.

    Attributes:
        inputs: what it takes, in order.
        sizes: sizes that the user gives to free axes, by name.
    """

    inputs: tuple[Wanted, ...]
    sizes: Mapping[str, int]

    @property
    def fixed_batch(self) -> int | None:
        """The batch size, where no axis 0 is free; None where one is."""
        first = [wanted.dims[0] for wanted in self.inputs if wanted.dims]
        free = any(not isinstance(size, int) and size not in self.sizes for size in first)
        if free or not first:
            return None if free else 1
        return next((size for size in first if isinstance(size, int)), self.sizes.get(str(first[0]), 1))

    @property
    def free_names(self) -> tuple[str, ...]:
        """Names of the free axes."""
        names = (size for wanted in self.inputs for size in wanted.dims if isinstance(size, str))
        return tuple(dict.fromkeys(names))

    def draw(self, batch: int, seed: int, filling: Filling) -> Feed:
        """Random inputs: normal floats, indices below their limit, masks of mostly ones."""
        batched = self._batch_names(filling.first_only)
        generator = np.random.default_rng(seed)
        return {w.name: _values(w, self._shape(w, batch, batched, filling), generator, filling) for w in self.inputs}

    def _batch_names(self, first_only: bool) -> set[str | None]:
        names = [w.dims[0] for w in self.inputs if w.dims and not isinstance(w.dims[0], int)]
        return set(names[:1] if first_only else names)

    def _shape(self, wanted: Wanted, batch: int, batched: set[str | None], filling: Filling) -> tuple[int, ...]:
        sizes = []
        for axis, size in enumerate(wanted.dims):
            if isinstance(size, int):
                sizes.append(size)
            elif size in self.sizes:
                sizes.append(self.sizes[str(size)])
            elif size in batched and (axis == 0 or size is not None):
                sizes.append(batch)
            else:
                sizes.append(filling.other)
        return tuple(sizes)


def read_signature(model: ir.Model, sizes: Mapping[str, int] | None = None) -> Signature:
    """The inputs of a model.

    Args:
        model: its inputs, and the tables that bound indices, are read.
        sizes: sizes of free axes by name.

    Raises:
        ExportError: an input is no tensor.
        ConfigError: `sizes` names no free axis, or a size is below 1.
    """
    limits = index_limits(model)
    inputs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        kind = None if value.dtype is None else value.dtype.name
        if not isinstance(value.type, ir.TensorType) or kind not in _KINDS:
            raise ExportError(
                f"input `{value.name}` (={value.type}) is no tensor of numbers: export one that takes such"
            )
        found = () if value.shape is None else value.shape
        dims = tuple(size if isinstance(size, int) else (size.value if size is not None else None) for size in found)
        inputs.append(Wanted(value.name or "", _KINDS[kind], dims, limits.get(value.name or "")))
    signature = Signature(tuple(inputs), dict(sizes or {}))
    for name, size in signature.sizes.items():
        if name not in signature.free_names:
            raise ConfigError(
                f"`sizes` (={name}) is no free axis; there are: {', '.join(signature.free_names) or 'none'}"
            )
        if size < 1:
            raise ConfigError(f"`sizes` (={name}={size}) must be at least 1")
    return signature


def fillings(signature: Signature) -> Iterator[Filling]:
    """Ways to fill a signature, the likeliest first."""
    free = any(not isinstance(size, int) for wanted in signature.inputs for size in wanted.dims)
    whole = any(np.dtype(wanted.dtype).kind in "iu" for wanted in signature.inputs)
    for other in _SIZES if free else _SIZES[:1]:
        for ones in (False, True) if whole else (False,):
            for first_only in (False, True) if free else (False,):
                yield Filling(other, ones, first_only)


def fitting(session: Any, signature: Signature, batch: int = 1, seed: int = 0) -> Filling:
    """The first filling that the session takes; one with finite outputs before others.

    Raises:
        ExportError: it takes none; the message gives the first reason.
    """
    first_error, loose = "", None
    for filling in fillings(signature):
        feed = signature.draw(batch, seed, filling)
        try:
            outputs = session.run(None, feed)
        except Exception as error:  # onnxruntime's errors share no base class
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
            first_error = first_error or f"on inputs {shapes}: {first_line(error)}"
            continue
        if all(np.isfinite(output).all() for output in flat(outputs) if output.dtype.kind == "f"):
            return filling
        loose = loose or filling
    if loose is not None:
        return loose
    names = ", ".join(signature.free_names)
    mend = f"give sizes of the free axes ({names})" if names else "the file asks for inputs of another kind"
    raise ExportError(f"onnxruntime stops {first_error}; {mend}")


def index_limits(model: ir.Model) -> dict[str, int]:
    """For inputs that are looked up in constant tables: the smallest number of rows of any."""
    return {
        value.name: limit
        for value in model.graph.inputs
        if value.name and (limit := _limit(value, set())) is not None and limit > 0
    }


def _limit(value: ir.Value, seen: set[int]) -> int | None:
    found: list[int] = []
    for node, index in value.uses():
        if id(node) in seen:
            continue
        seen.add(id(node))
        table = node.inputs[0]
        if node.op_type in _INDEXED and index == 1 and table is not None and table.shape is not None:
            axis = node.attributes.get_int("axis", 0)
            size = table.shape[axis]
            found += [size] if isinstance(size, int) else []
        elif node.op_type in (*_FOLLOWED, "Gather") and index == 0:
            below = _limit(node.outputs[0], seen)
            found += [] if below is None else [below]
        elif node.op_type in ("Add", "Sub") and (shift := _constant(node, 1 - index)) is not None:
            below = _limit(node.outputs[0], seen)
            found += [] if below is None else [below - (shift if node.op_type == "Add" else 0)]
    return min(found, default=None)


def _constant(node: ir.Node, index: int) -> int | None:
    """The largest value of a constant operand of whole numbers."""
    value = node.inputs[index]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or not tensor.dtype.is_integer() or not tensor.size:
        return None
    return int(tensor.numpy().max())


def _values(wanted: Wanted, shape: Sequence[int], generator: np.random.Generator, filling: Filling) -> NDArray[Any]:
    if wanted.dtype == "object":
        return np.full(shape, "a", dtype=object)
    dtype = np.dtype(wanted.dtype)
    if dtype.kind == "f":
        return np.asarray(generator.standard_normal(shape)).astype(dtype)
    if dtype.kind == "b" or wanted.limit is None:
        kept = np.asarray(generator.random(shape) < 0.8)
        if kept.ndim:
            kept[..., :1] = True  # no row of a mask is empty
        return (np.ones(shape) if filling.ones else kept).astype(dtype)
    if filling.ones:
        return np.full(shape, min(1, wanted.limit - 1), dtype=dtype)
    return np.asarray(generator.integers(0, min(wanted.limit, np.iinfo(dtype).max), shape)).astype(dtype)


def flat(outputs: Any) -> list[NDArray[Any]]:
    """All arrays in the outputs of a session; maps are read in the order of their keys."""
    if isinstance(outputs, Mapping):
        return [array for key in sorted(outputs, key=str) for array in flat(outputs[key])]
    if isinstance(outputs, list | tuple):
        return [array for output in outputs for array in flat(output)]
    return [] if outputs is None else [np.asarray(outputs)]
