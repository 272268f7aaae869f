"""Dead weights and their optimizer state stay zero; what nobody can have written is not written again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from fxsparse.nn import MaskedWeight
from fxsparse.nn.slot import slots_of
from fxsparse.training.optimizer_state import shaped_state, zero_state_

KEEP_ZEROS = (SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, Adadelta)
"""Optimizers whose step leaves zeros, in weight and state, where the gradient is zero; with a positive `eps`."""

PROBES = 256


@dataclass(frozen=True, eq=False)
class _Mark:
    """A weight, its mask and its state as they were left."""

    tensors: tuple[Tensor, ...]
    versions: tuple[tuple[int, int], ...]
    probes: Tensor

    def holds(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether these are the same tensors, not written since, as far as versions and probes of dead entries tell."""
        if len(tensors) != len(self.tensors) or any(a is not b for a, b in zip(tensors, self.tensors, strict=True)):
            return False
        if self.versions != _versions(tensors):
            return False
        return not any(bool(torch.take(each, self.probes).any()) for each in tensors[1:])


class Upkeep:
    """Writes zeros to dead weights and their state after a step, where they may have become something else.

    On the CPU a step whose gradient was masked, of an optimizer that leaves zeros where they are, needs no writing,
    unless weight, mask or state were written between the steps. In-place writes are seen by their versions, those
    through `.data` by probes at dead entries.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._marks: dict[Tensor, _Mark] = {}
        self._clean: set[Tensor] = set()

    def before(self, weights: Iterable[MaskedWeight]) -> None:
        """Before a step without a closure: note which weights nobody has written since the last one."""
        self._clean = set()
        if type(self.optimizer) not in KEEP_ZEROS:
            return
        if any(not group.get("eps", 1.0) > 0 for group in self.optimizer.param_groups):
            return
        for weight in weights:
            mark, gradient = self._marks.get(weight.weight), weight.weight.grad
            if gradient is not None and gradient.is_sparse:
                continue
            if mark is not None and mark.holds(self._tensors(weight)):
                self._clean.add(weight.weight)

    @torch.no_grad()
    def after(self, weights: Iterable[MaskedWeight]) -> None:
        """After a step: zeros at dead entries of all the others."""
        for weight in weights:
            parameter = weight.weight
            if weight.packed:  # every entry is alive
                self._marks.pop(parameter, None)  # of the dense storage before
                continue
            if parameter not in self._clean:
                weight.apply_()
                zero_state_(self.optimizer, parameter, ~weight.mask)
            self._mark(weight)
        self._clean = set()

    def forget(self) -> None:
        """Write all of them again at the next step."""
        self._marks, self._clean = {}, set()

    def _mark(self, weight: MaskedWeight) -> None:
        parameter, opened = weight.weight, any(slots_of(module)[name].open for module, name in weight.owners)
        plain = parameter.device.type == "cpu" and type(parameter.data) is Tensor
        if type(self.optimizer) not in KEEP_ZEROS or not plain or opened:
            self._marks.pop(parameter, None)
            return
        tensors, old = self._tensors(weight), self._marks.get(parameter)
        mask = tensors[0]
        if old is not None and old.tensors[0] is mask and old.versions[0] == _versions((mask,))[0]:
            probes = old.probes
        else:
            source = torch.Generator().manual_seed(0)
            drawn = torch.randint(max(mask.numel(), 1), (PROBES if mask.numel() else 0,), generator=source)
            probes = drawn[~torch.take(mask, drawn)]
        self._marks[parameter] = _Mark(tensors, _versions(tensors), probes)

    def _tensors(self, weight: MaskedWeight) -> tuple[Tensor, ...]:
        return weight.mask, weight.weight, *shaped_state(self.optimizer, weight.weight).values()


def _versions(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((each._version, each.data_ptr()) for each in tensors)
