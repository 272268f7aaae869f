"""Shared supports in the weights of an ONNX graph: groups of rows that are alive on few columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_graph import ONNX, Array, fixed, integer, integers, sizes, text

Key = tuple[int, int, int, bool, bool]
SMALLEST, LARGEST = 8, 256  # rows of a group
_WIDEST = 0.75  # columns of a group over the inputs
_FILLED = 1.5  # rows with those that fill groups, over the rows of the weight


@dataclass(frozen=True, eq=False)
class Layer:
    """A product with a constant weight, seen as a matrix.

    Attributes:
        node: the operator.
        weight: name of its initializer.
        alive: which inputs a row has a weight for, bool [rows, inputs]; of a convolution its channels, of one group.
        parts: groups that the convolution has already; 1 elsewhere. Part i has the rows and inputs number i.
        bias: a constant for each row that is added to the product.
        adder: the Add that does so, where the product does not itself.
    """

    node: ir.Node
    weight: str
    alive: Array
    parts: int = 1
    bias: ir.Value | None = None
    adder: ir.Node | None = None

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution."""
        return self.node.op_type == "Conv"

    @property
    def result(self) -> ir.Value:
        """The product with its bias."""
        return (self.adder or self.node).outputs[0]

    @property
    def density(self) -> float:
        """Alive fraction of the matrix."""
        return float(self.alive.mean()) if self.alive.size else 1.0


@dataclass(frozen=True, eq=False)
class Support:
    """Rows in groups of equal size, each with the columns that it needs.

    Attributes:
        rows: the rows of each group, [groups, group]; -1 fills a group that has fewer.
        columns: the columns of each group, [groups, k]; column 0 of the part fills one that has fewer.
        real: which of the columns are needed, bool [groups, k].
        as_conv: whether the product becomes a grouped convolution, else a batched MatMul.
        inside: whether the bias is one more column, which meets an input of ones, instead of an addition.
    """

    rows: Array
    columns: Array
    real: Array
    as_conv: bool = False
    inside: bool = False

    @property
    def group(self) -> int:
        """Rows of a group."""
        return int(self.rows.shape[1])

    @property
    def k(self) -> int:
        """Columns of a group."""
        return int(self.columns.shape[1])

    @property
    def key(self) -> Key:
        """Names a support among those of one layer: groups, rows and columns of a group, and its form."""
        return self.rows.shape[0], self.group, self.k, self.as_conv, self.inside

    @property
    def places(self) -> Array | None:
        """Where the rows of the weight lie among those of all groups; None where they are in their order."""
        flat = self.rows.reshape(-1)
        if flat.size and (flat == np.arange(flat.size)).all():
            return None
        at = np.flatnonzero(flat >= 0)
        places = np.empty(at.size, np.int64)
        places[flat[at]] = at
        return places


def layer_of(node: ir.Node) -> Layer | None:
    """The matrix of a product whose second operand is constant; None for other nodes, named reasons aside."""
    if node.domain not in ONNX or node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
        return None
    value = node.inputs[1]
    weight = fixed(value)
    if weight is None or value is None or weight.dtype.kind != "f" or not weight.size:
        return None
    name = value.name or ""
    if node.op_type == "MatMul":
        rank = len(sizes(node.inputs[0]) or ())
        if weight.ndim != 2 or rank < 2:
            return None
        return Layer(node, name, (weight != 0).T, 1, *_added(node, weight.shape[1], rank))
    held = node.inputs[2] if len(node.inputs) > 2 else None
    bias = fixed(held) if held is not None else np.zeros(1)
    if bias is None:
        return None
    if node.op_type == "Gemm":
        scaled = node.attributes.get_float("alpha", 1.0) != 1.0 or node.attributes.get_float("beta", 1.0) != 1.0
        if scaled or integer(node, "transA", 0) or (bias.ndim > 1 and bias.shape[0] != 1):
            return None
        return Layer(node, name, (weight != 0) if integer(node, "transB", 0) else (weight != 0).T, bias=held)
    alive = (weight != 0).reshape(*weight.shape[:2], -1).any(axis=2)
    return Layer(node, name, alive, integer(node, "group", 1), held)


def _added(node: ir.Node, rows: int, rank: int) -> tuple[ir.Value | None, ir.Node | None]:
    """The constant that the only reader of a product adds to each of its rows."""
    out = node.outputs[0]
    uses = [] if out.is_graph_output() else list(out.uses())
    if len(uses) != 1 or uses[0][0].op_type != "Add" or uses[0][0].domain not in ONNX:
        return None, None
    adder = uses[0][0]
    other = adder.inputs[1 - uses[0][1]]
    array = fixed(other)
    if array is None or array.ndim > rank or array.size != rows or array.shape[-1:] != (rows,):
        return None, None
    return other, adder


