"""The taps of a model, and how they are made sure of.

The first batch is examined on a few samples: where the samples lie at each site, and whether the per-sample gradients
that come out equal those of autograd. A parameter of which that cannot be shown goes the slow way
(`taps_fallback`), with the reason. A site that no gradient has reached yet, or where values of the inputs tell where
the samples lie, is checked again in each pass (`taps_checked`).
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.fisher_batch import FisherBatch
from fxsparse.curvature.groups_types import Reading
from fxsparse.curvature.taps_autograd import Autograd, Output, Values
from fxsparse.curvature.taps_checked import checked
from fxsparse.curvature.taps_examined import (
    Support,
    changes,
    noisy,
    readings_of,
    sketched,
    supports,
)
from fxsparse.curvature.taps_layout import Layout
from fxsparse.curvature.taps_mode import TapMode
from fxsparse.curvature.taps_pass import Part, TapPass, read_once
from fxsparse.curvature.taps_rules import RULES
from fxsparse.curvature.taps_site import Site, names_of
from fxsparse.errors import DataError

_TRAILS = 4096
_FAILS = (RuntimeError, DataError, TypeError, AttributeError, ValueError, IndexError)


class Unstable(Exception):
    """The model took another path than on the samples that were examined."""


class Taps:
    """The taps of a model, examined on its first batch.

    Args:
        model: the model; it is run as it is.
        parameters: by first name, those that are wanted.
        output: takes the outputs z out of what the model returns.

    Attributes:
        layouts: where the samples lie at each site, by number; None where they lie along no axis.
        unsure: the layouts that are left at sites where that has not been shown yet.
        refused: parameters that have no taps, and why.
        readings: how parameters are read.
        shared: numbers of inputs that belong to every sample, though they have as many rows as there are samples.
        broken: whether there is no pass with taps at all.
        evidence: the samples that were examined, random cotangents of their outputs, sketches of the gradients.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], output: Output) -> None:
        self.model, self.parameters, self.output = model, dict(parameters), output
        self._autograd = Autograd(model, self.parameters, output)
        self._wanted = {id(parameter) for parameter in parameters.values()}
        self.others = [p for p in model.parameters() if id(p) not in self._wanted and p.requires_grad]
        self.layouts: dict[int, Layout | None] = {}
        self.unsure: dict[int, list[Layout]] = {}
        self.signatures: list[tuple[Any, ...]] = []
        self.trails: set[int] = set()
        self.readings: dict[str, Reading] = {}
        self.refused: dict[str, str] = {}
        self.shared: frozenset[int] = frozenset()
        self.broken = False
        self.evidence: tuple[FisherBatch, Tensor, dict[str, Tensor]]

    def run(self, batch: FisherBatch) -> TapPass:
        """A forward pass with taps; its `refused` are those of the taps and those whose samples lie elsewhere in it.

        Raises:
            Unstable: it differs from the pass that was examined.
        """
        if self.broken:
            raise Unstable
        made = self._run(batch, self.layouts, watched=self.unsure, trails=self.trails)
        if [site.signature for site in made.mode.sites] != self.signatures:
            raise Unstable
        if not set(made.mode.uncovered) <= set(self.refused):
            raise Unstable
        self._place(made)
        made.single = read_once(made.mode.sites, made.refused)
        return made

    def _place(self, made: TapPass) -> None:
        """Check the places of samples where they are not known beforehand."""
        open_: dict[int, list[Layout]] = {}
        for site in made.mode.sites:
            layout = self.layouts.get(site.number)
            if layout is None:
                continue
            left = self.unsure.get(site.number)
            asked = left if left is not None and site.leaf is None else [layout]
            fitting = [each for each in asked if each.fits(site.shape[each.axis], made.samples)]
            if site.moved or left is not None:
                open_[site.number] = fitting
            elif not fitting:
                raise Unstable
        layouts, refused = dict(self.layouts), dict(self.refused)
        known = True
        for number, shown in (checked(made, open_) if open_ else {}).items():
            site = made.mode.sites[number]
            known &= bool(shown.layouts) and (shown.samples > 1 or not site.moved)
            if shown.layouts:
                layouts[number] = shown.layouts[0]
            else:
                reason = f"the samples lie elsewhere in this batch at `{site.what}`"
                refused |= {name: reason for name in names_of(site) if name not in refused}
            if not site.moved and made.samples > 1:
                self._learn(site, shown.layouts, shown.samples)
        made.layouts, made.refused = layouts, refused
        if known and len(self.trails) < _TRAILS:
            self.trails.update(made.mode.path.trails)

    def _learn(self, site: Site, holding: list[Layout], samples: int) -> None:
        """What one pass has shown of an unsure site holds in all."""
        if site.leaf is not None:
            left = self.unsure[site.number]
            holding = left[:1] if holding and samples > 1 else left if holding else left[1:]
            self.layouts[site.number] = holding[0] if holding else None
        self.unsure[site.number] = holding
        if len(holding) == 1 and samples > 1:
            self.layouts[site.number] = self.unsure.pop(site.number)[0]

    def _run(
        self,
        batch: FisherBatch,
        layouts: Mapping[int, Layout | None] | None,
        values: Values | None = None,
        watched: Container[int] | None = None,
        trails: Container[int] | None = None,
        outputs: bool = False,
    ) -> TapPass:
        held: list[weakref.ref[TapPass]] = []  # weak: the graph's hooks must not keep the graph alive

        def receive(site: Site, delta: Tensor) -> None:
            made = held[0]() if held else None
            if made is not None:
                made.receive(site, delta)

        others = self.others if values is None else [p for p in self.model.parameters() if id(p) not in self._wanted]
        mode = TapMode(self.parameters, others, RULES, receive, layouts, values, watched, trails)
        mode.outputs = {} if outputs else None
        args, kwargs, tensors = batch.copied()
        for tensor in tensors:
            mode.data(tensor)
        try:
            with mode:
                returned = self.model(*args, **kwargs)
            z = self.output(returned)
            made = TapPass(mode, z, batch.samples, layouts or {}, self.refused, edges=mode.edges)
        finally:
            mode.edges = {}
        held.append(weakref.ref(made))
        return made

    def examine(self, batch: FisherBatch) -> None:
        """Find the layouts on a few samples and compare the per-sample gradients with autograd's.

        Raises:
            CoupledSamples: the outputs of one sample depend on the others.
            DataError: gradients are NaN or infinite, or outputs do not have the samples along axis 0.
        """
        few, references, cotangent, self.shared = self._autograd.first(batch)
        for name, reference in references.items():
            if not bool(reference.isfinite().all()):
                raise DataError(
                    f"`{name}` has gradients in this batch that are NaN or infinite; nothing was added: look for NaN "
                    "or huge values in its inputs, its targets and the weights"
                )
        self.evidence = few, cotangent, references
        try:
            self._find_layouts(few, cotangent)
            made = self._run(few, self.layouts)
        except _FAILS as error:
            self.refused = dict.fromkeys(self.parameters, f"its operators cannot be tapped ({error})")
            self.broken = True
            return
        if not self._is_the_model(few, made.z):
            self.refused = dict.fromkeys(
                self.parameters, "the model's outputs are others when its operators are tapped"
            )
            self.broken = True
            return
        self.signatures = [site.signature for site in made.mode.sites]
        self.trails = set(made.mode.path.trails)
        self.refused = dict(made.mode.uncovered)
        for site in made.mode.sites:
            if self.layouts.get(site.number) is None:
                reason = f"the samples lie along no axis at `{site.what}`"
                self.refused.update(dict.fromkeys(names_of(site), reason))
        self._compare(made, cotangent, references)
        self._compare_idle(few, cotangent, references)
        self.readings = readings_of(made.mode.sites, self.parameters, self.refused)

    @torch.no_grad()
    def _is_the_model(self, few: FisherBatch, z: Tensor) -> bool:
        """Whether the outputs with taps are the model's, up to rounding."""
        args, kwargs = few.fresh()
        own = self.output(self.model(*args, **kwargs))
        bound = 100 * torch.finfo(own.dtype).eps ** 0.75 * float(own.abs().max()) if own.numel() else 0.0
        return own.shape == z.shape and not bool(((z - own).abs() > bound).any())

    def _find_layouts(self, few: FisherBatch, cotangent: Tensor) -> None:
        """The layouts of each site in which nothing of one sample lies at another.

        Weights of zero let no gradient through: where that leaves a site open, it is asked again near the weights.
        Where no gradient arrives for other reasons, one sample is exchanged for another, and the site's output tells.
        """
        made = self._run(few, None)
        found = supports(made, cotangent)
        moved = {site.number for site in made.mode.sites if site.moved}
        told = [(site.signature, site.shape) for site in made.mode.sites]

        def add(other: TapPass, shown: Mapping[int, Support]) -> None:
            if told == [(site.signature, site.shape) for site in other.mode.sites]:
                for number, each in shown.items():
                    found[number].narrowed(each)

        def open_() -> bool:
            return any(not each.sure for number, each in found.items() if number not in moved)

        values = noisy(self.model) if open_() else None
        try:
            if open_():
                near = self._run(few, None, values)
                add(near, supports(near, cotangent))
            if open_():
                near = self._run(few, None, values, outputs=True)
                for n in range(few.samples):
                    other = few.select([(k + 1) % few.samples if k == n else k for k in range(few.samples)])
                    add(near, changes(near, self._run(other, None, values, outputs=True), n))
        except _FAILS:
            pass  # weights or samples cannot be varied: what is open is checked in each pass
        self.layouts = {number: each.layouts[0] if each.layouts else None for number, each in found.items()}
        self.unsure = {
            number: each.layouts
            for number, each in found.items()
            if each.layouts and not each.sure and number not in moved
        }

    def _compare(self, made: TapPass, cotangent: Tensor, references: dict[str, Tensor]) -> None:
        """Refuse the parameters whose per-sample gradients are not autograd's."""
        self.refused |= dict.fromkeys(
            self._differing(made, cotangent, references),
            "the taps miss some of its uses, which do not go through torch's operators",
        )

    def _compare_idle(self, few: FisherBatch, cotangent: Tensor, references: Mapping[str, Tensor]) -> None:
        """The same near the weights, for parameters whose gradients are zero at the weights themselves."""
        idle = [name for name, each in references.items() if name not in self.refused and not bool(each.any())]
        if not idle:
            return
        values = noisy(self.model)
        reason = "its gradient is zero in the first batch, so that its taps cannot be compared with autograd"
        try:
            near, _, cotangent = self._autograd.references(few, values)
            made = self._run(few, self.layouts, values)
            differing = self._differing(made, cotangent, {name: near[name] for name in idle})
        except _FAILS:
            differing = idle
        self.refused |= dict.fromkeys(differing, reason)

    def _differing(self, made: TapPass, cotangent: Tensor, references: Mapping[str, Tensor]) -> Iterable[str]:
        """The parameters, of those that are not refused, whose per-sample gradients are not the references."""
        mine = {name: torch.zeros_like(reference) for name, reference in references.items()}

        def take(name: str, parts: list[Part]) -> None:
            if name in mine:
                for n, row in enumerate(mine[name]):
                    row.copy_(sketched(made.per_sample(name, parts, n, n + 1)[0]))

        made.refused = self.refused
        made.single = read_once(made.mode.sites, self.refused)
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
                yield name
