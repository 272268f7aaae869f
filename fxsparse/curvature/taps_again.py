"""Taps in modules that are run once more in the backward pass: attention, recurrent layers, BatchNorm, and others.

The module's outputs and ordinary gradients are its own. When the gradients of its outputs arrive, it is run again from
the same inputs and random numbers with a collector's taps, and they are sent through that run.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fxsparse.curvature.fisher_squares import Squares
from fxsparse.curvature.fisher_types import UncoveredParameter
from fxsparse.curvature.groups import Grouping, element, slices
from fxsparse.curvature.taps_call import is_watched
from fxsparse.curvature.taps_compiled import AgainCompiled, generator_states, registered, spelled
from fxsparse.curvature.taps_fused import check_not_exporting
from fxsparse.curvature.taps_layout import Layout
from fxsparse.curvature.taps_mode import TapMode
from fxsparse.curvature.taps_pass import TapPass, read_once
from fxsparse.curvature.taps_rules import RULES
from fxsparse.curvature.taps_site import Site
from fxsparse.errors import DataError
from fxsparse.graph.scopes import preserved_rng
from fxsparse.nn import masked_weights
from fxsparse.sparsity.random import accelerator_states, used_accelerator

_SLICES = "slices"


@dataclass(frozen=True, eq=False)
class Places:
    """Where the samples lie at the sites of one module, as an examination has found it.

    Attributes:
        layouts: by site, in the order of calls.
        signatures: of each site.
        alone: the sites at which the samples have an axis of their own, which tell how many there are.
    """

    layouts: tuple[Layout, ...]
    signatures: tuple[tuple[Any, ...], ...]
    alone: frozenset[tuple[Any, ...]]

    @staticmethod
    def of(sites: Sequence[Site], layouts: Mapping[int, Layout | None], samples: int) -> Places | str:
        """The places of these sites, or why they cannot be told in another batch."""
        found: dict[tuple[Any, ...], Layout] = {}
        alone = set()
        for site in sites:
            layout = layouts.get(site.number)
            if layout is None:
                return f"the samples lie along no axis at `{site.what}`"
            if found.setdefault(site.signature, layout) != layout:
                return f"the samples lie along other axes each time at `{site.what}`"
            if site.shape[layout.axis] == samples:
                alone.add(site.signature)
        if not alone:
            return "the samples have no axis of their own in it"
        return Places(
            tuple(found[site.signature] for site in sites), tuple(s.signature for s in sites), frozenset(alone)
        )

    def by_number(self, sites: Sequence[Site] | None = None) -> dict[int, Layout | None]:
        """Layouts by number of sites as they were examined, or of other ones by their signatures."""
        if sites is None:
            return dict(enumerate(self.layouts))
        known = dict(zip(self.signatures, self.layouts, strict=True))
        return {site.number: known.get(site.signature) for site in sites}


@dataclass(frozen=True, eq=False)
class _Generators:
    """The states of torch's global random generators."""

    cpu: Tensor = field(default_factory=torch.get_rng_state)
    others: list[Tensor] = field(default_factory=accelerator_states)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.others:
            used_accelerator().set_rng_state_all(self.others)


@dataclass(eq=False)
class _Call:
    """One call: what is needed to run it again."""

    runner: RunAgain
    inputs: list[Any]
    form: Any
    outputs: list[Tensor]
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    rng: _Generators | None = None
    training: dict[nn.Module, bool] = field(default_factory=dict)


