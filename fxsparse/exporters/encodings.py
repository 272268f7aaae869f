"""How weights are stored: each once, sparse initializers for a small file, 2:4 zeros for TensorRT."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fxsparse.nn import MaskedWeight

_INDEX = 8  # bytes of the int64 index of each stored value
_OVERHEAD = 64  # bytes of names and shapes that a sparse tensor has and a dense one has not
_SMALLEST = 1024


def store_sparse(proto: Any) -> tuple[str, ...]:
    """Store initializers by value and index of their alive entries, where that is smaller; the names of those.

    onnxruntime makes them dense when it loads the file: the file is smaller, a call is not faster.
    """
    from onnx import helper, numpy_helper

    graph = proto.graph
    kept, done = [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor) if not tensor.external_data else None
        found = None if values is None or values.nbytes < _SMALLEST else _alive(values)
        if found is None:
            kept.append(tensor)
            continue
        entries, indices = found
        graph.sparse_initializer.append(
            helper.make_sparse_tensor(
                numpy_helper.from_array(entries, tensor.name), numpy_helper.from_array(indices), list(tensor.dims)
            )
        )
        done.append(tensor.name)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return tuple(done)


def _alive(values: Any) -> tuple[Any, Any] | None:
    """Values and flat positions of what is not +0; None where they take more room than the dense array."""
    if values.dtype.kind != "f":
        return None
    flat = np.ascontiguousarray(values).reshape(-1)
    indices = np.flatnonzero((flat != 0) | np.signbit(flat)).astype(np.int64)
    if len(indices) * (_INDEX + values.itemsize) + _OVERHEAD >= values.nbytes or not len(indices):
        return None
    return flat[indices], indices


def is_two_four(weight: MaskedWeight) -> bool:
    """Whether of every four consecutive inputs of each output at most two are alive, which TensorRT can use.

    The inputs are those of the weight's layout; their number must be a multiple of four.
    """
    if weight.mask.ndim < 2:
        return False
    rows = weight.spec.layout.to_rows(weight.mask)  # [outputs, inputs, kernel]
    outputs, inputs, kernel = rows.shape
    if inputs % 4:
        return False
    counts = rows.reshape(outputs, inputs // 4, 4, kernel).to(torch.int8).sum(2)
    return bool((counts <= 2).all())


def store_once(model: Any) -> int:
    """Leave one copy of initializers that are equal, or equal when transposed; how many copies went.

    A transposed copy becomes a Transpose of the one that stays, which runtimes carry out when they load the file.

    Args:
        model: an `onnx_ir.Model`, changed in place.
    """
    import onnx_ir

    graph = model.graph
    kept: dict[Any, Any] = {}
    turned: dict[Any, Any] = {}
    gone = 0
    for name, value in list(graph.initializers.items()):
        array = value.const_value.numpy()
        if array.nbytes < _SMALLEST or value.is_graph_output():
            continue
        first = kept.setdefault(_fingerprint(array), value)
        if first is not value:
            copy = first
        elif _may_be_turned(array, kept) and _fingerprint(array.T) in kept:
            copy = _turned(graph, kept[_fingerprint(array.T)], turned, onnx_ir)
            kept.pop(_fingerprint(array))
        else:
            continue
        onnx_ir.convenience.replace_all_uses_with(value, copy)
        del graph.initializers[name]
        gone += 1
    return gone


def _may_be_turned(array: Any, kept: Mapping[Any, Any]) -> bool:
    return array.ndim == 2 and array.shape[0] != array.shape[1] and any(key[1] == array.shape[::-1] for key in kept)


def _turned(graph: Any, value: Any, known: dict[Any, Any], onnx_ir: Any) -> Any:
    """The output of one Transpose of an initializer, at the start of the graph."""
    if value.name not in known:
        node = onnx_ir.node("Transpose", inputs=[value], attributes={"perm": [1, 0]})
        node.outputs[0].name = f"{value.name}_turned"
        node.outputs[0].dtype = value.dtype
        node.outputs[0].shape = onnx_ir.Shape(value.const_value.shape[::-1])
        graph.insert_before(graph[0], node)
        known[value.name] = node.outputs[0]
    return known[value.name]


def _fingerprint(array: Any) -> Any:
    return array.dtype.str, array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
