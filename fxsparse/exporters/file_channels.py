"""Channels of an ONNX graph that no output needs, or that are constant: found by index arithmetic, then removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fxsparse.exporters.file_graph import Array, add_constant, fixed, is_outer, remove_unused, sizes, title
from fxsparse.exporters.file_tables import Table, counts, uneven
from fxsparse.graph.channels_atoms import FIXED, Atoms, Labels

Keep = Callable[[Labels], Array]
Edit = Callable[[Keep], None]


@dataclass(frozen=True, eq=False)
class Track:
    """The channels of a value.

    Attributes:
        axis: where they lie.
        labels: the atom of each; equal atoms go together, `FIXED` stays.
        known: the number that a channel holds at all positions and for all inputs; NaN where it varies.
    """

    axis: int
    labels: Labels
    known: Array

    @property
    def size(self) -> int:
        """Number of channels."""
        return int(self.labels.size)


@dataclass(frozen=True, eq=False)
class Product:
    """A product with a constant weight: what it reads.

    Attributes:
        node: the operator.
        reads: whether an output has a weight for an input, bool [outputs, inputs].
        inputs: atoms of its inputs.
        known: constants of its inputs that a bias can take over; NaN for others.
        outputs: atoms of its outputs.
    """

    node: ir.Node
    reads: Array
    inputs: Labels
    known: Array
    outputs: Labels


@dataclass(frozen=True, eq=False)
class Stop:
    """An operator that keeps channels from being removed.

    Attributes:
        what: its name.
        reason: why.
        held: channels that are constant and yet stay.
    """

    what: str
    reason: str
    held: int

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}; {self.held} constant channels stay"


@dataclass(frozen=True)
class Removal:
    """What was removed.

    Attributes:
        weights: shapes before and after, by the name of the weight.
        channels: number of channels that went from the graph.
        stops: the operators that hold channels.
        ragged: whether a convolution's channels were a multiple of 8 and are none any more.
    """

    weights: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    channels: int
    stops: tuple[Stop, ...]
    ragged: bool = False


class Channels:
    """The channels of all values of a main graph while they are found.

    Rules (`file_rules`) call `follow`, `freeze`, `multiply` and `edit` for each node, in the order of the graph.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph
        self.atoms = Atoms()
        self.tracks: dict[ir.Value, Track] = {}
        self.tables: dict[ir.Value, Table] = {}  # of values with channels along several axes
        self.ties: list[tuple[Labels, Labels]] = []  # a head goes exactly when all entries of its row go
        self.rigid: list[Labels] = []  # no row of these goes as a whole
        self.products: list[Product] = []
        self.stops: list[Stop] = []
        self.edits: list[Edit] = []
        self.resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def fresh(self, value: ir.Value, axis: int, size: int, known: Array | None = None) -> Labels:
        """New channels of a value."""
        labels = self.atoms.fresh(size)
        self.follow(value, axis, labels, known)
        return labels

    def follow(self, value: ir.Value, axis: int, labels: Labels, known: Array | None = None) -> None:
        """Say which channels a value has."""
        found = np.full(labels.size, np.nan) if known is None else np.asarray(known, np.float64)
        self.tracks[value] = Track(axis, labels, np.where(np.isfinite(found), found, np.nan))

    def table(self, value: ir.Value | None) -> Table | None:
        """The channels of a value, along however many axes."""
        track = self.tracks.get(value) if value is not None else None
        if track is not None:
            return Table((track.axis,), track.labels, track.known)
        return self.tables.get(value) if value is not None else None

    def followed(self) -> list[Track | Table]:
        """The channels of all values."""
        return [*self.tracks.values(), *self.tables.values()]

    def tabulate(self, value: ir.Value, table: Table) -> None:
        """Say which channels a value has along several axes."""
        table = table.varying()
        if len(table.axes) == 1 and not table.tiled:
            self.follow(value, table.axes[0], table.labels, table.known)
        else:
            self.tables[value] = table.holding(np.where(np.isfinite(table.known), table.known, np.nan))

    def bind(self, table: Table, axis: int) -> Table:
        """The entries along an axis go together, so that its size and order stay."""
        at = table.place(axis)
        if len(table.axes) == 1:
            self.hold(table.labels)
        elif at >= 0:
            first = np.broadcast_to(table.labels.take([0], axis=at), table.labels.shape)
            self.atoms.unite(first.reshape(-1), table.labels.reshape(-1))
        return table

    def hold(self, labels: Labels) -> None:
        """These stay."""
        flat = labels.reshape(-1)
        self.atoms.unite(flat, np.zeros_like(flat))

    def freeze(self, node: ir.Node, value: ir.Value | None, reason: str) -> None:
        """An operator needs all channels of a value."""
        track = self.table(value)
        held = 0
        if track is not None:
            self.hold(track.labels)
            held = int(np.isfinite(track.known).sum())
        if held:
            self.stops.append(Stop(title(node), reason, held))

    def multiply(self, node: ir.Node, reads: Array, inputs: Labels, known: Array, outputs: Labels) -> None:
        """A product with a constant weight; see `Product`."""
        self.products.append(Product(node, reads, inputs, known, outputs))

    def cut(self, node: ir.Node, index: int, axis: int, labels: Labels) -> None:
        """A constant operand holds one entry for each channel along an axis."""
        self.edit(lambda keep: self._cut(node, index, axis, labels, keep))

    def edit(self, change: Edit) -> None:
        """What to do once it is known which channels stay."""
        self.edits.append(change)

    def replace(self, node: ir.Node, index: int, array: Array) -> None:
        """Give a node another constant operand."""
        value = node.inputs[index]
        like = (value.name if value is not None else None) or f"{node.outputs[0].name}_operand"
        node.replace_input_with(index, add_constant(self.graph, like, array))

    def _cut(self, node: ir.Node, index: int, axis: int, labels: Labels, keep: Keep) -> None:
        kept = keep(labels)
        value = node.inputs[index]
        array = fixed(value)
        if kept.size == labels.size or array is None or value is None:
            return
        made = array.take(kept, axis=axis)
        if array.ndim > 1 and value.name:
            name = value.name
            while name.rpartition("_")[0] in self.resized and name not in self.resized:
                name = name.rpartition("_")[0]
            self.resized[name] = (self.resized.get(name, (array.shape, ()))[0], made.shape)
        self.replace(node, index, made)


