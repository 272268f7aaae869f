"""Structured pruning: choosing the channels that go."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from fxsparse.errors import ConfigError, PassError
from fxsparse.graph.channels import Channels
from fxsparse.graph.channels_groups import ChannelGroup
from fxsparse.passes.compact_again import state_of
from fxsparse.passes.compact_analysis import analysed
from fxsparse.passes.compact_channels import Compacted, compact_channels
from fxsparse.passes.compact_verify import owned_copy
from fxsparse.planning.compaction import captured_form, check_compactable, folded_form
from fxsparse.planning.prune_budgets import Budget
from fxsparse.planning.prune_choose import Candidate, Choice, Floats, Limits, Scope, Unmet, candidates
from fxsparse.planning.prune_costs import Costs
from fxsparse.planning.prune_groups import (
    Excluded,
    Knots,
    excluded,
    free_groups,
    kept_directions,
    removed_indices,
    zero_,
)
from fxsparse.planning.prune_plan import ChannelPlan, PlannedGroup, Trial, left_whole
from fxsparse.planning.prune_saliency import ChannelMagnitude, ChannelSaliency, as_channel_saliency, scored
from fxsparse.planning.select import Selector

MAGNITUDE = ChannelMagnitude()
_TRIALS = 12


def plan_channels(
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: Budget,
    saliency: ChannelSaliency | Mapping[Any, Any] | Any = MAGNITUDE,
    scope: Scope = Scope.ISOMORPHIC,
    round_to: int = 1,
    min_channels: int = 1,
    min_density: float = 0.0,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    specialize: bool = False,
) -> ChannelPlan:
    """Decide which channels go: those with the lowest saliency, as few as meet the budget.

    Channels that are coupled (residuals, heads, gates, depthwise convolutions...) go together. Groups whose channels
    are read together by something that would notice (a softmax, a GroupNorm) stay whole: without them the model would
    not equal its masked self. The features that layer norms read together go only where the rest cannot meet the
    budget: those norms then count the removed features as zeros (`SizedLayerNorm`). The plan is tried on a copy; what
    the model cannot lose after all stays.

    Args:
        model: any module, with masks or without; it stays as it is.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``.
        budget: `ParameterBudget`, `MacBudget`, `LatencyBudget` or `ChannelBudget`: what may stay.
        saliency: a channel saliency (`ChannelMagnitude`, `ChannelTaylor`, `NormScale`, `ChannelRandom`...), a
            `Saliency` of weights alone, scores by parameter name or by group number, or a function of (group,
            parameters).
        scope: which channels compete.
        round_to: the sizes of pruned dimensions are multiples of it, as far as a group decides about them.
        min_channels: channels that every group keeps.
        min_density: fraction of its channels that every group keeps.
        include: only groups with one of these parameters; names, globs, types or predicates as in `plan`.
        exclude: no group with one of these parameters.
        specialize: whether a model whose Python code states sizes (``zeros(batch, 12)``) may become one graph of the
            calls that ran on the example inputs, in which those sizes follow; it then takes inputs of these shapes and
            Python values only, as told for `capture`.

    Returns:
        The plan; nothing has changed.

    Raises:
        ConfigError: an option out of range or of the wrong kind, nothing can be pruned, the budget cannot be met, or
            scores have the wrong shape.
        DataError: scores, or the model's outputs, are not finite.
        CaptureError: the model cannot be run on the inputs.

    >>> import torch
    >>> from torch import nn
    >>> from fxsparse.planning.prune_budgets import ParameterBudget
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> plan = plan_channels(model, (torch.randn(3, 8),), budget=ParameterBudget(0.6), round_to=4)
    >>> plan.parameters
    (178, 90)
    >>> small = plan.apply()
    >>> small[0].weight.shape, small[2].weight.shape
    (torch.Size([8, 8]), torch.Size([2, 8]))
    """
    if not isinstance(budget, Budget):
        raise ConfigError(f"`budget` (={budget!r}) must be a budget such as ParameterBudget(0.5)")
    if not isinstance(scope, Scope):
        raise ConfigError(f"`scope` (={scope!r}) must be Scope.GLOBAL, Scope.ISOMORPHIC or Scope.LOCAL")
    limits, function = Limits(round_to, min_channels, min_density), as_channel_saliency(saliency)
    check_compactable(model)
    source = captured_form(model, example_inputs, specialize)
    folded = folded_form(source)
    channels = analysed(folded, example_inputs)
    parameters = {name: parameter.detach() for name, parameter in folded.named_parameters()}

    def planned(norms: bool) -> ChannelPlan:
        groups, whole = free_groups(model, channels, include, exclude, norms)
        _check_any(groups, whole)
        scores = {group.id: scored(function, group, parameters).numpy() for group in groups}
        ranked = candidates(groups, scores, scope, limits)
        plan = _Planner(model, source, example_inputs, channels, budget, scores, specialize).plan(ranked, whole)
        return dataclasses.replace(plan, norms=norms)

    try:
        return planned(False)
    except Unmet:
        if not any(group.prunable and "layer_norm" in group.mixed for group in channels.groups):
            raise
    return planned(True)


def _check_any(groups: Sequence[ChannelGroup], whole: Sequence[Excluded]) -> None:
    if not groups:
        told = "\n".join(f"  {each}" for each in whole[:8])
        raise Unmet(f"nothing can be pruned: no channel group of the model is free to lose channels\n{told}".strip())


class _Planner:
    def __init__(
        self,
        model: nn.Module,
        source: nn.Module,
        example_inputs: Any,
        channels: Channels,
        budget: Budget,
        scores: Mapping[int, Floats],
        specialize: bool,
    ) -> None:
        self.model, self.source, self.example_inputs = model, source, example_inputs
        self.channels, self.budget, self.scores, self.specialize = channels, budget, scores, specialize
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def plan(self, ranked: Sequence[Candidate], whole: Sequence[Excluded]) -> ChannelPlan:
        """Choose, try, and choose anew without the groups that could not lose channels."""
        knots = Knots([candidate.group for candidate in ranked])
        for _ in range(_TRIALS):
            free = [candidate for candidate in ranked if candidate.group.id not in knots.banned]
            told = [*whole, *(excluded(c.group, knots.banned[c.group.id]) for c in ranked if c not in free)]
            _check_any([candidate.group for candidate in free], told)
            counted = np.array([closure[0] for c in free for closure in c.group.classes], dtype=np.int64)
            costs = Costs(self.channels, self.shapes, counted)
            self.budget.check(costs)
            choice = Choice(free, costs)
            plan = self._planned(free, choice.search(self.budget), choice, costs, told)
            found = self._tried(plan)
            refused = {} if found is None else _refused(plan, found)
            if not refused:
                return plan if found is None else self._with_trial(plan, found)
            knots.ban(refused)
        raise PassError("prune_channels: the model cannot lose what was chosen, however often; please report this")

    def _planned(
        self,
        ranked: Sequence[Candidate],
        losses: Sequence[int],
        choice: Choice,
        costs: Costs,
        whole: Sequence[Excluded],
    ) -> ChannelPlan:
        before, after = choice.removed([0] * len(ranked)), choice.removed(losses)
        chosen = [(c.group, sorted(map(int, c.order[:lost]))) for c, lost in zip(ranked, losses, strict=True)]
        groups = tuple(_planned_group(group, numbers, self.scores[group.id]) for group, numbers in chosen)
        return ChannelPlan(
            groups=groups,
            removed=MappingProxyType(removed_indices(chosen)),
            budget=self.budget,
            cost=(self.budget.cost(costs, before), self.budget.cost(costs, after)),
            parameters=(costs.parameters(before), costs.parameters(after)),
            macs=(costs.macs(before), costs.macs(after)),
            excluded=tuple(whole),
            model=self.model,
            example_inputs=self.example_inputs,
            spared=kept_directions(group for group, _ in chosen),
            specialize=self.specialize,
        )

    def _tried(self, plan: ChannelPlan) -> Compacted | None:
        """The plan carried out on a copy; None where nothing goes."""
        if not plan.removed:
            return None
        masked = owned_copy(self.source)
        zero_(masked, plan.removed, plan.spared)
        return compact_channels(masked, folded_form(masked), self.example_inputs, plan.removed, self.channels)

    def _with_trial(self, plan: ChannelPlan, found: Compacted) -> ChannelPlan:
        state = state_of(self.model, self.example_inputs)
        if state is None or found.channels is None:
            return plan
        solution = found.solution
        folding = [each for each in solution.sinks if each.fold is not None and each.fold.name in solution.folds]
        solution = dataclasses.replace(solution, sinks=folding)  # the report reads no others, and they are large
        kept = dataclasses.replace(found, module=nn.Identity(), solution=solution)
        return dataclasses.replace(plan, trial=Trial(state, kept))


def _refused(plan: ChannelPlan, found: Compacted) -> dict[int, str]:
    """Groups that cannot lose their channels, with reasons."""
    left = set(left_whole(found, plan.removed))
    refused: dict[int, str] = {}
    for group in plan.groups if left else ():
        if group.removed and left & set(group.places):
            told = (each.reason for each in found.refused if not each.places or set(each.places) & set(group.places))
            missed = next((r for place in group.places if (r := found.solution.missed.get(place))), "")
            refused[group.id] = next(told, missed or "something needs its channels though they are zero")
    return refused


def _planned_group(group: ChannelGroup, numbers: Sequence[int], scores: Floats) -> PlannedGroup:
    gone = np.zeros(group.channels, dtype=bool)
    gone[list(numbers)] = True
    return PlannedGroup(
        id=group.id,
        places=tuple((member.parameter, member.dim) for member in group.members),
        channels=group.channels,
        removed=tuple(numbers),
        highest_removed=float(scores[gone].max()) if numbers else None,
        lowest_kept=float(scores[~gone].min()),
    )
