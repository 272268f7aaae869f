"""Squares of per-sample gradients, summed over groups, from the parts that taps receive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxsparse.curvature.fisher_types import UncoveredParameter
from fxsparse.curvature.groups import Grouping
from fxsparse.curvature.taps_formulas import EmbeddingWeight, LinearWeight, Summed, wide
from fxsparse.curvature.taps_pass import Part, TapPass

Entry = tuple[str, str]
"""(parameter, group type)."""

_CHUNK = 1 << 22


@dataclass(eq=False)
class Squares:
    """Group squares u_n of each sample, added up over backward passes.

    Attributes:
        samples: N.
        groupings: of each parameter.
        masks: the masks of parameters whose dead entries do not count.
        dense: whether masks between a parameter and its reader are overlooked.
        separate: whether the squares of each sample are kept apart, even where every entry is a group.
        values: by entry, [N, size], or [1, size] where samples were not kept apart.
    """

    samples: int
    groupings: Mapping[str, tuple[Grouping, ...]]
    masks: Mapping[str, Tensor]
    dense: bool
    separate: bool
    values: dict[Entry, Tensor] = field(default_factory=dict)
    _held: dict[str, tuple[Part, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def backward(self, made: TapPass, cotangent: Tensor, weight: float, keep: bool, expand: bool = False) -> None:
        """Add the squares of one backward pass, times `weight`.

        Args:
            made: the forward pass.
            cotangent: like its z.
            weight: a factor.
            keep: whether another backward pass follows.
            expand: whether positions are squared apart, layer by layer.

        Raises:
            UncoveredParameter: with `expand`, a parameter that is read more than once.
        """
        with torch.enable_grad():
            rest = made.parts(
                cotangent, lambda name, part: self.single(made, name, self._expanded(name, part, expand), weight), keep
            )
        for name, parts in rest.items():
            if expand:
                raise UncoveredParameter(
                    f"`{name}` is read several times or through an expression, where positions cannot be told "
                    "apart: take `token_method` (='exact')"
                )
            self._gathered(made, name, parts, weight)

    def _expanded(self, name: str, part: Part, expand: bool) -> Part:
        if not expand:
            return part
        formula = part.operand.formula.expanded()
        if formula is None:
            raise UncoveredParameter(
                f"`{name}` is read by `{part.site.what}`, which mixes positions: take `token_method` (='exact')"
            )
        return Part(type(part.operand)(part.operand.source, formula), part.site, part.layout, part.delta)

    def add(self, name: str, grouping: Grouping, u: Tensor, weight: float, first: int = 0) -> None:
        """Add group squares [n, size] of the samples from `first` on."""
        separate = self.separate or not grouping.is_element
        key = (name, grouping.group_type)
        if key not in self.values:
            if separate and len(u) == self.samples:
                self.values[key] = u * weight if weight != 1.0 else u
                return
            self.values[key] = u.new_zeros((self.samples if separate else 1, grouping.size))
        if separate:
            self.values[key][first : first + len(u)].add_(u, alpha=weight)
        else:
            self.values[key].add_(u.sum(0, keepdim=True), alpha=weight)

    def per_sample(self, name: str, g: Tensor, weight: float, first: int) -> None:
        """Add what follows from gradients [n, *shape] of the samples from `first` on."""
        mask = self.masks.get(name)
        squares = wide(g if mask is None else g * mask).square()
        for grouping in self.groupings[name]:
            self.add(name, grouping, grouping.reduce(squares), weight, first)

    def single(self, made: TapPass, name: str, part: Part, weight: float) -> None:
        """A parameter that is read once, as it is: the cheapest form of each grouping."""
        if self._is_linear_in_squares(name, part):
            squares = part.delta.square()
            if weight != 1.0:
                squares.mul_(weight)
            before = self._held.get(name)
            self._held[name] = part, squares if before is None else before[1].add_(squares)
            return
        mask = None if self.dense else self.masks.get(name, part.operand.source.mask)
        formula, arguments = part.operand.formula, (part.delta, part.layout, made.samples)
        rest = []
        slices: dict[int | str | None, Tensor | None] = {}
        for grouping in self.groupings[name]:
            u: Tensor | None = None
            if grouping.is_element and not self.separate:
                u = formula.squares(*arguments)
                u = u if u is None or mask is None else u * mask
                u = u if u is None else u.reshape(1, -1)
            elif grouping.axis in (0, 1):
                if grouping.axis not in slices:
                    by = formula.rows if grouping.axis == 0 else formula.columns
                    slices[grouping.axis] = by(*arguments, mask)
                found = slices[grouping.axis]
                u = None if found is None else grouping.from_slices(found)
            if u is None:
                rest.append(grouping)
            else:
                self.add(name, grouping, u, weight)
        if rest:
            self._by_gradients(made, name, [part], weight, tuple(rest), mask)

    def _is_linear_in_squares(self, name: str, part: Part) -> bool:
        """Whether (D_k^2)^T X^2 of all backward passes k is one product: single entries of layers without positions."""
        formula, shape = part.operand.formula, part.delta.shape
        if self.separate or len(shape) != 2 or shape[0] != self.samples or part.layout.axis != 0:
            return False
        known = isinstance(formula, LinearWeight) or (isinstance(formula, Summed) and formula.shape == shape[1:])
        return known and not formula.expand and all(each.is_element for each in self.groupings[name])  # type: ignore[attr-defined]  # of both

    def close(self) -> None:
        """Add what was kept of all backward passes of a forward pass."""
        held, self._held = self._held, {}
        for name, (part, squares) in held.items():
            formula = part.operand.formula
            mask = None if self.dense else self.masks.get(name, part.operand.source.mask)
            if isinstance(formula, LinearWeight):
                x = wide(part.layout.rows(formula.x, self.samples)[:, 0]).square()
                u = x.T @ squares if formula.transposed else squares.T @ x
            else:
                assert isinstance(formula, Summed)
                factor = None if formula.factor is None else wide(formula.factor()).square_()
                u = (squares if factor is None else squares * factor).sum(0)
            u = u if mask is None else u * mask
            for grouping in self.groupings[name]:
                self.add(name, grouping, u.reshape(1, -1), 1.0)

    def _gathered(self, made: TapPass, name: str, parts: list[Part], weight: float) -> None:
        mask = None if self.dense else self.masks.get(name)
        self._by_gradients(made, name, parts, weight, self.groupings[name], mask)

    def _by_gradients(
        self,
        made: TapPass,
        name: str,
        parts: list[Part],
        weight: float,
        groupings: tuple[Grouping, ...],
        mask: Tensor | None,
    ) -> None:
        formula = parts[0].operand.formula
        if getattr(formula, "expand", False):
            self._expanded_entries(made, name, parts[0], weight, groupings, mask)
            return
        step = max(1, _CHUNK // max(made.mode.aliases[name].numel(), 1))
        for first in range(0, made.samples, step):
            last = min(first + step, made.samples)
            g = made.per_sample(name, parts, first, last, self.dense)
            squares = wide(g if mask is None else g * mask).square()
            for grouping in groupings:
                self.add(name, grouping, grouping.reduce(squares), weight, first)

    def _expanded_entries(
        self, made: TapPass, name: str, part: Part, weight: float, groupings: tuple[Grouping, ...], mask: Tensor | None
    ) -> None:
        """Positions as samples of their own, entry by entry."""
        for n in range(made.samples):
            squares = _one_expanded(part, made.samples, n)
            squares = squares if mask is None else squares * mask
            for grouping in groupings:
                self.add(name, grouping, grouping.reduce(squares[None]), weight, n)


def _one_expanded(part: Part, samples: int, n: int) -> Tensor:
    formula = part.operand.formula
    if isinstance(formula, LinearWeight):
        x, d = wide(part.layout.rows(formula.x, samples)[n]).square(), part.layout.rows(part.delta, samples)[n].square()
        return x.T @ d if formula.transposed else d.T @ x
    if isinstance(formula, Summed):
        return formula.unsummed(part.delta, part.layout, samples)[n].square().sum(0)
    d = part.layout.rows(part.delta, samples)[n].square()
    assert isinstance(formula, EmbeddingWeight)
    ids = part.layout.unfold(formula.ids, samples).reshape(samples, -1)[n]
    return d.new_zeros(formula.shape).index_add_(0, ids, d)
