"""The taps of a model, and how they are made sure of.

The first batch is examined on a few samples: where the samples lie at each site, and whether the per-sample gradients
that come out equal those of autograd. A parameter of which that cannot be shown goes the slow way
(`taps_fallback`), with the reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.fisher_batch import FisherBatch
from fxsparse.curvature.fisher_types import CoupledSamples
from fxsparse.curvature.groups_types import Reading
from fxsparse.curvature.taps_call import call_with
from fxsparse.curvature.taps_formulas import ConvWeight, EmbeddingWeight, LinearWeight
from fxsparse.curvature.taps_layout import Layout, candidates, consistent
from fxsparse.curvature.taps_mode import Site, TapMode
from fxsparse.curvature.taps_pass import Part, TapPass, read_once
from fxsparse.curvature.taps_rules import RULES
from fxsparse.errors import DataError
from fxsparse.graph.inputs import tensors_of

_SKETCH = 4096
EXAMINED = 3
"""How many samples are examined."""

Output = Callable[[Any], Tensor]


class Unstable(Exception):
    """The model took another path than on the samples that were examined."""


class Taps:
    """The taps of a model, examined on its first batch.

    Args:
        model: the model; it is run as it is.
        parameters: by first name, those that are wanted.
        output: takes the outputs z out of what the model returns.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], output: Output) -> None:
        self.model, self.parameters, self.output = model, dict(parameters), output
        wanted = {id(parameter) for parameter in parameters.values()}
        self.others = [p for p in model.parameters() if id(p) not in wanted and p.requires_grad]
        self.layouts: dict[int, Layout | None] = {}
        self.signatures: list[tuple[Any, ...]] = []
        self.readings: dict[str, Reading] = {}
        self.refused: dict[str, str] = {}
        self.evidence: tuple[FisherBatch, Tensor, dict[str, Tensor]]

    def run(self, batch: FisherBatch) -> TapPass:
        """A forward pass with taps.

        Raises:
            Unstable: it differs from the pass that was examined.
        """
        made = self._run(batch, self.layouts)
        signatures = [site.signature for site in made.mode.sites]
        for site in made.mode.sites:
            layout = self.layouts.get(site.number)
            if signatures[site.number : site.number + 1] != self.signatures[site.number : site.number + 1] or (
                layout is not None and not layout.fits(site.shape[layout.axis], batch.samples)
            ):
                raise Unstable
        uncovered = set(made.mode.uncovered) - set(self.refused)
        if len(signatures) != len(self.signatures) or uncovered:
            raise Unstable
        made.single = read_once(made.mode.sites)
        return made

    def _run(self, batch: FisherBatch, layouts: Mapping[int, Layout | None] | None) -> TapPass:
        held: list[weakref.ref[TapPass]] = []  # weak: the graph's hooks must not keep the graph alive

        def receive(site: Site, delta: Tensor) -> None:
            made = held[0]() if held else None
            if made is not None:
                made.receive(site, delta)

        mode = TapMode(self.parameters, self.others, RULES, receive, layouts)
        args, kwargs = batch.fresh()
        for tensor in tensors_of((args, kwargs)):
            mode.data(tensor)
        with mode:
            returned = self.model(*args, **kwargs)
        z = self.output(returned)
        made = TapPass(mode, z, batch.samples, layouts or {})
        held.append(weakref.ref(made))
        return made

    def examine(self, batch: FisherBatch) -> None:
        """Find the layouts on a few samples and compare the per-sample gradients with autograd's.

        Raises:
            CoupledSamples: the outputs of one sample depend on the others.
        """
        few = batch.select(list(range(min(EXAMINED, batch.samples))) if batch.samples > 1 else [0, 0])
        generator = torch.Generator().manual_seed(0)
        references, plain, cotangent = self._references(few, generator)
        self.evidence = few, cotangent, references
        self._check_uncoupled(few, plain)
        try:
            self.layouts = self._find_layouts(few, cotangent)
        except (RuntimeError, DataError, TypeError, AttributeError, ValueError) as error:
            self.refused = dict.fromkeys(self.parameters, f"its operators cannot be tapped ({error})")
            return
        try:
            made = self._run(few, self.layouts)
        except (RuntimeError, DataError, TypeError, AttributeError, ValueError) as error:
            self.refused = dict.fromkeys(self.parameters, f"its operators cannot be tapped ({error})")
            return
        self.signatures = [site.signature for site in made.mode.sites]
        self.refused = dict(made.mode.uncovered)
        for site in made.mode.sites:
            if self.layouts.get(site.number) is None:
                for operand in site.operands:
                    reason = f"the samples lie along no axis at `{site.what}`"
                    self.refused.update(dict.fromkeys(operand.source.names, reason))
        self._compare(made, cotangent, references)
        self.readings = _readings(made.mode.sites, self.parameters)

    def _references(self, few: FisherBatch, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Per-sample gradients by autograd alone, sketched, of random cotangents; the outputs and the cotangents."""
        leaves = {name: p.detach().requires_grad_(True) for name, p in self.parameters.items()}
        references = {name: sketches_like(leaf, few.samples) for name, leaf in leaves.items()}
        args, kwargs = few.fresh()
        z = self.output(call_with(self.model, leaves, args, kwargs))
        if not z.ndim or z.shape[0] != few.samples:
            raise DataError(
                f"the outputs (={tuple(z.shape)}) must have the samples along axis 0: give `output`, a function that "
                "takes them out of what the model returns"
            )
        cotangent = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
        for n in range(few.samples):
            handles = [_sketch_on_arrival(leaf, references[name][n]) for name, leaf in leaves.items()]
            try:
                if z.requires_grad:
                    torch.autograd.backward(z[n], cotangent[n], retain_graph=True, inputs=list(leaves.values()))
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                raise DataError(
                    "the model overwrites a tensor in place that its gradients need, so that it cannot be trained "
                    f"either: write the operation out of place ({error})"
                ) from error
            finally:
                for handle in handles:
                    handle.remove()
        return references, z.detach(), cotangent

    @torch.no_grad()
    def _check_uncoupled(self, few: FisherBatch, z: Tensor) -> None:
        """The outputs of the first sample must not change with the others."""
        again = few.select([0] * few.samples) if few.samples > 1 else few
        args, kwargs = again.fresh()
        alone = self.output(self.model(*args, **kwargs))[:1]
        scale = float(z[:1].abs().max()) if z.numel() else 0.0
        difference = float((alone - z[:1]).abs().max()) if z.numel() else 0.0
        if difference > 100 * torch.finfo(z.dtype).eps ** 0.75 * max(scale, 1e-30):
            raise CoupledSamples(
                f"the outputs of a sample change by {difference:.3g} when the other samples of its batch change, so "
                "that it has no gradient of its own: remove what mixes samples (batch statistics, randomness)"
            )

    def _find_layouts(self, few: FisherBatch, cotangent: Tensor) -> dict[int, Layout | None]:
        """The first layout of each site in which nothing of one sample lies at another; gradients are not kept."""
        made = self._run(few, None)
        sites, leaves = made.mode.sites, made.mode.leaves
        left = {site.number: _layouts(site, few.samples) for site in sites}
        current = 0

        def arrived(site: Site, delta: Tensor | None) -> None:
            if delta is not None:
                support = delta != 0
                left[site.number] = [y for y in left[site.number] if consistent(y, support, few.samples, current)]

        made.receive = arrived  # type: ignore[method-assign]  # only for this pass
        for n in range(few.samples):
            current = n
            alone = torch.zeros_like(cotangent)
            alone[n] = cotangent[n]
            if made.z.requires_grad:
                found = torch.autograd.grad(made.z, leaves, alone, retain_graph=True, allow_unused=True)
                given = {id(leaf): gradient for leaf, gradient in zip(leaves, found, strict=True)}
                for site in sites:
                    if site.leaf is not None:
                        arrived(site, given[id(site.leaf)])
        return {number: found[0] if found else None for number, found in left.items()}

    def _compare(self, made: TapPass, cotangent: Tensor, references: dict[str, Tensor]) -> None:
        """Refuse the parameters whose per-sample gradients are not autograd's."""
        mine = {name: torch.zeros_like(reference) for name, reference in references.items()}

        def take(name: str, parts: list[Part]) -> None:
            for n, row in enumerate(mine[name]):
                row.copy_(sketched(made.per_sample(name, parts, n, n + 1)[0]))

        made.single = read_once(made.mode.sites)
        for name, parts in made.parts(cotangent, lambda name, part: take(name, [part]), keep=False).items():
            take(name, parts)
        total = torch.stack([r.double().norm() for r in references.values()]).norm() if references else 0.0
        for name, reference in references.items():
            if name in self.refused:
                continue
            eps = torch.finfo(reference.dtype).eps
            floor = 1e-3 * float(total) if eps > 1e-10 else 1e-6 * float(total)
            difference = float((mine[name] - reference).double().norm())
            if not difference <= eps**0.6 * (float(reference.double().norm()) + floor):
                self.refused[name] = "the taps miss some of its uses, which do not go through torch's operators"


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


def _sketch_on_arrival(leaf: Tensor, into: Tensor) -> Any:
    def take(tensor: Tensor) -> None:
        assert tensor.grad is not None
        into.copy_(sketched(tensor.grad))
        tensor.grad = None

    return leaf.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]  # untyped in torch


def _layouts(site: Site, samples: int) -> list[Layout]:
    """Where the samples may lie at all operands of a site."""
    axes = site.operands[0].formula.axes(site.shape)
    for operand in site.operands[1:]:
        other = set(operand.formula.axes(site.shape))
        axes = [axis for axis in axes if axis in other]
    return candidates(site.shape, axes, samples)


def _readings(sites: list[Site], parameters: Mapping[str, Tensor]) -> dict[str, Reading]:
    """How each parameter is read, where that is the same everywhere and its shape is kept."""
    found: dict[str, set[Reading]] = {}
    for site in sites:
        for operand in site.operands:
            formula = operand.formula
            for name in operand.source.names:
                if tuple(parameters[name].shape) != tuple(formula.shape):
                    continue
                if isinstance(formula, LinearWeight):
                    found.setdefault(name, set()).add(Reading(1 if formula.transposed else 0))
                elif isinstance(formula, ConvWeight):
                    spec = formula.spec
                    found.setdefault(name, set()).add(Reading("leading", spec.groups) if spec.transposed else Reading())
                elif isinstance(formula, EmbeddingWeight):
                    found.setdefault(name, set()).add(Reading(tokens=True))
    return {name: readings.pop() for name, readings in found.items() if len(readings) == 1}
