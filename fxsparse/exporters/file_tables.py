"""Channels that lie along several axes of one value: heads and their entries, say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fxsparse.exporters.file_graph import Array
from fxsparse.graph.channels_atoms import Labels


@dataclass(frozen=True, eq=False)
class Table:
    """The channels of a value along one or more axes.

    What goes leaves a block: equal numbers of entries in every row that stays, though not the same ones.

    Attributes:
        axes: the axis of the value for each of the table, the outermost of the table first.
        labels: the atom of each entry.
        known: the number that an entry holds at all positions and for all inputs; NaN where it varies.
        tiled: axes of the value that repeat their channels an unknown number of times (a batch merged with heads).
    """

    axes: tuple[int, ...]
    labels: Labels
    known: Array
    tiled: frozenset[int] = frozenset()

    def place(self, axis: int) -> int:
        """The axis of the table that lies at an axis of the value; -1 where there is none."""
        return self.axes.index(axis) if axis in self.axes else -1

    def size(self, axis: int) -> int:
        """Entries along an axis of the value, 1 where it is not followed."""
        return int(self.labels.shape[self.place(axis)]) if axis in self.axes else 1

    def moved(self, where: Callable[[int], int]) -> Table:
        """The same at other axes of a value."""
        axes = tuple(where(axis) for axis in self.axes)
        return Table(axes, self.labels, self.known, frozenset(where(axis) for axis in self.tiled))

    def holding(self, known: Array | None = None) -> Table:
        """The same with other constants; none where they are not given."""
        return Table(self.axes, self.labels, np.full(self.labels.shape, np.nan) if known is None else known, self.tiled)

    def first(self, axis: int) -> Table:
        """The first entries along one of several axes."""
        at = self.place(axis)
        axes = self.axes[:at] + self.axes[at + 1 :]
        return Table(axes, np.asarray(self.labels.take(0, axis=at)), self.known.take(0, axis=at), self.tiled - {axis})

    def without(self, axis: int) -> Table:
        """The same without one of several axes, whose entries go together."""
        return self.first(axis).holding()

    def varying(self) -> Table:
        """The same without axes along which all labels are equal; one axis stays."""
        axes, labels, known = list(self.axes), self.labels, self.known
        for at in reversed(range(labels.ndim)):
            first = labels.take([0], axis=at)
            alike = labels.shape[at] == 1 or bool((labels == first).all())
            if not alike or len(axes) == 1 or axes[at] in self.tiled:
                continue
            same = (known == known.take([0], axis=at)).all(axis=at)
            known = np.where(same, known.take(0, axis=at), np.nan)
            labels = np.asarray(labels.take(0, axis=at))
            del axes[at]
        return Table(tuple(axes), labels, known, self.tiled)


def counts(kept: Array) -> tuple[int, ...]:
    """Entries that stay along each axis of a table, the whole of which is `kept`, a bool of its shape."""
    found = []
    for at in range(kept.ndim):
        rows = np.asarray(kept.reshape(*kept.shape[: at + 1], -1).any(axis=-1))
        found.append(int(rows.sum(axis=-1).max(initial=0)))
    return tuple(found)


def uneven(gone: Array) -> Iterator[tuple[int, ...]]:
    """Entries to put back so that every row of a table keeps as many as the others, level by level.

    Args:
        gone: what goes, a bool of the table's shape.
    """
    kept = ~gone
    for at in range(kept.ndim):
        rows = np.asarray(kept.reshape(*kept.shape[: at + 1], -1).any(axis=-1))
        number = rows.sum(axis=-1)
        short = np.argwhere((number > 0) & (number < number.max(initial=0)))
        for place in short:
            row = tuple(int(i) for i in place)
            missing = int(number.max()) - int(number[row])
            for index in np.flatnonzero(~rows[row])[:missing]:
                yield (*row, int(index), *(0,) * (kept.ndim - at - 1))
        if short.size:
            return
