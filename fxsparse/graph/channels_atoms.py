"""Atoms: one label for every index of every dimension, united where indices must live or die together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
"""The atoms of the indices of one dimension, in order."""
Dims = tuple[Labels | None, ...]
"""The labels of a value's dimensions; None = a dimension of fixed size, which nothing can shorten."""
FIXED = 0
"""The atom of everything that cannot be removed."""


@dataclass(frozen=True)
class Barrier:
    """What keeps channels from being removed: a node, its operator, the module that ran it, and why."""

    node: str
    op: str
    path: str
    reason: str

    def __str__(self) -> str:
        where = f"`{self.path}`" if self.path else "the model"
        return f"{self.op} in {where}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Relation:
    """A dimension that is the product of others: entry (i, j, ...) of `flat` goes exactly when one of its factors goes.

    Attributes:
        flat: the atoms of the product, shaped like it.
        factors: the atoms of each axis; None = an axis of fixed size.
    """

    flat: Labels
    factors: tuple[Labels | None, ...]


class Atoms:
    """Makes atoms, unites and freezes them; equalities are resolved at once in `classes`."""

    def __init__(self) -> None:
        self.count = 1
        self.relations: list[Relation] = []
        self.frozen: list[tuple[Labels, Barrier]] = []
        self._pairs: list[tuple[Labels, Labels]] = []
        self._split: dict[tuple[int, tuple[int, ...]], Relation] = {}
        self._merged: dict[tuple[int, ...], Relation] = {}
        self._whole: dict[Relation, Labels] = {}  # the very array that was split or made, one dimension

    def fresh(self, size: int) -> Labels:
        """New atoms."""
        made = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return made

    def unite(self, a: Labels, b: Labels) -> None:
        """Index i of one and index i of the other are the same channel."""
        if a is not b:
            self._pairs.append((a, b))

    def freeze(self, labels: Labels | None, barrier: Barrier) -> bool:
        """These channels cannot be removed; returns whether there was anything to freeze."""
        if labels is None or not labels.any():
            return False
        self.frozen.append((labels, barrier))
        return True

    def split(self, labels: Labels | None, shape: Sequence[int]) -> Dims:
        """The dimensions of `shape` whose product, outermost first, is this dimension."""
        if labels is None:
            return (None,) * len(shape)
        if len(shape) == 1:
            return (labels,)
        table = labels.reshape(tuple(shape))
        varying = [axis for axis in range(table.ndim) if _varies(table, axis)]
        if len(varying) <= 1:
            if not varying:  # one channel, or none
                varying = [axis for axis in range(table.ndim) if table.shape[axis] == table.size][:1]
            return tuple(
                np.ascontiguousarray(np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)[:, 0])
                if axis in varying
                else None
                for axis in range(table.ndim)
            )
        key = (id(labels), tuple(shape))
        if key not in self._split:
            factors = tuple(self.fresh(n) if axis in varying else None for axis, n in enumerate(table.shape))
            self._relate(labels, Relation(table, factors))
        return self._split[key].factors

    def merge(self, factors: Sequence[Labels | None], shape: Sequence[int]) -> Labels | None:
        """The dimension that is the product of these, the outermost first."""
        varying = [axis for axis, labels in enumerate(factors) if labels is not None and shape[axis] > 1]
        if not varying:
            single = [labels for labels in factors if labels is not None]
            return single[0] if len(single) == 1 and int(np.prod(shape)) == 1 else None
        if len(varying) == 1:
            axis = varying[0]
            labels = factors[axis]
            assert labels is not None
            inner = int(np.prod(shape[axis + 1 :]))
            outer = int(np.prod(shape[:axis]))
            return labels if inner == outer == 1 else np.tile(np.repeat(labels, inner), outer)
        key = tuple(-1 if labels is None else id(labels) for labels in factors) + tuple(shape)
        if key not in self._merged:
            made = self.fresh(int(np.prod(shape)))
            self._relate(made, Relation(made.reshape(tuple(shape)), tuple(factors)))
        return self._whole[self._merged[key]]

    def _relate(self, labels: Labels, relation: Relation) -> None:
        shape = relation.flat.shape
        self.relations.append(relation)
        self._split[(id(labels), shape)] = relation
        self._merged[tuple(-1 if f is None else id(f) for f in relation.factors) + shape] = relation
        self._whole[relation] = labels

    def classes(self) -> Labels:
        """The class of every atom: its smallest atom; class `FIXED` is that of everything fixed."""
        parent = np.arange(self.count, dtype=np.int64)
        pairs = list(self._pairs)
        if pairs:
            a = np.concatenate([p for p, _ in pairs])
            b = np.concatenate([q for _, q in pairs])
            different = a != b
            a, b = a[different], b[different]
            while a.size:
                roots_a, roots_b = parent[a], parent[b]
                open_ = roots_a != roots_b
                a, b, roots_a, roots_b = a[open_], b[open_], roots_a[open_], roots_b[open_]
                np.minimum.at(parent, np.maximum(roots_a, roots_b), np.minimum(roots_a, roots_b))
                while True:
                    jumped = parent[parent]
                    if (jumped == parent).all():
                        break
                    parent = jumped
        return parent


def _varies(table: Labels, axis: int) -> bool:
    return table.shape[axis] > 1 and bool((table != table.take([0], axis=axis)).any())
