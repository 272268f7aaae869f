"""Which channel groups may be pruned, and what becomes zero when their channels go."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.graph.channels import Channels
from fxsparse.graph.channels_groups import ChannelGroup
from fxsparse.passes.compact_analysis import analysed
from fxsparse.passes.compact_classes import Place
from fxsparse.planning.compaction import captured_form, check_compactable, folded_form
from fxsparse.planning.select import Selector, places, select

Indices = Mapping[Place, tuple[int, ...]]
"""(Parameter or buffer, dimension) -> indices, ascending."""
_HARMLESS = frozenset({"sum"})  # what reads zeros as if they were not there
_COUNTED = frozenset({"layer_norm"})  # what can count zeros that are not there


@dataclass(frozen=True)
class Excluded:
    """A channel group that stays whole.

    Attributes:
        id: its number.
        places: its dimensions.
        channels: how many channels it has.
        reason: why.
    """

    id: int
    places: tuple[Place, ...]
    channels: int
    reason: str

    def __str__(self) -> str:
        shown = ", ".join(f"{name}[{dim}]" for name, dim in self.places[:3])
        more = f" and {len(self.places) - 3} more" if len(self.places) > 3 else ""
        return f"group {self.id}, {self.channels} channels of {shown}{more}, stays whole: {self.reason}"


def excluded(group: ChannelGroup, reason: str) -> Excluded:
    """The group as one that stays whole."""
    return Excluded(group.id, tuple((m.parameter, m.dim) for m in group.members), group.channels, reason)


def prunable_groups(model: nn.Module, example_inputs: Any) -> tuple[ChannelGroup, ...]:
    """The channel groups that `plan_channels` may prune, for scores of one's own.

    Args:
        model: any module, with masks or without; it stays as it is.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``.

    Raises:
        ConfigError, CaptureError: as `compact`.
    """
    check_compactable(model)
    channels = analysed(folded_form(captured_form(model, example_inputs)), example_inputs)
    return free_groups(model, channels)[0]


def free_groups(
    model: nn.Module,
    channels: Channels,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    norms: bool = False,
) -> tuple[tuple[ChannelGroup, ...], tuple[Excluded, ...]]:
    """The groups that may be pruned, and the others.

    Args:
        model: the model whose parameters the selectors name.
        channels: its channels.
        include: groups with one of these parameters; None = all.
        exclude: no group with one of these parameters.
        norms: also groups of features that layer norms read together.

    Raises:
        ConfigError: a selector picks nothing.
    """
    asked = None if include is None else _selected("include", include, model)
    unasked = frozenset[str]() if exclude is None else _selected("exclude", exclude, model)
    parameters = {name for name, _ in model.named_parameters()}
    free: list[ChannelGroup] = []
    whole: list[Excluded] = []
    for group in channels.groups:
        names = {member.parameter for member in group.members}
        if not group.prunable or group.mixed - _HARMLESS - (_COUNTED if norms else frozenset()):
            whole.append(excluded(group, group.reason))
        elif not names & parameters:
            whole.append(excluded(group, "no parameter goes with its channels"))
        elif asked is not None and not names & asked:
            whole.append(excluded(group, "not in `include`"))
        elif names & unasked:
            whole.append(excluded(group, "in `exclude`"))
        elif group.channels < 2:
            whole.append(excluded(group, "one channel must stay"))
        else:
            free.append(group)
    return tuple(free), tuple(whole)


def _selected(option: str, selectors: Selector | Iterable[Selector], model: nn.Module) -> frozenset[str]:
    first: dict[int, str] = {}
    aliases = {place.name: first.setdefault(id(place.parameter), place.name) for place in places(model)}
    return select(option, selectors, model, aliases).names


class Knots:
    """Groups that share dimensions, such as the heads and the positions within a head: which of them to try.

    A model may be able to lose one kind and not the other (its code states the size of a head, say, but not their
    number), or not both in one dimension. Where a trial fails the inner ones are left out first, then the outer ones
    instead, then both.

    Args:
        groups: the groups.
    """

    def __init__(self, groups: Sequence[ChannelGroup]) -> None:
        self.groups = {group.id: group for group in groups}
        self.banned: dict[int, str] = {}
        """Groups to leave out, with reasons."""
        self._swapped: set[int] = set()
        self._siblings: dict[int, set[int]] = {group.id: set() for group in groups}
        holders: dict[Place, list[int]] = {}
        for group in groups:
            for member in group.members:
                holders.setdefault((member.parameter, member.dim), []).append(group.id)
        for held in holders.values():
            for number in held:
                self._siblings[number] |= {each for each in held if self._inner(each) != self._inner(number)}

    def ban(self, refused: Mapping[int, str]) -> None:
        """Take note of groups that could not lose channels: group's number -> reason."""
        for number, reason in refused.items():
            others = self._siblings[number]
            both = bool(others & set(refused))
            if self._inner(number) or not (both or (others and not others & self._swapped)):
                self.banned[number] = reason
            elif not both:  # the outer ones alone: the inner ones may be better off without them
                self.banned[number] = reason
                self._swapped |= {number, *others}
                for other in others:
                    self.banned.pop(other, None)

    def _inner(self, number: int) -> bool:
        """Whether its channels lie scattered over a dimension, as the positions within heads do."""
        return any(
            len(member.indices[0]) > 1 and all(b - a > 1 for a, b in itertools.pairwise(member.indices[0]))
            for member in self.groups[number].members
        )


def removed_indices(chosen: Sequence[tuple[ChannelGroup, Sequence[int]]]) -> dict[Place, tuple[int, ...]]:
    """What goes with some channels of some groups."""
    found: dict[Place, set[int]] = {}
    for group, numbers in chosen:
        for member in group.members if numbers else ():
            held = found.setdefault((member.parameter, member.dim), set())
            for number in numbers:
                held.update(member.indices[number])
    return {place: tuple(sorted(indices)) for place, indices in found.items()}


def kept_directions(groups: Iterable[ChannelGroup]) -> frozenset[Place]:
    """Directions of weights whose length is a parameter of its own: zero divided by zero is no direction."""
    return frozenset(
        (member.parameter, member.dim)
        for group in groups
        for member in group.members
        if member.role.startswith("_weight_norm") and member.role.endswith(f".v{member.dim}")
    )


def is_run(indices: Sequence[int]) -> bool:
    """Whether indices follow each other without a gap."""
    return tuple(indices) == tuple(range(indices[0], indices[0] + len(indices)))


@torch.no_grad()
def zero_(model: nn.Module, removed: Indices, spared: frozenset[Place]) -> None:
    """Write zeros to everything of the parameters that goes.

    Raises:
        ConfigError: the model has no such parameter, or a smaller one. Nothing has changed then.
    """
    state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for (name, dim), indices in removed.items():
        if name not in state or state[name].ndim <= dim or state[name].shape[dim] <= indices[-1]:
            raise ConfigError(f"`{name}` is not what it was when the plan was made: plan anew")
    parameters = dict(model.named_parameters())
    for (name, dim), indices in removed.items():
        if name in parameters and (name, dim) not in spared:
            index = torch.from_numpy(np.array(indices, dtype=np.int64)).to(parameters[name].device)
            parameters[name].index_fill_(dim, index, 0.0)
