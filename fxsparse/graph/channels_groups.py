"""Channel groups from labels: which classes are fixed, and what goes with each of the others."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fxsparse.graph.channels_atoms import FIXED, Atoms, Barrier, Dims, Labels, Relation
from fxsparse.graph.channels_flow import Flow, Mixing, op_of

Place = tuple[str, int, int]
"""A parameter, a dimension, an index."""
_Kind = tuple[tuple[tuple[int, int], ...], tuple[Place, ...]]


@dataclass(frozen=True)
class Member:
    """The indices of one dimension of one parameter or buffer that belong to a channel group.

    Attributes:
        parameter: its first name.
        dim: the dimension.
        indices: for each channel of the group the indices that go with it, in order.
        role: how it is read, as "operator.argument" ("conv2d.weight"); of several readers the first one's.
    """

    parameter: str
    dim: int
    indices: tuple[tuple[int, ...], ...]
    role: str = ""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are alike: each removes the same number of indices from the same dimensions.

    Attributes:
        id: its number.
        channels: how many channels it has; they can be removed one by one.
        members: what goes with them.
        prunable: whether they can be removed at all.
        reason: where not, the barrier; where they can, but other values change, which operators read them together.
        mixed: how those read them: "norm", "sum", "softmax"...; a "sum" does not miss channels that are zero.
        multiple: the number of channels that stay must be a multiple of it.
        classes: for each channel its own class (of `Channels.classes`), and those of everything that goes with it.
    """

    id: int
    channels: int
    members: tuple[Member, ...]
    prunable: bool
    reason: str = ""
    mixed: frozenset[str] = frozenset()
    multiple: int = 1
    classes: tuple[Labels, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        shown = ", ".join(f"{m.parameter}[{m.dim}]" for m in self.members[:6])
        more = f" and {len(self.members) - 6} more" if len(self.members) > 6 else ""
        return f"{self.id}: {self.channels} channels of {shown}{more}" + (f" ({self.reason})" if self.reason else "")


def fixed_classes(atoms: Atoms, classes: Labels) -> tuple[npt.NDArray[np.bool_], dict[int, Barrier]]:
    """For every class whether it is fixed, and the barriers that fix classes."""
    fixed = np.zeros(atoms.count, dtype=bool)
    fixed[FIXED] = True
    reasons: dict[int, Barrier] = {}
    for labels, barrier in atoms.frozen:
        held = classes[labels]
        for label in np.unique(held[~fixed[held]]):
            reasons[int(label)] = barrier
        fixed[held] = True
    changed = True
    while changed:
        changed = any([_spread(relation, classes, fixed, reasons) for relation in atoms.relations])
    return fixed, reasons


def _spread(relation: Relation, classes: Labels, fixed: npt.NDArray[np.bool_], reasons: dict[int, Barrier]) -> bool:
    """A factor with a fixed entry is fixed; an entry whose factors are all fixed is fixed. Whether anything changed."""
    held = classes[relation.flat]
    stuck, changed = np.ones(held.shape, dtype=bool), False
    for axis, factor in enumerate(relation.factors):
        if factor is None:
            continue
        own = classes[factor]
        others = tuple(a for a in range(held.ndim) if a != axis)
        newly = fixed[held].any(axis=others) & ~fixed[own]
        for index in np.flatnonzero(newly):
            row = np.take(held, index, axis=axis)
            _inherit(reasons, int(own[index]), row[fixed[row]])
        changed |= bool(newly.any())
        fixed[own[newly]] = True
        stuck &= fixed[own].reshape([-1 if a == axis else 1 for a in range(held.ndim)])
    newly = stuck & ~fixed[held]
    if newly.any():
        sources = np.concatenate([classes[factor] for factor in relation.factors if factor is not None])
        for label in np.unique(held[newly]):
            _inherit(reasons, int(label), sources)
        fixed[held[newly]] = True
    return changed or bool(newly.any())


def _inherit(reasons: dict[int, Barrier], label: int, sources: Iterable[int]) -> None:
    found = next((reasons[int(source)] for source in sources if int(source) in reasons), None)
    if found is not None:
        reasons.setdefault(label, found)


def channel_groups(
    flow: Flow,
    sources: Mapping[str, Dims],
    classes: Labels,
    fixed: npt.NDArray[np.bool_],
    reasons: Mapping[int, Barrier],
    roles: Mapping[str, str],
) -> tuple[ChannelGroup, ...]:
    """The groups of all classes that occur in parameters; those that cannot be pruned as wholes at the end."""
    places, stuck = _places(sources, classes, fixed)
    follow = _followers(flow.atoms, classes)
    products = {int(c) for relation in flow.atoms.relations for c in np.unique(classes[relation.flat])}
    read: dict[int, list[Mixing]] = defaultdict(list)
    for mixing in flow.mixings:
        for c in np.unique(classes[mixing.labels]):
            read[int(c)].append(mixing)
    steps = {int(label): step for labels, step in flow.aligned for label in np.unique(classes[labels])}
    axes = _axes(flow.atoms, classes)
    alike: dict[_Kind, list[tuple[dict[tuple[str, int], list[int]], list[int]]]] = defaultdict(list)
    for label in sorted({*places, *follow} - products):
        if fixed[label]:
            continue
        channel: dict[tuple[str, int], list[int]] = defaultdict(list)
        closure = [label, *sorted(_closure(label, follow) - {label})]
        for each in closure:
            for name, dim, index in places.get(each, ()):
                channel[name, dim].append(index)
        if channel:
            shape = tuple(sorted((name, dim, len(indices)) for (name, dim), indices in channel.items()))
            alike[axes.get(label, ()), shape].append((channel, closure))
    groups: list[ChannelGroup] = []
    for key, held in alike.items():
        members = tuple(
            Member(name, dim, tuple(tuple(sorted(channel[name, dim])) for channel, _ in held), roles.get(name, ""))
            for name, dim, _ in key[1]
        )
        reading = {id(m): m for _, closure in held for label in closure for m in read.get(label, ())}
        closures = tuple(np.array(closure, dtype=np.int64) for _, closure in held)
        mixed = frozenset(mixing.kind for mixing in reading.values())
        note = _note(next(iter(reading.values()))) if reading else ""
        multiple = math.lcm(*(steps.get(int(label), 1) for label in np.concatenate(closures)))
        groups.append(ChannelGroup(len(groups), len(held), members, True, note, mixed, multiple, closures))
    for (name, dim), labels in stuck.items():
        if (labels == FIXED).all():  # no channels
            continue
        barrier = next((reasons[int(c)] for c in labels if int(c) in reasons), None)
        indices = tuple((int(i),) for i in np.flatnonzero(fixed[classes[_labels(sources, name, dim)]]))
        reason = str(barrier) if barrier is not None else "of fixed size"
        groups.append(
            ChannelGroup(len(groups), len(indices), (Member(name, dim, indices, roles.get(name, "")),), False, reason)
        )
    return tuple(groups)


def _note(mixing: Mixing) -> str:
    where = f"`{mixing.node.meta.get('path', '')}`" if mixing.node.meta.get("path") else "the model"
    return f"read together by {op_of(mixing.node)} in {where}"


def _labels(sources: Mapping[str, Dims], name: str, dim: int) -> Labels:
    labels = sources[name][dim]
    assert labels is not None
    return labels


def _places(
    sources: Mapping[str, Dims], classes: Labels, fixed: npt.NDArray[np.bool_]
) -> tuple[dict[int, list[Place]], dict[tuple[str, int], Labels]]:
    """Class -> where it occurs; and the fixed classes of each dimension that has some."""
    places: dict[int, list[Place]] = defaultdict(list)
    stuck: dict[tuple[str, int], Labels] = {}
    for name, dims in sources.items():
        for dim, labels in enumerate(dims):
            if labels is None or labels.size < 2:
                continue
            held = classes[labels]
            if fixed[held].any():
                stuck[name, dim] = held[fixed[held]]
            for index in np.flatnonzero(~fixed[held]):
                places[int(held[index])].append((name, dim, int(index)))
    return places, stuck


def _axes(atoms: Atoms, classes: Labels) -> dict[int, tuple[tuple[int, int], ...]]:
    """Factor -> the axes of products of which it is an index: heads and positions inside them are different kinds."""
    axes: dict[int, tuple[tuple[int, int], ...]] = defaultdict(tuple)
    for number, relation in enumerate(atoms.relations):
        for axis, factor in enumerate(relation.factors):
            for label in [] if factor is None else np.unique(classes[factor]):
                axes[int(label)] += ((number, axis),)
    return axes


def _followers(atoms: Atoms, classes: Labels) -> dict[int, set[int]]:
    """Factor -> the product entries that go with it."""
    follow: dict[int, set[int]] = defaultdict(set)
    for relation in atoms.relations:
        held = classes[relation.flat]
        for axis, factor in enumerate(relation.factors):
            if factor is not None:
                for index, label in enumerate(classes[factor]):
                    follow[int(label)].update(map(int, np.take(held, index, axis=axis).ravel()))
    return follow


def _closure(label: int, follow: Mapping[int, set[int]]) -> set[int]:
    found, stack = {label}, [label]
    while stack:
        for each in follow.get(stack.pop(), ()):
            if each not in found:
                found.add(each)
                stack.append(each)
    return found