def remove_channels(model: ir.Model, multiple: int = 1) -> Removal:
    """Remove the channels of the main graph that nothing needs; what the graph computes stays.

    A channel goes when every product that reads it has no weight for it, or it is a constant that the product's bias
    takes over, and no other operator asks for it. Constants come from rows of zeros and are carried through the
    operators in between. Zero padding does not meet constants other than zero. Inputs are taken to be finite.

    Args:
        model: changed in place.
        multiple: the channels of a convolution that are a multiple of this stay one.
    """
    from fxsparse.exporters.file_rules import apply_rule

    channels = Channels(model)
    for node in model.graph:
        if is_outer(node):
            continue
        apply_rule(channels, node)
    _hold_outer(channels)
    gone = _solve(channels, multiple)
    if not gone.any():
        return Removal({}, 0, tuple(channels.stops))
    classes = channels.atoms.classes()

    def keep(labels: Labels) -> Array:
        return np.flatnonzero(~gone[classes[labels]])

    # every value's sizes are read by edits, so they change last
    for edit in channels.edits:
        edit(keep)
    removed = 0
    makers = {product.node for product in channels.products}
    for value, track in channels.tracks.items():
        left = int(keep(track.labels).size)
        found = sizes(value)
        if left < track.size and found is not None:
            found[track.axis] = left
            value.shape = ir.Shape(found)
            removed += track.size - left if value.producer() in makers else 0
    for value, table in channels.tables.items():
        found = sizes(value)
        if found is not None:
            for axis, size in zip(table.axes, counts(~gone[classes[table.labels]]), strict=True):
                found[axis] = None if axis in table.tiled else size
            value.shape = ir.Shape(found)
    remove_unused(model.graph)
    ragged = any(_ragged(product, gone[classes[product.outputs]], 8) for product in channels.products)
    return Removal(channels.resized, removed, tuple(channels.stops), ragged)


