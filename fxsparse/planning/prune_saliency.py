"""Saliencies of channels: a score per channel of a group, higher = keep."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fxsparse.errors import ConfigError, DataError
from fxsparse.graph.channels_groups import ChannelGroup, Member
from fxsparse.sparsity.random import generator, random_scores
from fxsparse.sparsity.saliency import Saliency

ChannelSaliency: TypeAlias = Callable[[ChannelGroup, Mapping[str, Tensor]], Tensor]
"""Any function of a channel group and the model's parameters by first name (detached, dead weights zero) that returns a
score for each channel of the group, shape (channels,), higher = keep."""


class Pooled(enum.Enum):
    """How the scores of a group's members become one."""

    MEAN = "mean"
    SUM = "sum"


def slices(group: ChannelGroup, values: Mapping[str, Tensor]) -> Iterator[tuple[Member, Tensor]]:
    """What goes with each channel: for every member among `values` the entries, shape (channels, entries)."""
    for member in group.members:
        value = values.get(member.parameter)
        if value is None:
            continue
        index = torch.from_numpy(np.array(member.indices, dtype=np.int64)).to(value.device)
        picked = value.detach().index_select(member.dim, index.reshape(-1)).movedim(member.dim, 0)
        yield member, picked.reshape(group.channels, -1)


def _pooled(group: ChannelGroup, scores: list[Tensor], pooled: Pooled, what: str) -> Tensor:
    if not scores:
        names = ", ".join(member.parameter for member in group.members[:4])
        raise ConfigError(f"{what} has no score for channel group {group.id} ({names}): give one, or exclude it")
    table = torch.stack([score.double().cpu() for score in scores])
    return table.mean(0) if pooled is Pooled.MEAN else table.sum(0)