def supports_of(layer: Layer) -> list[Support]:
    """Ways to group the rows, a few of them.

    1. Groups of one size that divides the rows of a part, 8 to 256, in their order.
    2. Runs of rows that are alive on nearly the same columns; groups as large as the longest, or as a power of two.
    3. The same with equal rows sorted together, where they lie apart.
    """
    rows, width = layer.alive.shape
    if not 0 < layer.density <= _WIDEST or width < 2 or rows // layer.parts < SMALLEST:
        return []  # a group has as many columns as its rows have on average, or more
    found = _even(layer)
    if layer.parts == 1:
        found += _uneven(layer, np.arange(rows), _runs(layer.alive))
        order = _sorted(layer.alive)
        if order is not None and (np.diff(order) != 1).any():
            found += _uneven(layer, order, _runs(layer.alive[order]))
    first: dict[Key, Support] = {}
    for support in found:
        first.setdefault(support.key, support)
    return [replace(support, as_conv=layer.is_conv) for support in first.values()]


def forms_of(layer: Layer, support: Support) -> list[Support]:
    """The same groups in every form that is legal.

    onnxruntime has no convolution of float64 numbers. With an offset beside the first or with padding a channel of ones
    would not be met everywhere.
    """
    dtype = _dtype(layer)
    made = [support]
    if layer.bias is not None and dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        made += [replace(support, inside=True)] if not layer.is_conv or _is_single(layer.node) else []
    if not layer.is_conv and dtype == ir.DataType.FLOAT:
        made.append(replace(support, as_conv=True))
    return made


def _dtype(layer: Layer) -> ir.DataType | None:
    value = layer.node.inputs[1] if len(layer.node.inputs) > 1 else None
    return value.dtype if value is not None else None


def _is_single(node: ir.Node) -> bool:
    """Whether a convolution reads single pixels, all of them of its input."""
    kernel = (sizes(node.inputs[1]) or [])[2:]
    padded = text(node, "auto_pad", "NOTSET") == "NOTSET" and any(integers(node, "pads") or [])
    return all(size == 1 for size in kernel) and not padded


def _even(layer: Layer) -> list[Support]:
    rows, width = layer.alive.shape
    part = rows // layer.parts
    made: list[Support] = []
    for group in range(min(LARGEST, part), SMALLEST - 1, -1):
        if part % group:
            continue
        needed: Array = np.asarray(layer.alive.reshape(rows // group, group, width).any(axis=1))
        k = max(1, int(needed.sum(axis=1).max()))
        if made and k >= made[-1].k:
            continue  # larger groups do as well
        if k <= _WIDEST * width:
            made.append(_support(np.arange(rows).reshape(-1, group), needed, layer.parts))
    return made


def _uneven(layer: Layer, order: Array, starts: Array) -> list[Support]:
    """Groups that start at `starts` in the order of the rows, cut and filled to one size."""
    rows, alive = order.size, layer.alive[order]
    lengths = np.diff(np.append(starts, rows))
    if lengths.mean() < SMALLEST:
        return []
    made = []
    for group in sorted({int(lengths.max()), *(2**power for power in range(3, 9))}):
        pieces = [
            order[start + at : start + min(at + group, length)]
            for start, length in zip(starts, lengths, strict=True)
            for at in range(0, length, group)
        ]
        if not SMALLEST <= group <= LARGEST or len(pieces) * group > _FILLED * rows:
            continue
        table = np.full((len(pieces), group), -1, np.int64)
        for place, piece in zip(table, pieces, strict=True):
            place[: piece.size] = piece
        ends = np.cumsum([piece.size for piece in pieces])[:-1]
        needed = np.logical_or.reduceat(alive, np.concatenate([[0], ends]), axis=0)
        if needed.sum(axis=1).max() <= _WIDEST * alive.shape[1]:
            made.append(_support(table, needed, 1))
    return made


def _runs(alive: Array) -> Array:
    """Where runs of rows start that are alive on nearly the same columns."""
    starts = [0]
    held = alive[0].copy()
    for index, row in enumerate(alive[1:], 1):
        new, missing = int((row & ~held).sum()), int((held & ~row).sum())
        if row.any() and (new > 0.05 * held.sum() or missing > 0.2 * held.sum()):
            starts.append(index)
            held = row.copy()
        else:
            held |= row
    return np.asarray(starts)


def _support(rows: Array, needed: Array, parts: int) -> Support:
    groups, width = needed.shape
    k = max(1, int(needed.sum(axis=1).max()))
    columns = np.argsort(~needed, axis=1, kind="stable")[:, :k]
    real = np.take_along_axis(needed, columns, axis=1)
    columns = np.where(real, columns, 0) + width * (np.arange(groups) // (groups // parts))[:, None]
    return Support(rows, columns.astype(np.int64), real)


def _sorted(alive: Array) -> Array | None:
    """The rows with equal ones together; None where there are nearly as many kinds of rows as rows."""
    packed = np.packbits(alive, axis=1)
    _, kind = np.unique(packed, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    if kind.max() + 1 > alive.shape[0] // SMALLEST:
        return None
    first = np.full(kind.max() + 1, alive.shape[0])
    np.minimum.at(first, kind, np.arange(alive.shape[0]))
    return np.argsort(first[kind], kind="stable")