def _ragged(product: Product, gone: Array, multiple: int) -> int:
    """How many channels of a convolution are to come back so that those that stay are a multiple, as all were."""
    if product.node.op_type != "Conv" or gone.size % multiple:
        return 0
    return int(gone.sum() % multiple)


def _hold_outer(channels: Channels) -> None:
    """Outputs of the graph, and what nested graphs read, stay as they are."""
    for value in (*channels.tracks, *channels.tables):
        track = channels.table(value)
        if value.is_graph_output() and track is not None:
            channels.hold(track.labels)
        for node, _ in value.uses():
            if node.graph is not channels.graph:
                channels.freeze(node, value, "is in a nested graph, which is left as it is")
    for node in channels.graph:
        if is_outer(node):
            for operand in node.inputs:
                channels.freeze(node, operand, "has nested graphs, which are left as they are")


def _solve(channels: Channels, multiple: int = 1) -> Array:
    """The largest set of classes that can go together, as a bool for every class."""
    classes = channels.atoms.classes()
    gone = np.ones(channels.atoms.count, bool)
    gone[FIXED] = False
    while _put_back(channels, classes, gone) or _put_back_blocks(channels, classes, gone, multiple):
        pass
    present = np.zeros_like(gone)
    for followed in channels.followed():
        present[classes[followed.labels]] = True
    return gone & present


def _put_back(channels: Channels, classes: Labels, gone: Array) -> bool:
    """Take out of `gone` what has to stay; whether there was any.

    1. What is read, heads whose rows stay, and an entry of rows whose heads stay.
    2. When these are all: an entry of every row that is picked by its place, and of every axis that would be empty.
    3. As many entries in every row of a table.
    """
    before = int(gone.sum())
    for product in reversed(channels.products):
        inputs, outputs = classes[product.inputs], classes[product.outputs]
        going = np.flatnonzero(gone[inputs] & ~np.isfinite(product.known))
        if going.size:
            read = product.reads[~gone[outputs]][:, going].any(axis=0)
            gone[inputs[going[read]]] = False
    for heads, rows in channels.ties:
        mine, theirs = classes[heads], classes[rows].reshape(heads.size, -1)
        there = ~gone[theirs].all(axis=1)
        gone[theirs[~gone[mine] & ~there, 0]] = False
        gone[mine[there]] = False
    if int(gone.sum()) < before:
        return True
    for rows in channels.rigid:
        mine = classes[rows].reshape(rows.shape[0], -1)
        gone[mine[gone[mine].all(axis=1), 0]] = False
    for followed in channels.followed():
        mine = classes[followed.labels]
        if mine.size and gone[mine].all():
            gone[mine.min()] = False
    for table in channels.tables.values():
        mine = classes[table.labels]
        for place in uneven(gone[mine]):
            gone[mine[place]] = False
    return int(gone.sum()) < before


def _put_back_blocks(channels: Channels, classes: Labels, gone: Array, multiple: int) -> bool:
    """Take channels out of `gone` so that convolutions keep a multiple of them; whether there were any."""
    before = int(gone.sum())
    for product in channels.products if multiple > 1 else ():
        outputs = classes[product.outputs]
        for _ in range(_ragged(product, gone[outputs], multiple)):
            gone[outputs[np.flatnonzero(gone[outputs])[-1]]] = False
    return int(gone.sum()) < before
