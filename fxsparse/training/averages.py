"""Averaged copies of a model (EMA, SWA) that average buffers: what belongs to masks has no average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel

from fxsparse.nn import masked_weights
from fxsparse.nn.shared import path_of
from fxsparse.nn.shared_index import held_index, holds_index

_LISTS = ("cuda", "xpu", "mtia")  # devices on which torch averages lists of tensors at once


def copy_masks(average_model: nn.Module) -> None:
    """Let an `AveragedModel` with `use_buffers` copy the buffers of masks; what it averages, it averages as before.

    The average of masks is their union, or an error, and that of indices is rounded.
    """
    if not isinstance(average_model, AveragedModel) or not average_model.use_buffers:
        return
    own: Any = average_model
    if own.multi_avg_fn is None and own.avg_fn is not None:
        if not isinstance(own.avg_fn, _One):
            own.avg_fn = _One(average_model, own.avg_fn)
    elif not isinstance(own.multi_avg_fn, _Many):
        own.multi_avg_fn = _Many(average_model, own.multi_avg_fn or _mean)


class _One:
    """An averaging function of two tensors that copies what belongs to masks of the averaged model."""

    def __init__(self, average: AveragedModel, function: Callable[..., Tensor]) -> None:
        self.average, self.function = average, function  # whose module `compact` replaces

    def __call__(self, averaged: Tensor, present: Tensor, number: Tensor | int) -> Tensor:
        return present if _is_copied(self.average.module, averaged) else self.function(averaged, present, number)


class _Many:
    """The same of lists of tensors that have one type."""

    def __init__(self, average: AveragedModel, function: Callable[..., object]) -> None:
        self.average, self.function = average, function  # whose module `compact` replaces

    @torch.no_grad()
    def __call__(self, averaged: list[Tensor], present: list[Tensor], number: Tensor | int) -> None:
        left = []
        for mean, now in zip(averaged, present, strict=True):
            if _is_copied(self.average.module, mean):
                mean.copy_(now)
            else:
                left.append((mean, now))
        if left:
            self.function([mean for mean, _ in left], [now for _, now in left], number)


def _is_copied(module: nn.Module, averaged: Tensor) -> bool:
    """Whether a tensor is bool, or is one of the buffers that belong to masks."""
    if averaged.dtype is torch.bool or averaged.is_floating_point() or averaged.is_complex() or averaged.ndim == 0:
        return averaged.dtype is torch.bool
    for weight in masked_weights(module).values():
        held = list(weight.buffers)
        for owner, _ in weight.owners:
            if path_of(owner) is not None and holds_index(owner):
                held += held_index(owner)
        if any(each.data_ptr() == averaged.data_ptr() for each in held):
            return True
    return False


def _mean(averaged: list[Tensor], present: list[Tensor], number: Tensor | int) -> None:
    """What `AveragedModel` does where it is given no function."""
    if averaged[0].device.type in _LISTS:
        many: Callable[..., object] = swa_utils.get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]  # in torch
        many(averaged, present, number)
        return
    function: Callable[..., Tensor] = swa_utils.get_swa_avg_fn()  # type: ignore[no-untyped-call]  # in torch
    for mean, now in zip(averaged, present, strict=True):
        mean.copy_(function(mean, now, number))