class _Again(torch.autograd.Function):
    """The outputs as they are, and the squares of what read the inputs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.count = call, count
        ctx.set_materialize_grads(False)
        return tuple(y.view_as(y) for y in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor | None) -> tuple[Any, ...]:
        squares = ctx.call.runner.squares(ctx.call, deltas)
        return None, None, *deltas, *squares


def tapped_call(
    owner: nn.Module, names: Mapping[str, str], inputs: Sequence[Any], form: Any, layouts: Mapping[int, Layout | None]
) -> tuple[TapMode, list[Tensor]]:
    """Call a module under a mode with taps: the mode, and the floating-point tensors among what it returns.

    Args:
        owner: the module.
        names: first names of its parameters by their names in it.
        inputs: its arguments, flat.
        form: how they hang together.
        layouts: where the samples lie at each site.
    """
    own = {names[name]: parameter for name, parameter in owner.named_parameters() if name in names}
    wide = next(iter(own.values())).dtype
    mode = TapMode(own, [], RULES, lambda site, delta: None, layouts)
    fresh: dict[int, Tensor] = {}  # what is one tensor stays one: attention asks whether queries are keys
    for each in inputs:
        if isinstance(each, Tensor) and id(each) not in fresh:
            copy = each.detach()
            fresh[id(each)] = mode.data(copy.to(wide) if copy.is_floating_point() else copy)
    args, kwargs = pytree.tree_unflatten([fresh.get(id(each), each) for each in inputs], form)
    with mode:
        returned = owner(*args, **kwargs)
    flat = pytree.tree_flatten(returned)[0]
    return mode, [each for each in flat if isinstance(each, Tensor) and each.is_floating_point()]


class RunAgain(nn.Module):
    """Calls a module whose backward pass hands squares of per-sample gradients to statistics.

    Args:
        owner: the module; it stays where it is, in its own place of the tree.
        statistics: by parameter, named as in the owner, the parameter of zeros and along which axis (0, 1) its slices
            lie, None for single entries.
        places: where samples lie.
        names: by parameter of the owner, the first name in the model, which the sites carry.
        copied: whether outputs are copied, for readers in place.
    """

    def __init__(
        self,
        owner: nn.Module,
        statistics: Mapping[str, tuple[nn.Parameter, int | None]],
        places: Places,
        names: Mapping[str, str],
        copied: bool,
    ) -> None:
        super().__init__()
        self._held = (owner, {name: statistic for name, (statistic, _) in statistics.items()})
        own = dict(owner.named_parameters())
        self._groupings: dict[str, tuple[Grouping, ...]] = {full: () for full in names.values()}
        for name, (_, axis) in statistics.items():
            shape = tuple(own[name].shape)
            self._groupings[names[name]] = (element(shape) if axis is None else slices(_SLICES, shape, axis),)
        self._places, self._names, self._copied = places, dict(names), copied
        self._layouts: dict[tuple[Any, ...], dict[int, Layout | None]] = {}
        self._number = registered(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # untyped in torch
        self._number = registered(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The owner's outputs, bit for bit."""
        check_not_exporting()
        if not torch.is_grad_enabled() or is_watched():
            return self._held[0](*args, **kwargs)
        return self._in_compiled_code(args, kwargs) if torch.compiler.is_compiling() else self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner, statistics = self._held
        inputs, form = pytree.tree_flatten((args, kwargs))
        given = [each for each in inputs if isinstance(each, Tensor)]
        call = _Call(self, inputs, form, [], [(each, each._version) for each in given])
        call.rng = _Generators() if owner.training else None
        call.training = {module: module.training for module in owner.modules()}
        flat, spec = pytree.tree_flatten(owner(*args, **kwargs))
        where = [k for k, each in enumerate(flat) if isinstance(each, Tensor) and each.is_floating_point()]
        call.outputs = [flat[k].detach() for k in where]
        tapped = _Again.apply(call, len(where), *(flat[k] for k in where), *statistics.values())  # type: ignore[no-untyped-call]  # untyped in torch
        for k, each in zip(where, tapped, strict=True):
            flat[k] = each.clone() if self._copied else each
        return pytree.tree_unflatten(flat, spec)

    def _in_compiled_code(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner, statistics = self._held
        inputs: list[Tensor] = []
        text = spelled((args, kwargs), inputs)
        training = "".join(["1" if module.training else "0" for module in owner.modules()])
        states: list[Tensor] = []
        if owner.training:
            first, (copy, *states) = inputs[0], generator_states(inputs[0])
            args, kwargs = pytree.tree_map(lambda each: copy if each is first else each, (args, kwargs))
        flat, spec = pytree.tree_flatten(owner(*args, **kwargs))
        where = [k for k, each in enumerate(flat) if isinstance(each, Tensor) and each.is_floating_point()]
        tensors = [*(flat[k] for k in where), *inputs, *states, *statistics.values()]
        counts = len(where), len(inputs), len(states)
        tapped = AgainCompiled.apply(self._number, text, training, counts, *tensors)  # type: ignore[no-untyped-call]  # untyped in torch
        for k, each in zip(where, tapped, strict=True):
            flat[k] = each.clone() if self._copied else each
        return pytree.tree_unflatten(flat, spec)

    def squares_of(
        self,
        arguments: Any,
        training: Sequence[bool],
        outputs: list[Tensor],
        deltas: list[Tensor],
        states: list[Tensor],
    ) -> list[Tensor]:
        """The same from what compiled code hands over."""
        inputs, form = pytree.tree_flatten(arguments)
        call = _Call(self, inputs, form, outputs)
        call.rng = _Generators(states[0], states[1:]) if states else None
        call.training = dict(zip(self._held[0].modules(), training, strict=True))
        found = self.squares(call, deltas)
        pairs = zip(found, self._held[1].values(), strict=True)
        return [torch.zeros_like(statistic) if value is None else value for value, statistic in pairs]

    def squares(self, call: _Call, deltas: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What belongs to each statistic, for the gradients of the outputs.

        Raises:
            DataError: an input was overwritten since the call.
            UncoveredParameter: the run differs from the call, or from the run that was examined.
        """
        owner, statistics = self._held
        if any(tensor._version != version for tensor, version in call.versions):
            raise DataError(f"an input of {self} was modified in place after the call: write that out of place")
        if all(delta is None for delta in deltas):
            return [None] * len(statistics)
        if any(isinstance(module, _BatchNorm) and training for module, training in call.training.items()):
            return [torch.zeros_like(statistic) for statistic in statistics.values()]  # `Instrumented.fisher` refuses
        with _as_called(owner, call), torch.enable_grad():
            made = self._run(call, deltas)
            masks = {
                self._names[name]: each.mask for name, each in masked_weights(owner).items() if name in self._names
            }
            found = Squares(made.samples, self._groupings, masks, False, False)
            found.backward(made, torch.ones_like(made.z), 1.0, keep=False)
            found.close()
        result: list[Tensor | None] = []
        for name, statistic in statistics.items():
            value = found.values.get((self._names[name], self._groupings[self._names[name]][0].group_type))
            wide = None if value is None else value.to(statistic.dtype).sum(0).view_as(statistic)
            result.append(wide)
        return result

    def _run(self, call: _Call, deltas: Sequence[Tensor | None]) -> TapPass:
        """A run with taps, its outputs times their gradients as the one that is sent back."""
        key = tuple(tuple(x.shape) for x in call.inputs if isinstance(x, Tensor))
        layouts = self._layouts.get(key)
        mode, outputs = self._tapped(call, self._places.by_number() if layouts is None else layouts)
        if layouts is None and tuple(site.signature for site in mode.sites) != self._places.signatures:
            layouts = self._places.by_number(mode.sites)
            mode, outputs = self._tapped(call, layouts)
        self._layouts[key] = layouts = self._places.by_number() if layouts is None else layouts
        self._check(call, outputs)
        n = self._samples(mode, layouts)
        pairs = [(y, d) for y, d in zip(outputs, deltas, strict=True) if d is not None]
        z = torch.stack([(y * d.to(y.dtype)).sum() for y, d in pairs]).sum()
        made = TapPass(mode, z, n, layouts)
        made.single = read_once(mode.sites)
        held = weakref.ref(made)  # the graph's hooks must not keep the graph alive

        def receive(site: Site, delta: Tensor) -> None:
            alive = held()
            if alive is not None:
                alive.receive(site, delta)

        mode.receive = receive
        return made

    def _samples(self, mode: TapMode, layouts: Mapping[int, Layout | None]) -> int:
        """How many samples there are."""
        sizes: dict[Site, int] = {}
        for site in mode.sites:
            layout = layouts.get(site.number)
            if layout is not None:
                sizes[site] = site.shape[layout.axis]
        samples = {size for site, size in sizes.items() if site.signature in self._places.alone}
        n = samples.pop() if len(samples) == 1 else 0
        if not n or mode.uncovered or len(sizes) < len(mode.sites) or any(size % n for size in sizes.values()):
            raise UncoveredParameter(
                f"{self} does other things than on the example inputs: leave it out with `parameters`, or use "
                "FisherCollector"
            )
        return n

    def _tapped(self, call: _Call, layouts: Mapping[int, Layout | None]) -> tuple[TapMode, list[Tensor]]:
        if call.rng is not None:
            call.rng.restore()
        return tapped_call(self._held[0], self._names, call.inputs, call.form, layouts)

    def _check(self, call: _Call, outputs: Sequence[Tensor]) -> None:
        """The second run must give what the first one gave."""
        for y, before in zip(outputs, call.outputs, strict=True):
            eps = max(torch.finfo(before.dtype).eps, torch.finfo(y.dtype).eps)
            worst = float((y.detach() - before).abs().max()) if y.numel() else 0.0
            if not worst <= eps**0.6 * max(float(before.abs().max()) if y.numel() else 0.0, 1e-30):
                raise UncoveredParameter(
                    f"{self} gives other outputs (by {worst:.3g}) when it is run again, as dropout between recurrent "
                    "layers does: put it into evaluation mode, or leave it out with `parameters`"
                )

    def __repr__(self) -> str:
        names = ", ".join(f"`{self._names[name]}`" for name in self._held[1])
        return f"{type(self._held[0]).__name__} with {names}"


@contextlib.contextmanager
def _as_called(owner: nn.Module, call: _Call) -> Iterator[None]:
    """Flags as at the call, no autocast; flags, buffers and random generators are given back."""
    buffers = [(each, each._version, each.clone()) for each in owner.buffers() if each.dtype is not torch.bool]
    now = {module: module.training for module in call.training}
    kind = next(iter(owner.parameters())).device.type
    with preserved_rng(), torch.autocast(kind, enabled=False):
        try:
            for module, training in call.training.items():
                module.training = training
            yield
        finally:
            for module, training in now.items():
                module.training = training
            with torch.no_grad():
                for each, version, value in buffers:
                    if each._version != version:
                        each.copy_(value)
