"""The record of a mask on the module that owns it, and the guard of a parameter's gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxsparse.nn.functional import collecting
from fxsparse.nn.select import keep_
from fxsparse.nn.sharded import fill_zeros_, is_sharded
from fxsparse.nn.spec import Guard, MaskSpec

SLOTS = "_fxsparse_masks"
SHARED = "_fxsparse_shared"
"""Where a module keeps its fast path, see `fxsparse.nn.shared`."""


class MaskSlot:
    """What a module's `__dict__` keeps for each of its masks; it survives deepcopy and pickle with the module.

    With `Guard.GRADIENT` it keeps the hook on its parameter alive. Hooks are not copied with tensors, so the copy of a
    slot installs its own hook on the copy of the parameter.
    """

    def __init__(self, spec: MaskSpec) -> None:
        self.spec = spec
        self.parameter: nn.Parameter | None = None
        self.mask: Tensor | None = None
        self.companions: tuple[str, ...] = ()  # names of further buffers that belong to the mask
        self.open = False  # in a resurrection phase: readers see every entry, and the mask is held in a companion

    def bind(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Guard this parameter by this mask, if the spec asks for it; binding anew is harmless."""
        if self.spec.guard is not Guard.GRADIENT:
            self.release()
            return
        if self.parameter is not None and self.parameter is not parameter:
            if is_sharded(self.parameter) and not is_sharded(parameter):
                self.mask = mask  # a forward pass made it whole for a while
                return
            self.release()
        self.parameter, self.mask = parameter, mask
        GradientHook.of(parameter).join(self)

    def release(self) -> None:
        """Guard no parameter any more."""
        if self.parameter is not None:
            GradientHook.of(self.parameter).leave(self)
        self.parameter = self.mask = None

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _restore, (self.spec, self.parameter, self.mask, self.companions, self.open)


def _restore(
    spec: MaskSpec, parameter: nn.Parameter | None, mask: Tensor | None, companions: tuple[str, ...], is_open: bool
) -> MaskSlot:
    slot = MaskSlot(spec)
    slot.companions, slot.open = companions, is_open
    if parameter is not None and mask is not None:
        slot.bind(parameter, mask)
    return slot


class GradientHook:
    """Post-accumulate-grad hook: zeroes the gradient at dead entries and hands the dense one to active collectors.

    One per parameter, for all the modules that share it. It acts while one of them is alive.
    """

    def __init__(self) -> None:
        self._slots: list[weakref.ref[MaskSlot]] = []
        self._handle: RemovableHandle | None = None

    @classmethod
    def of(cls, parameter: nn.Parameter) -> GradientHook:
        """The parameter's hook; a new one, not yet registered, where it has none."""
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        return next((hook for hook in hooks.values() if isinstance(hook, cls)), None) or cls()

    def join(self, slot: MaskSlot) -> None:
        """Act for this slot, which holds the parameter."""
        if slot not in self._live():
            self._slots.append(weakref.ref(slot))
        parameter = slot.parameter
        if self._handle is None and parameter is not None:
            trainable = parameter.requires_grad
            try:
                parameter.requires_grad_(True)  # torch refuses new hooks on frozen parameters, but keeps present ones
                self._handle = _register(parameter, self)
            finally:
                parameter.requires_grad_(trainable)

    def leave(self, slot: MaskSlot) -> None:
        """Act for this slot no more; the last one to leave takes the hook off."""
        self._slots = [weakref.ref(other) for other in self._live() if other is not slot]
        if not self._slots and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _live(self) -> list[MaskSlot]:
        return [slot for slot in (reference() for reference in self._slots) if slot is not None]

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        """Mask the gradient that the parameter has accumulated."""
        slots, gradient = self._live(), parameter.grad
        if not slots or slots[0].mask is None or gradient is None:
            return
        mask = slots[0].mask
        if mask.device != gradient.device:  # the module was moved, which replaces its buffers
            mask = slots[0].mask = mask.to(gradient.device)
        if is_sharded(gradient):  # it arrives reduced; what ranks collect is their own
            fill_zeros_(gradient, ~mask)
            return
        for collector in collecting():
            if collector.wants(mask):
                collector.add_total(mask, gradient.to_dense() if gradient.is_sparse else gradient)
        if gradient.is_sparse:
            parameter.grad = _mask_sparse(gradient.coalesce(), mask)
        elif gradient.requires_grad:  # backward(create_graph=True)
            with torch.enable_grad():
                parameter.grad = torch.where(mask, gradient, 0.0)
        else:
            keep_(gradient, mask)  # in place: the gradient may be a view of a communication bucket


def _register(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch
    return handle


def _mask_sparse(gradient: Tensor, mask: Tensor) -> Tensor:
    indices = gradient.indices()
    values = torch.where(mask[tuple(indices)], gradient.values(), 0.0)
    return torch.sparse_coo_tensor(indices, values, gradient.shape, is_coalesced=True, check_invariants=True)


def slots_of(module: nn.Module) -> dict[str, MaskSlot]:
    """The module's own masks, by attribute; empty where it has none."""
    slots: dict[str, MaskSlot] = module.__dict__.get(SLOTS, {})
    return slots
