"""One tapped forward pass and its backward passes: gradients as they arrive at each site."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fxsparse.curvature.taps_formulas import wide
from fxsparse.curvature.taps_layout import Layout
from fxsparse.curvature.taps_mode import TapMode
from fxsparse.curvature.taps_site import Operand, Site


@dataclass(eq=False)
class Part:
    """One operand of one site with the gradient that has arrived there, in single precision at least."""

    operand: Operand
    site: Site
    layout: Layout
    delta: Tensor

    def __post_init__(self) -> None:
        self.delta = wide(self.delta)


@dataclass(eq=False)
class TapPass:
    """A forward pass.

    Attributes:
        mode: the mode under which it ran.
        z: the outputs.
        samples: N.
        layouts: where the samples lie at each site, by number.
        refused: parameters whose gradients are not had from taps, and why; what arrives for them is dropped.
        single: the parameters that are read once, as they are; their parts are handed on as soon as they arrive.
        closed: sites that are done.
        edges: by number of a site, where its gradient arrives in the graph. They must not be kept by what the graph's
            hooks hold, which would keep the graph alive for ever.
    """

    mode: TapMode
    z: Tensor
    samples: int
    layouts: Mapping[int, Layout | None]
    refused: Mapping[str, str] = field(default_factory=dict)
    single: frozenset[str] = frozenset()
    closed: frozenset[int] = frozenset()
    edges: Mapping[int, GradientEdge] = field(default_factory=dict)
    _pending: list[Part] = field(default_factory=list)
    _hand: Callable[[str, Part], None] | None = None

    def parts(self, cotangent: Tensor, hand: Callable[[str, Part], None], keep: bool) -> dict[str, list[Part]]:
        """Back-propagate a cotangent of z.

        Args:
            cotangent: like z.
            hand: gets the parts of parameters in `single`.
            keep: whether another backward pass follows.

        Returns:
            The parts of all other parameters.
        """
        self._pending, self._hand = [], hand
        if self.z.requires_grad:
            leaves = self.mode.leaves
            found = torch.autograd.grad(self.z, leaves, cotangent, retain_graph=keep, allow_unused=True)
            given = {id(leaf): gradient for leaf, gradient in zip(leaves, found, strict=True)}
            for site in self.mode.sites:
                if site.leaf is not None and given[id(site.leaf)] is not None:
                    self.receive(site, given[id(site.leaf)])
        pending, self._pending, self._hand = self._pending, [], None
        parts: dict[str, list[Part]] = {}
        for part in pending:
            for name in part.operand.source.names:
                if name not in self.refused:
                    parts.setdefault(name, []).append(part)
        return parts

    def target(self, number: int) -> Tensor | GradientEdge:
        """What autograd is asked for to have the gradient at a site."""
        leaf = self.mode.sites[number].leaf
        return self.edges[number] if leaf is None else leaf

    @torch.no_grad()
    def receive(self, site: Site, delta: Tensor | None) -> None:
        """What a site's tap calls."""
        layout = self.layouts.get(site.number)
        if self._hand is None or delta is None or layout is None or site.number in self.closed:
            return
        site.check_saved()
        for operand in site.operands:
            part = Part(operand, site, layout, delta.detach())
            if operand.source.direct in self.single:
                assert operand.source.direct is not None
                self._hand(operand.source.direct, part)
            elif not all(name in self.refused for name in operand.source.names):
                self._pending.append(part)

    def per_sample(self, name: str, parts: list[Part], first: int, last: int, dense: bool = False) -> Tensor:
        """The gradients of one parameter of the samples `first`..`last`, summed over its uses: [last - first, *shape].

        Args:
            name: the parameter.
            parts: all of its parts of one backward pass.
            first: first sample.
            last: one behind the last sample.
            dense: whether a mask between the parameter and its reader is overlooked.
        """
        alias = self.mode.aliases[name]
        total: Tensor | None = None
        for part in parts:
            g = part.operand.formula.per_sample(part.delta, part.layout, self.samples, first, last)
            source = part.operand.source
            if source.direct is None:
                g = wide(pulled_back(source.tensor, alias, g.to(source.tensor.dtype)))
            elif source.mask is not None and not dense:
                g = g * source.mask
            total = g if total is None else total + g
        assert total is not None
        return total


def read_once(sites: Sequence[Site], refused: Container[str] = ()) -> frozenset[str]:
    """The parameters that are read once, as they are, without those that are refused."""
    count: dict[str, int] = {}
    for site in sites:
        for operand in site.operands:
            for name in operand.source.names:
                count[name] = count.get(name, 0) + (1 if operand.source.direct else 2)
    return frozenset(name for name, times in count.items() if times == 1 and name not in refused)


def pulled_back(value: Tensor, alias: Tensor, cotangents: Tensor) -> Tensor:
    """Cotangents [n, *value.shape] of an expression carried back to a parameter: [n, *alias.shape]."""
    with torch.enable_grad():
        try:
            (found,) = torch.autograd.grad(
                value, alias, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:  # an operator of the expression has no batched derivative
            each = [torch.autograd.grad(value, alias, c, retain_graph=True, allow_unused=True)[0] for c in cotangents]
            found = None if each[0] is None else torch.stack(each)
    return cotangents.new_zeros((len(cotangents), *alias.shape)) if found is None else found.detach()
