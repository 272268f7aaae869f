"""G for the masked weights over all backward passes of one optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxsparse.nn import DenseGradients, MaskedWeight
from fxsparse.nn.functional import is_wrapped
from fxsparse.nn.sharded import is_sharded, part, part_like, rebuilt
from fxsparse.training.packed_gradient import PackedGradient, all_finite

Gradient = Tensor | PackedGradient
"""G of a weight; in alive-only storage what it is made of."""


@overload
def dense_of(gradient: Gradient) -> Tensor: ...
@overload
def dense_of(gradient: Gradient | None) -> Tensor | None: ...
def dense_of(gradient: Gradient | None) -> Tensor | None:
    """G for every position."""
    return gradient.dense() if isinstance(gradient, PackedGradient) else gradient


def is_finite(gradient: Gradient) -> bool:
    """Whether G is finite everywhere."""
    return gradient.is_finite() if isinstance(gradient, PackedGradient) else all_finite(gradient)


class GradientWindow:
    """Collects dense gradients between two optimizer steps, as `.grad` collects masked ones.

    Micro-batches add up; a backward pass that finds `.grad` freshly cleared starts the sum anew, so that a batch which
    was thrown away (an overflow under a `GradScaler`) leaves nothing behind. Forward passes must run while it is open.

    Args:
        weights: The weights to watch, by name.
    """

    def __init__(self, weights: Mapping[str, MaskedWeight]) -> None:
        self._taps = {name: _Tap(weight) for name, weight in weights.items()}

    def open(self) -> None:
        """Begin to watch, with empty sums."""
        for tap in self._taps.values():
            tap.open()

    def close(self) -> None:
        """Stop watching and forget the sums."""
        for tap in self._taps.values():
            tap.close()

    def gate(self, kept: Mapping[str, Callable[[], Tensor]]) -> None:
        """Expect of sharded weights that `.grad` is zeroed outside of `kept` each time, once the window has seen it.

        Such a weight hides nothing from its gradient: a resurrection phase opened its mask.
        """
        for name, each in kept.items():
            self._taps[name].gate(each)

    def read(self) -> dict[str, Gradient | None]:
        """The sum of each weight; None where no gradient arrived."""
        return {name: tap.read() for name, tap in self._taps.items()}


class _Tap:
    """One weight's hooks: `arrive` before a backward pass is added to `.grad`, `settle` after it."""

    def __init__(self, weight: MaskedWeight) -> None:
        self.weight = weight
        self.total: Gradient | None = None
        self._arrived: Gradient | None = None  # the next total, until `.grad` takes the backward pass in
        self._hidden: DenseGradients | None = None
        self._hooks: list[RemovableHandle] = []
        self._settled: tuple[Tensor, int] | None = None
        self._shards: Shards | None = None

    def open(self) -> None:
        self.close()
        parameter = self.weight.weight
        if not parameter.requires_grad:
            return
        if is_sharded(parameter):
            self._shards = Shards(self.weight)
            self._hidden = self._shards.hidden
            self._hidden.start()
            self._hooks = self._shards.watch()
            return
        if self.weight.spec.hides_gradient:  # else the parameter's own gradient is G
            self._hidden = DenseGradients([self.weight.sink], defer=self.weight.packed)
            self._hidden.start()
        self._hooks = [
            parameter.register_hook(weakly(self.arrive)),  # type: ignore[no-untyped-call]  # torch
            parameter.register_post_accumulate_grad_hook(weakly(self.settle)),  # type: ignore[no-untyped-call]  # torch
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._hidden is not None:
            self._hidden.stop()
        self._hooks, self._hidden, self.total, self._arrived, self._settled = [], None, None, None, None
        self._shards = None

    def gate(self, kept: Callable[[], Tensor]) -> None:
        if self._shards is not None:
            self._shards.kept = kept

    def read(self) -> Gradient | None:
        """The sum; of a sharded weight this rank's own, of which the mean over ranks is G."""
        return self.total if self._shards is None else self._shards.total()

    @torch.no_grad()
    def arrive(self, gradient: Tensor) -> None:
        """Add one backward pass: what reached the parameter, and what the mask hid from it."""
        if is_wrapped(gradient):  # of `torch.autograd.grad`, which adds nothing to `.grad`
            return
        gradient = (gradient.to_dense() if gradient.is_sparse else gradient).detach()
        before = None if self.total is None or self._cleared() else self.total
        if self.weight.packed:
            self._arrived = self._packed(gradient, before if isinstance(before, PackedGradient) else None)
            return
        assert not isinstance(before, PackedGradient)
        hidden = None if self._hidden is None else self._hidden.read(self.weight.sink)
        if hidden is not None:
            gradient = torch.where(self.weight.mask, gradient, gradient + hidden)
        if self._hidden is not None:
            self._hidden.clear()
        if before is not None:
            self._arrived = before + gradient
        else:
            self._arrived = gradient.clone() if hidden is None else gradient

    def _packed(self, gradient: Tensor, before: PackedGradient | None) -> PackedGradient:
        assert self._hidden is not None
        hidden = self._hidden.summands(self.weight.sink)
        self._hidden.clear()
        return PackedGradient.of(self.weight, gradient, hidden) if before is None else before.plus(gradient, hidden)

    def settle(self, parameter: Tensor) -> None:
        """Take the backward pass in, which `torch.autograd.grad` never reaches, and remember `.grad` as it left it."""
        self.total, self._arrived = self._arrived, None
        if parameter.grad is not None:
            self._settled = (parameter.grad, parameter.grad._version)

    def _cleared(self) -> bool:
        """Whether `.grad` was emptied since the last backward pass."""
        present = self.weight.weight.grad
        if present is None:
            return True
        if self._settled is not None and self._settled[0] is present and self._settled[1] == present._version:
            return False
        return not present.is_sparse and not bool(present.any())


class Shards:
    """G of a weight that `fully_shard` spread: its gradient arrives reduced and cut, what the mask hid arrives here.

    Where the mask hides nothing (the gradient is masked at the parameter, or a resurrection phase opened the mask) all
    of it arrives reduced, and is seen here before the rest is zeroed.

    Attributes:
        kept: What then stays of `.grad` after each reduced backward pass.
    """

    def __init__(self, weight: MaskedWeight) -> None:
        self.weight, self.hidden = weight, DenseGradients([weight.sink])
        self._parameter = weight.weight  # in a forward pass the module holds another one, whole
        self._lost: Tensor | None = None
        self._held: Tensor | None = None  # `.grad` here, as the last reduced backward pass left it
        self._seen: Tensor | None = None
        self._cleared = False
        self.kept: Callable[[], Tensor] | None = None if weight.spec.hides_gradient else lambda: weight.mask
        self._gone: Tensor | None = None  # the sum of what was zeroed here

    def watch(self) -> list[RemovableHandle]:
        """Hooks before each forward pass of the weight's module and after each reduced backward pass."""
        parameter, owner = self._parameter, self.weight.owners[0][0]
        reference = weakref.WeakMethod(self._look)

        def before(module: nn.Module, inputs: object) -> None:
            look = reference()
            if look is not None:
                look()

        settle = parameter.register_post_accumulate_grad_hook(weakly(self.settle))  # type: ignore[no-untyped-call]  # torch
        hooks: Any = parameter._post_accumulate_grad_hooks
        hooks.move_to_end(settle.id, last=False)  # before any that masks
        return [settle, owner.register_forward_pre_hook(before)]

    @torch.no_grad()
    def _look(self) -> None:
        """Whether `.grad` was emptied since it was seen, in place or not; FSDP adds to it without a trace."""
        present = self._parameter.grad
        if self._held is None:
            return
        if present is None or present is not self._seen or not torch.equal(part(present), self._held):
            self._cleared = True

    @torch.no_grad()
    def settle(self, parameter: Tensor) -> None:
        """After a reduced backward pass: keep `.grad` as it is, before anyone unscales or clips it."""
        if parameter.grad is None:
            return
        hidden = self.hidden.read(self.weight.sink)
        anew = self._cleared or self._seen is not parameter.grad
        before = None if anew else self._lost
        self._lost = before if hidden is None else hidden.clone() if before is None else before + hidden
        self.hidden.clear()
        self._held, self._seen, self._cleared = part(parameter.grad).clone(), parameter.grad, False
        if self.kept is not None:
            stays = part_like(self.kept(), parameter)
            gone = torch.where(stays, 0.0, self._held)
            self._gone = gone if anew or self._gone is None else self._gone + gone
            self._held = torch.where(stays, self._held, 0.0)

    def total(self) -> Tensor | None:
        """This rank's summand; all ranks ask for it."""
        if self._held is None:
            return None
        if self._gone is not None:
            return rebuilt(self._held + self._gone, self._parameter)
        reduced = rebuilt(self._held, self._parameter)
        lost = torch.zeros_like(reduced) if self._lost is None else self._lost.to(reduced.dtype)
        return torch.where(self.weight.mask, reduced, lost)


def step_factors(
    gradients: Mapping[str, Gradient | None], given: Callable[[str], Tensor | None], masks: Callable[[str], Tensor]
) -> dict[str, float]:
    """By what loss scaling and clipping changed each weight's gradient, read at its largest alive entry.

    A weight without any alive gradient has the factor of the largest entry of all weights, 1 where there is none.

    Args:
        gradients: G by name, as backward passes left it.
        given: What the optimizer was given.
        masks: Alive entries.
    """
    found: dict[str, tuple[float, float]] = {}
    for name, each in gradients.items():
        own, gradient = given(name), dense_of(each)
        if gradient is not None and own is not None and gradient.numel():
            mask = masks(name)
            largest = (gradient * mask).abs().argmax()
            before = gradient.flatten()[largest]
            if bool(before) and bool(mask.flatten()[largest]):
                after = own.to_dense() if own.is_sparse else own
                found[name] = (float(before.abs()), float(after.flatten()[largest] / before))
    common = max(found.values(), default=(0.0, 1.0))[1]
    return {name: found.get(name, (0.0, common))[1] for name in gradients}


def weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that keeps nothing alive: torch's hooks are hidden from the garbage collector, so a cycle would stay."""
    reference = weakref.WeakMethod(method)

    def hook(tensor: Tensor) -> None:
        found = reference()
        if found is not None:
            found(tensor)

    return hook
