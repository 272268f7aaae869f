"""Which channels a model can lose exactly: the largest set such that nobody misses one of them.

A channel may go when every product behind it that is kept has zero weights for it, or when it is a constant that the
bias behind it can take. Both depend on what else goes, so the set is found by starting with everything and taking back
whatever is missed, until nothing more is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import fx

from fxsparse.graph.channels import Channels
from fxsparse.graph.channels_atoms import FIXED, Labels, Relation
from fxsparse.graph.channels_flow import op_of
from fxsparse.passes.compact_classes import Place, distinct_lists, even_tables, free_classes
from fxsparse.passes.compact_known import Known
from fxsparse.passes.compact_sinks import Bools, Floats, Sink, find_sinks

_SMALLEST = 1e-3  # a stand-in's constant relative to the largest of its kind: dividing by less costs digits


@dataclass(frozen=True)
class Blocked:
    """Channels that are constant, but stay: how many, behind which operator, and why."""

    channels: int
    node: str
    path: str
    reason: str

    def __str__(self) -> str:
        where = f"`{self.path}`" if self.path else "the model"
        return f"{self.channels} constant channels stay: each {self.reason} ({where})"


@dataclass(frozen=True, eq=False)
class Merge:
    """Constant inputs of one product whose weights are added, scaled, to those of one that stays.

    Attributes:
        weight: the parameter.
        axis: its dimension along which the inputs lie.
        target: the index of the one that stays.
        sources: the indices of those that go.
        factors: their constants relative to that of the one that stays.
        rows: the outputs that are meant, along dimension 0; None = all.
    """

    weight: str
    axis: int
    target: int
    sources: npt.NDArray[np.int64]
    factors: Floats
    rows: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Solution:
    """What can go.

    Attributes:
        removed: for every class of channels whether it goes.
        kept: the kept indices of each dimension that gets shorter.
        folds: what is added to a bias or mean, in float64, in its old length.
        merges: constant channels that went into another one, because no bias can take them.
        blocked: constant channels that stay.
        clusters: the places that must be shortened together.
        missed: where only some indices may go, the places that keep some of those, with what needs them.
    """

    removed: Bools
    kept: Mapping[Place, npt.NDArray[np.int64]]
    folds: Mapping[str, Floats]
    merges: tuple[Merge, ...]
    blocked: tuple[Blocked, ...]
    clusters: tuple[tuple[Place, ...], ...]
    sinks: list[Sink] = field(repr=False, default_factory=list)
    missed: Mapping[Place, str] = field(repr=False, default_factory=dict)


NOTHING = Solution(np.zeros(0, dtype=bool), {}, {}, (), (), ())
"""Nothing goes."""


class Solver:
    """Solves for one model; several times, where some places must be left alone.

    Args:
        channels: its channels.
        found: its constants.
        only: the only indices of dimensions that may go; None = all.
    """

    def __init__(
        self, channels: Channels, found: Mapping[fx.Node, Known], only: Mapping[Place, Sequence[int]] | None = None
    ) -> None:
        self.channels, self.only = channels, only
        self.free = free_classes(channels, only)
        self.missed: dict[int, str] = {}  # class -> what needs it
        through = ("sum",) if only is None else ("sum", "layer_norm")  # a norm is changed only where one was asked for
        self.sinks, self.meetings = find_sinks(channels, found, through)
        self.classes = channels.classes
        self.lists = distinct_lists(channels, self.classes)
        self.even = even_tables(channels, self.classes)

    def solve(self, excluded: Collection[Place] = ()) -> Solution:
        """The largest removable set that leaves the dimensions `excluded` whole."""
        removed = self.free.copy()
        self.missed.clear()
        for name, dim in excluded:
            labels = self.channels.sources[name][dim]
            if labels is not None:
                removed[self.classes[labels]] = False
        for meeting in self.meetings:
            needed = self.classes[meeting.labels[~meeting.harmless]]
            self._miss(needed[removed[needed]], meeting.node, meeting.reason)
            removed[needed] = False
        wished = removed.copy()
        self._settle(wished, anywhere=True)
        representatives: dict[int, int] = {}
        changed = True
        while changed:
            self._settle(removed)
            changed = self._represent(removed, representatives) or self._keep_one(removed)
        return self._solution(removed, representatives, wished)

    def _settle(self, removed: Bools, anywhere: bool = False) -> None:
        """Take back what is missed, until nothing more is; `anywhere` = as if every constant could be folded."""
        before = -1
        while before != (before := int(removed.sum())):
            for sink in reversed(self.sinks):
                self._take_back(sink, removed, anywhere)
            for relation in self.channels.relations:
                self._make_whole(relation, removed)

    def _keep_one(self, removed: Bools) -> bool:
        """Take back one channel of each dimension that would have none; whether there was one."""
        empty = [labels for labels in self.lists if removed[labels].all()]
        for labels in empty:
            removed[labels[0]] = False
        return bool(empty)

    def _take_back(self, sink: Sink, removed: Bools, anywhere: bool) -> None:
        inputs, outputs = self.classes[sink.inputs], self.classes[sink.outputs]
        missed = (sink.alive & ~removed[outputs][:, :, None]).any(1)
        constant = sink.known & ((sink.value == 0) | (not sink.blocked or sink.mergeable or anywhere))
        needed = inputs[missed & ~constant]
        self._miss(needed[removed[needed]], sink.node, "reads it by weights that are not zero")
        removed[needed] = False

    def _miss(self, labels: Labels, node: fx.Node, reason: str) -> None:
        if self.only is not None and labels.size:
            path = str(node.meta.get("path", ""))
            told = f"{op_of(node)} in {f'`{path}`' if path else 'the model'} needs it: it {reason}"
            self.missed.update((int(label), told) for label in labels)

    def _missed(self, removed: Bools) -> dict[Place, str]:
        found: dict[Place, str] = {}
        for (name, dim), indices in (self.only or {}).items():
            labels = self.channels.sources[name][dim]
            held = self.classes[labels[np.array(indices, dtype=np.int64)]] if labels is not None else np.zeros(0, int)
            told = (self.missed[int(c)] for c in held if not removed[c] and int(c) in self.missed)
            reason = next(told, "")
            if reason:
                found[name, dim] = reason
        return found

    def _represent(self, removed: Bools, representatives: dict[int, int]) -> bool:
        """Keep one constant channel of those that end in the same products without a bias; whether anything changed.

        Where zero padding surrounds a constant, the sum of w_c v_c over channels c is still w v_k for one of them, with
        w = sum of w_c v_c / v_k: the padding cuts all of them in the same way.
        """
        ends: dict[int, list[tuple[int, int, float]]] = {}
        read: dict[int, bool] = {}
        before = int(removed.sum())
        for number, sink in enumerate(self.sinks):
            if not (sink.blocked and sink.mergeable):
                continue
            classes = self.classes[sink.inputs]
            used: Bools = np.any(sink.alive & ~removed[self.classes[sink.outputs]][:, :, None], axis=1)
            for group, index in zip(*np.nonzero(removed[classes]), strict=True):
                label, value = int(classes[group, index]), float(sink.value[group, index])
                if label not in representatives:
                    ends.setdefault(label, []).append((number, int(group), value))
                    read[label] = read.get(label, False) or bool(used[group, index] and value)
        alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for label, places in ends.items():
            alike.setdefault(tuple((number, group) for number, group, _ in places), []).append(label)
        for key, labels in alike.items():
            values = np.array([[value for _, _, value in ends[label]] for label in labels])
            needed = np.flatnonzero((values != 0).any(0))
            labels_read = [label for label in labels if read[label]]
            if not labels_read:
                continue
            sizes = np.abs(values[:, needed])
            score = (sizes / sizes.max(0)).min(1)
            best = int(score.argmax())
            if len(set(key)) != len(key) or score[best] < _SMALLEST:
                removed[labels_read] = False
                continue
            removed[labels[best]] = False
            representatives.update(dict.fromkeys(labels, labels[best]))
        return int(removed.sum()) != before

    def _merges(self, removed: Bools, representatives: Mapping[int, int]) -> list[Merge]:
        merges: list[Merge] = []
        for sink in self.sinks:
            if not (sink.blocked and sink.mergeable):
                continue
            classes = self.classes[sink.inputs]
            used: Bools = np.any(sink.alive & ~removed[self.classes[sink.outputs]][:, :, None], axis=1)
            gone = removed[classes] & used & (sink.value != 0)
            for group in range(len(classes)):
                into: dict[int, list[int]] = {}
                for index in map(int, np.flatnonzero(gone[group])):
                    into.setdefault(representatives[int(classes[group, index])], []).append(index)
                for label, sources in into.items():
                    target = int(np.flatnonzero(classes[group] == label)[0])
                    merges.append(_merge(sink, group, target, np.array(sources)))
        return merges

    def _make_whole(self, relation: Relation, removed: Bools) -> None:
        """A product loses whole slabs only: what is not in one comes back, and factors that keep an entry."""
        entries = self.classes[relation.flat]
        gone = removed[entries]
        covered = np.zeros(entries.shape, dtype=bool)
        for axis, factor in enumerate(relation.factors):
            if factor is None:
                continue
            own = self.classes[factor]
            whole = gone.all(axis=tuple(a for a in range(entries.ndim) if a != axis))
            removed[own[~whole]] = False
            covered |= removed[own].reshape([-1 if a == axis else 1 for a in range(entries.ndim)])
        if relation in self.even:
            covered |= _evened(gone, covered)
        removed[entries[~covered]] = False

    def _solution(self, removed: Bools, representatives: Mapping[int, int], wished: Bools) -> Solution:
        kept: dict[Place, npt.NDArray[np.int64]] = {}
        for name, dims in self.channels.sources.items():
            for dim, labels in enumerate(dims):
                if labels is not None and removed[self.classes[labels]].any():
                    kept[name, dim] = np.flatnonzero(~removed[self.classes[labels]])
        needed = [kept for label, kept in representatives.items() if removed[label]]
        folds: dict[str, Floats] = {}
        blocked: list[Blocked] = []
        for sink in self.sinks:
            gone = removed[self.classes[sink.inputs]]
            taken = (gone & sink.known & (sink.value != 0))[:, sink.columns]
            weights = np.where(taken[:, None, :], sink.total, 0.0)  # infinite weights of others are no concern
            delta = np.einsum("goi,gi->go", weights, np.where(taken, sink.value[:, sink.columns], 0.0)).reshape(-1)
            if sink.fold is not None and delta.any():
                folds[sink.fold.name] = folds.get(sink.fold.name, 0.0) + sink.fold.sign * delta
            used: Bools = np.any(sink.alive & ~removed[self.classes[sink.outputs]][:, :, None], axis=1)
            standing = np.isin(self.classes[sink.inputs], needed)
            wanted = (wished[self.classes[sink.inputs]] | _alone(sink, self.classes)) & ~gone & ~standing
            stays = int((sink.known & (sink.value != 0) & used & wanted).sum())
            if stays and sink.blocked:
                path = str(sink.node.meta.get("path", ""))
                blocked.append(Blocked(stays, op_of(sink.node), path, sink.blocked))
        merges = tuple(self._merges(removed, representatives))
        clusters = self._clusters(kept, removed)
        return Solution(removed, kept, folds, merges, tuple(blocked), clusters, self.sinks, self._missed(removed))

    def _clusters(self, kept: Mapping[Place, object], removed: Bools) -> tuple[tuple[Place, ...], ...]:
        """Places connected by a removed class or by a relation."""
        parent = {place: place for place in kept}

        def root(place: Place) -> Place:
            while parent[place] != place:
                parent[place] = parent[parent[place]]
                place = parent[place]
            return place

        owner: dict[int, Place] = {}
        for place in kept:
            labels = self.channels.sources[place[0]][place[1]]
            assert labels is not None
            held = self.classes[labels]
            for label in np.unique(held[removed[held]]):
                other = owner.setdefault(int(label), place)
                parent[root(place)] = root(other)
        for relation in self.channels.relations * 2:  # twice: factors connect products that come before them, too
            parts = [self.classes[relation.flat].ravel()] + [self.classes[f] for f in relation.factors if f is not None]
            labels = np.unique(np.concatenate(parts))
            labels = labels[removed[labels]]
            places = [owner[int(label)] for label in labels if int(label) in owner]
            for place in places[1:]:
                parent[root(place)] = root(places[0])
            for label in labels if places else ():
                owner.setdefault(int(label), places[0])
        clusters: dict[Place, list[Place]] = {}
        for place in kept:
            clusters.setdefault(root(place), []).append(place)
        return tuple(tuple(places) for places in clusters.values())


def _merge(sink: Sink, group: int, target: int, sources: npt.NDArray[np.int64]) -> Merge:
    assert sink.weight is not None
    factors = sink.value[group, sources] / sink.value[group, target]
    groups, width = sink.inputs.shape
    if sink.axis == 0:
        return Merge(sink.weight, 0, group * width + target, group * width + sources, factors, None)
    height = sink.outputs.shape[1]
    rows = (group * height, (group + 1) * height) if groups > 1 else None
    return Merge(sink.weight, 1, target, sources, factors, rows)


def _alone(sink: Sink, classes: Labels) -> Bools:
    """Inputs that have an output of their own (a depthwise convolution): a border makes it vary over space."""
    shape = sink.inputs.shape
    alone = shape == sink.outputs.shape and shape[1] == 1
    result: Bools = np.full(shape, alone, dtype=bool) & (classes[sink.inputs] != FIXED)
    return result


def _evened(gone: Bools, covered: Bools) -> Bools:
    """The entries of a table that may go beside `covered` rows, so that every row that stays keeps equally many."""
    rows: Bools = ~np.all(covered, axis=1)
    if not rows.any():
        return gone
    count = int(gone[rows].sum(1).min())
    first = np.cumsum(gone, axis=1) <= count
    result: Bools = gone & first & rows[:, None]
    return result
