"""What an examination of a few samples finds out: sketches of gradients, and where the samples may lie at each site."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.groups_types import Reading
from fxsparse.curvature.taps_formulas import ConvWeight, EmbeddingWeight, Formula, LinearWeight
from fxsparse.curvature.taps_layout import Layout, candidates, consistent
from fxsparse.curvature.taps_pass import TapPass
from fxsparse.curvature.taps_site import Site
from fxsparse.graph.tree import parameters_of

_SKETCH = 4096
_NOISE = 0.1


def sketched(g: Tensor) -> Tensor:
    """A linear sketch of at most 4096 numbers: what is compared of a gradient, which may be too large to be kept."""
    flat = g.detach().flatten()
    if flat.numel() <= _SKETCH:
        return flat.clone()
    whole = flat.numel() // _SKETCH * _SKETCH
    weights = torch.arange(whole // _SKETCH, dtype=torch.float64).cos().to(flat)
    result = weights @ flat[:whole].view(-1, _SKETCH)
    result[: flat.numel() - whole] += 0.7 * flat[whole:]
    return result


def sketches_like(parameter: Tensor, samples: int) -> Tensor:
    """Zeros for the sketches of so many gradients."""
    return torch.zeros((samples, min(parameter.numel(), _SKETCH)), dtype=parameter.dtype, device=parameter.device)


def sketch_on_arrival(leaf: Tensor, into: Tensor) -> Any:
    """Write a sketch of the gradient of a leaf when it arrives, and drop the gradient; the handle of the hook."""

    def take(tensor: Tensor) -> None:
        assert tensor.grad is not None
        into.copy_(sketched(tensor.grad.to_dense() if tensor.grad.is_sparse else tensor.grad))
        tensor.grad = None

    return leaf.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]  # untyped in torch


def layouts_of(site: Site, samples: int) -> list[Layout]:
    """Where the samples may lie at all operands of a site."""
    axes = site.operands[0].formula.axes(site.shape)
    for operand in site.operands[1:]:
        other = set(operand.formula.axes(site.shape))
        axes = [axis for axis in axes if axis in other]
    return candidates(site.shape, axes, samples)


def readings_of(
    sites: list[Site], parameters: Mapping[str, Tensor], refused: Collection[str] = ()
) -> dict[str, Reading]:
    """How each parameter is read, where that is the same everywhere and its shape is kept.

    Args:
        sites: all of them.
        parameters: by name.
        refused: those with reads that are no site.
    """
    found: dict[str, set[Reading]] = {}
    elsewhere = set(refused)
    for site in sites:
        for operand in site.operands:
            reading = _reading(operand.formula)
            for name in operand.source.names:
                if reading is None or tuple(parameters[name].shape) != tuple(operand.formula.shape):
                    elsewhere.add(name)
                else:
                    found.setdefault(name, set()).add(reading)
    common = {name: _common(readings, name in elsewhere) for name, readings in found.items()}
    return {name: reading for name, reading in common.items() if reading is not None}


def _reading(formula: Formula) -> Reading | None:
    if isinstance(formula, LinearWeight):
        return Reading(1 if formula.transposed else 0)
    if isinstance(formula, ConvWeight):
        return Reading("leading", formula.spec.groups) if formula.spec.transposed else Reading()
    if isinstance(formula, EmbeddingWeight):
        return Reading(tokens=True, padding=None if formula.padding is None else formula.padding % formula.shape[0])
    return None


def _common(readings: set[Reading], elsewhere: bool) -> Reading | None:
    """The one reading; of tables of which a padding row is read elsewhere, the one without it."""
    if all(each.tokens for each in readings) and (elsewhere or len(readings) > 1):
        return Reading(tokens=True)
    return next(iter(readings)) if len(readings) == 1 else None


@dataclass(eq=False)
class Support:
    """What one site has shown.

    Attributes:
        layouts: in which nothing of one sample lies at another.
        samples: those that reach the site.
    """

    layouts: list[Layout]
    samples: set[int] = field(default_factory=set)

    @property
    def sure(self) -> bool:
        """Whether one layout is left, and two samples have told it apart from the others."""
        return len(self.layouts) == 1 and len(self.samples) > 1

    def narrowed(self, other: Support) -> None:
        """Add what the same site has shown in another pass, unless the two exclude each other."""
        both = [layout for layout in self.layouts if layout in other.layouts]
        if both:
            self.layouts, self.samples = both, self.samples | other.samples


def supports(made: TapPass, cotangent: Tensor) -> dict[int, Support]:
    """What each site shows when each sample's cotangent is sent back alone; gradients are not kept."""
    sites, leaves, samples = made.mode.sites, made.mode.leaves, made.samples
    found = {site.number: Support(layouts_of(site, samples)) for site in sites}
    current = 0

    def arrived(site: Site, delta: Tensor | None) -> None:
        support = None if delta is None else delta != 0
        if support is not None and bool(support.any()):
            own = found[site.number]
            own.layouts = [layout for layout in own.layouts if consistent(layout, support, samples, current)]
            own.samples.add(current)

    made.receive = arrived  # type: ignore[method-assign]  # only for this pass
    for n in range(samples):
        current = n
        alone = torch.zeros_like(cotangent)
        alone[n] = cotangent[n]
        if made.z.requires_grad:
            gradients = torch.autograd.grad(made.z, leaves, alone, retain_graph=True, allow_unused=True)
            given = {id(leaf): gradient for leaf, gradient in zip(leaves, gradients, strict=True)}
            for site in sites:
                if site.leaf is not None:
                    arrived(site, given[id(site.leaf)])
    return found


def changes(made: TapPass, other: TapPass, n: int) -> dict[int, Support]:
    """What each site shows when sample n of another pass is another one: where its output changes."""
    found = {}
    before, after = made.mode.outputs or {}, other.mode.outputs or {}
    for site in made.mode.sites:
        one, two = before.get(site.number), after.get(site.number)
        if one is None or two is None or one.shape != two.shape:
            continue
        support = one != two
        if bool(support.any()):
            left = [each for each in layouts_of(site, made.samples) if consistent(each, support, made.samples, n)]
            found[site.number] = Support(left, {n})
    return found


def noisy(model: nn.Module) -> dict[int, Tensor]:
    """By identity of each parameter, values near it of which none is zero."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for _, parameter in parameters_of(model):
        if parameter.is_floating_point():
            value = parameter.detach()
            size = _NOISE * (float(value.norm()) / max(value.numel(), 1) ** 0.5) or _NOISE
            found[id(parameter)] = value + torch.randn(value.shape, generator=generator).mul_(size).to(value)
    return found