@dataclass(frozen=True)
class ChannelMagnitude:
    """The norm of everything that goes with a channel in a parameter, over its members (Li et al. 2017).

    Attributes:
        p: 1 or 2: the norm, (sum |w|^p)^(1/p).
        pooled: how the members' norms become one.
    """

    p: int = 2
    pooled: Pooled = Pooled.MEAN

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise ConfigError(f"`p` (={self.p}) must be 1 or 2")

    def __call__(self, group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
        """Norms of the group's channels."""
        norms = [
            torch.linalg.vector_norm(part, self.p, dim=1, dtype=_wide(part)) for _, part in slices(group, parameters)
        ]
        return _pooled(group, norms, self.pooled, str(self))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class ChannelTaylor:
    """|sum g w| over everything that goes with a channel in a parameter: the first-order change of the loss without it.

    Molchanov et al. 2019 (arXiv 1906.10771, equation 8) square it, which ranks alike.

    Attributes:
        gradients: mean gradients of the loss, by parameter name.
        pooled: how the members' scores become one.
    """

    gradients: Mapping[str, Tensor] = field(repr=False)
    pooled: Pooled = Pooled.MEAN

    def __call__(self, group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
        """Scores of the group's channels."""
        scores = []
        _check_shapes("gradients", self.gradients, parameters, group)
        products = {
            member.parameter: self.gradients[member.parameter].detach() * parameters[member.parameter]
            for member in group.members
            if member.parameter in self.gradients and member.parameter in parameters
        }
        scores = [part.double().sum(1).abs() for _, part in slices(group, products)]
        return _pooled(group, scores, self.pooled, "ChannelTaylor")


@dataclass(frozen=True, eq=False)
class ElementScores:
    """Scores of single weights, added up over everything that goes with a channel.

    Attributes:
        scores: by parameter name, of the parameter's shape (a diagonal Fisher, say); or a `Saliency` of `sparsity` that
            needs nothing but the weights.
        pooled: how the members' sums become one.
    """

    scores: Mapping[str, Tensor] | Saliency = field(repr=False)
    pooled: Pooled = Pooled.MEAN

    def __call__(self, group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
        """Sums for the group's channels."""
        scores = self.scores
        if isinstance(scores, Saliency):
            held = dict.fromkeys(m.parameter for m in group.members if m.parameter in parameters)
            scores = {name: scores.score(parameters[name]) for name in held}
        _check_shapes("scores", scores, parameters, group)
        sums = [part.double().sum(1) for _, part in slices(group, scores)]
        return _pooled(group, sums, self.pooled, "ElementScores")


def _check_shapes(
    option: str, given: Mapping[str, Tensor], parameters: Mapping[str, Tensor], group: ChannelGroup
) -> None:
    for name in dict.fromkeys(member.parameter for member in group.members):
        if name in given and name in parameters and given[name].shape != parameters[name].shape:
            raise ConfigError(
                f"`{option}` of `{name}` (={tuple(given[name].shape)}) must have the shape of the parameter "
                f"{tuple(parameters[name].shape)}"
            )


@dataclass(frozen=True)
class NormScale:
    """|gamma|, the scale of the norms that a channel goes through (Liu et al. 2017, network slimming).

    Attributes:
        pooled: how several norms become one.
    """

    pooled: Pooled = Pooled.MEAN

    def __call__(self, group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
        """Scales of the group's channels."""
        norms = {m.parameter for m in group.members if "norm" in m.role.split(".")[0] and m.role.endswith(".weight")}
        scales = {name: parameters[name] for name in norms if name in parameters}
        return _pooled(
            group, [part.abs().double().mean(1) for _, part in slices(group, scales)], self.pooled, str(self)
        )


@dataclass(frozen=True)
class ChannelRandom:
    """U(0, 1), the control.

    Attributes:
        seed: of the draw; it depends on the group's number, not on what was drawn before.
    """

    seed: int = 0

    def __call__(self, group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
        """Draws for the group's channels."""
        return random_scores((group.channels,), generator(self.seed, group.id, 0, "channels"))


@dataclass(frozen=True, eq=False)
class ChannelScores:
    """Scores made elsewhere, such as those of `group_fisher`.

    Attributes:
        scores: by the group's number, shape (channels,).
    """

    scores: Mapping[int, Tensor] = field(repr=False)

    def __call__(self, group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
        """The scores of the group."""
        if group.id not in self.scores:
            names = ", ".join(member.parameter for member in group.members[:4])
            raise ConfigError(f"`scores` has no entry for channel group {group.id} ({names}): add it, or exclude it")
        return self.scores[group.id]


def scored(saliency: ChannelSaliency, group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
    """The scores of a group, float64 on the CPU, checked.

    Raises:
        ConfigError: no tensor of shape (channels,).
        DataError: scores that are not finite.
    """
    found = saliency(group, parameters)
    names = ", ".join(member.parameter for member in group.members[:4])
    if not isinstance(found, Tensor) or tuple(found.shape) != (group.channels,):
        shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"`saliency` (={saliency!r}) returned {shown} for channel group {group.id} ({names}); it must be one score "
            f"per channel, shape ({group.channels},)"
        )
    scores = found.detach().double().cpu()
    wrong = int((~torch.isfinite(scores)).sum())
    if wrong:
        raise DataError(
            f"`saliency` (={saliency!r}): {wrong} of {group.channels} scores of channel group {group.id} ({names}) are "
            "not finite; mend the weights or the scores"
        )
    return scores


def as_channel_saliency(saliency: object) -> ChannelSaliency:
    """What `plan_channels` takes as a saliency, as a function of groups.

    Raises:
        ConfigError: something else.
    """
    if isinstance(saliency, Saliency):
        if saliency.needs_gradient or saliency.needs_inputs:
            raise ConfigError(
                f"`saliency` (={saliency}) needs gradients or inputs: compute its scores and give them by "
                "parameter name, or use ChannelTaylor(gradients)"
            )
        return ElementScores(saliency)
    if isinstance(saliency, Mapping):
        numbers = [key for key in saliency if isinstance(key, int)]
        if not all(isinstance(value, Tensor) for value in saliency.values()) or len(numbers) not in (0, len(saliency)):
            raise ConfigError("`saliency` as a mapping must be parameter name -> tensor, or group number -> tensor")
        return ChannelScores(saliency) if numbers else ElementScores(saliency)
    if not callable(saliency):
        raise ConfigError(
            f"`saliency` (={saliency!r}) must be a channel saliency such as ChannelMagnitude(), a Saliency, a mapping "
            "of scores, or a function of (group, parameters)"
        )
    return saliency
