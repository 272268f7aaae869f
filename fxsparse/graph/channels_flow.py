"""The labels of all values of an operator graph while they are found, and what is read off an operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from fxsparse.graph.channels_atoms import Atoms, Barrier, Dims, Labels


@dataclass(frozen=True, eq=False)
class Mixing:
    """An operator that reads all channels of a dimension together (a sum, a norm, a softmax).

    Without the removed ones its result differs, unless it is a `sum` of zeros.
    """

    node: fx.Node
    labels: Labels
    kind: str
    operand: fx.Node


@dataclass(eq=False)
class Flow:
    """The labels of every value of an operator graph.

    Attributes:
        atoms: the labels' makers.
        dims: the labels of each node's dimensions; a list for a node that returns several tensors.
        mixings: where channels of one dimension are read together.
        barriers: what froze channels.
        idle: whether the values in question are read by nobody: what happens to them is no concern.
        open_norms: paths of layers whose layer norm can lose features that are zero (mixings of kind "layer_norm").
        aligned: dimensions whose size must stay a multiple of a number.
    """

    atoms: Atoms = field(default_factory=Atoms)
    dims: dict[fx.Node, Any] = field(default_factory=dict)
    mixings: list[Mixing] = field(default_factory=list)
    barriers: list[Barrier] = field(default_factory=list)
    idle: bool = False
    open_norms: frozenset[str] = frozenset()
    aligned: list[tuple[Labels, int]] = field(default_factory=list)
    _stated: set[int] = field(default_factory=set)  # the first atoms of stated sizes

    def of(self, node: Any) -> Dims:
        """The labels of a tensor argument; none for numbers."""
        if not isinstance(node, fx.Node):
            return ()
        found = self.dims.get(node, ())
        return found if isinstance(found, tuple) else ()

    def freeze(self, node: fx.Node, labels: Labels | None, reason: str) -> None:
        """`node` keeps these channels from being removed."""
        barrier = Barrier(node.name, op_of(node), str(node.meta.get("path", "")), reason)
        if labels is None or self.idle or not self.atoms.freeze(labels, barrier):
            return
        if int(labels[0]) not in self._stated:  # nobody misses the freedom of a size that was only stated
            self.barriers.append(barrier)

    def made(self, size: int) -> Labels:
        """Labels of a dimension whose size is stated, and would follow those that it meets."""
        labels = self.atoms.fresh(size)
        self._stated.add(int(labels[0]))
        return labels

    def fix(self, labels: Labels | None) -> None:
        """These are no channels (kernel taps): fixed, without a word."""
        if labels is not None:
            self.atoms.unite(labels, np.zeros_like(labels))

    def mix(self, node: fx.Node, labels: Labels | None, kind: str, operand: fx.Node) -> None:
        """`node` reads these channels together."""
        if labels is not None and labels.any() and not self.idle:
            self.mixings.append(Mixing(node, labels, kind, operand))

    def unite(self, node: fx.Node, a: Labels | None, b: Labels | None) -> Labels | None:
        """Two dimensions of equal size whose indices go together; a fixed one fixes the other."""
        if a is None or b is None:
            meeting = b if a is None else a
            if self.idle:  # nobody reads it, but it runs
                self.fix(meeting)
            else:
                self.freeze(node, meeting, "meets a dimension of fixed size")
            return None
        if a.size != b.size:
            raise ValueError(f"{a.size} channels meet {b.size}")
        self.atoms.unite(a, b)
        return a

    def broadcast(self, node: fx.Node, operands: Sequence[fx.Node], shape: Sequence[int]) -> Dims:
        """Elementwise operands, aligned at the right, to a result of `shape`."""
        result: list[Labels | None] = []
        for axis, size in enumerate(shape):
            held: list[Labels | None] = []
            for operand in operands:
                own = shape_of(operand)
                place = axis - (len(shape) - len(own))
                if place < 0:
                    continue
                labels = self.of(operand)[place]
                if own[place] == size:
                    held.append(labels)
                else:
                    self.freeze(node, labels, "is repeated along another dimension")
            result.append(self._common(node, held))
        return tuple(result)

    def _common(self, node: fx.Node, held: Sequence[Labels | None]) -> Labels | None:
        if not held:
            return None
        first = held[0]
        for labels in held[1:]:
            first = self.unite(node, first, labels)
        return first

    def reshape(self, node: fx.Node, source: fx.Node, shape: Sequence[int]) -> Dims:
        """The same elements in the same order, in another shape."""
        before, dims = shape_of(source), self.of(source)
        result: list[Labels | None] = []
        for old, new in factor_groups(before, shape):
            sizes = [before[axis] for axis in old]
            if len(old) > 1:
                for axis in old:
                    if before[axis] == 1:
                        self.freeze(node, dims[axis], "is a channel of its own that is folded into another dimension")
            target = [shape[axis] for axis in new]
            if not new:
                for axis in old:
                    self.freeze(node, dims[axis], "is squeezed away")
                continue
            merged = self.atoms.merge([dims[axis] for axis in old], sizes) if old else None
            result.extend(self.atoms.split(merged, target))
        return tuple(result)


def factor_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of two shapes with equal products, as short as possible, in order."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old: list[int] = []
        new: list[int] = []
        if i < len(before) and j < len(after) and before[i] == after[j]:
            groups.append(([i], [j]))
            i, j = i + 1, j + 1
            continue
        if i < len(before) and before[i] == 1:
            groups.append(([i], []))
            i += 1
            continue
        if j < len(after) and after[j] == 1:
            groups.append(([], [j]))
            j += 1
            continue
        left = right = 1
        while left != right or not old or not new:
            if not old or (left < right and i < len(before)):
                left *= before[i]
                old.append(i)
                i += 1
            elif j < len(after):
                right *= after[j]
                new.append(j)
                j += 1
            else:
                left *= before[i]
                old.append(i)
                i += 1
        groups.append((old, new))
    return groups


def op_of(node: fx.Node) -> str:
    """The plain name of an operator: ``relu`` for ``aten.relu_.default``."""
    if node.op != "call_function":
        return node.op
    name = getattr(node.target, "_schema", None)
    if name is None:
        return getattr(node.target, "__name__", str(node.target))
    plain = str(name.name).split("::")[-1]
    return plain[:-1] if plain.endswith("_") and not plain.endswith("__") else plain


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a tensor node."""
    shape = node.meta.get("shape")
    return () if shape is None else shape


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]  # called for operators only
    values: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value if argument.has_default_value() else None
    return values


def tensor_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensor nodes among the arguments, in order."""
    found: list[fx.Node] = []

    def visit(argument: fx.Node) -> fx.Node:
        found.append(argument)
        return argument

    fx.node.map_arg((node.args, node.kwargs), visit)
    return [each for each in found if each.meta.get("shape") is not None]


def axes_of(dim: Any, rank: int) -> list[int]:
    """Axes as a list of non-negative ints; None means all."""
    if dim is None or dim == []:
        return list(range(rank))
    dims = dim if isinstance(dim, list | tuple) else [dim]
    return [int(d) % rank for d in dims] if rank else []
