"""The base of modules that read their own weight through a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self, TypeVar

from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.nn.functional import masked_weight
from fxsparse.nn.masked import (
    alive_of,
    beside_mask,
    check_mask_edit,
    drop_load_hooks,
    install_mask,
    mask_name,
    mask_spec,
    zero_dead_,
)
from fxsparse.nn.shared import close_path, path_of
from fxsparse.nn.slot import SLOTS, slots_of
from fxsparse.nn.spec import Guard, MaskSpec
from fxsparse.sparsity import Layout, Pattern

WEIGHT = "weight"
M = TypeVar("M", bound=nn.Module)


class SparseModule(nn.Module):
    """Mixin over a torch module with one masked `weight`; `isinstance` of the torch class stays true.

    The parameter keeps its name and the mask is the bool buffer `weight_mask` beside it. At a full mask outputs and
    gradients are those of the torch class bit for bit.
    """

    dense_type: ClassVar[type[nn.Module]]
    weight: Tensor
    weight_mask: Tensor

    @classmethod
    def from_dense(cls, module: nn.Module, spec: MaskSpec | None = None, mask: Tensor | None = None) -> Self:
        """A sparse module that takes over a dense one: the same parameter objects, buffers, hooks, mode, attributes.

        The dense module is not changed, except that dead entries of the shared weight become zero. Handles of hooks
        that were registered on it go on removing them from it alone.

        Args:
            module: A module of exactly the torch class.
            spec: What the mask is; unstructured, with the module's layout, by default.
            mask: The initial mask, copied; all True by default.

        Raises:
            ConfigError: another class (subclasses may compute something else), or a mask that does not fit.
        """
        if type(module) is not cls.dense_type:
            raise ConfigError(f"`module` (={type(module).__name__}) must be exactly a {cls.dense_type.__name__}")
        sparse = _transplant(module, cls)
        sparse._install(MaskSpec(layout=layout_of(module)) if spec is None else spec, mask)
        return sparse

    def to_dense(self) -> nn.Module:
        """The plain torch module with the same parameter objects, dead weights zeroed; this module stays sparse.

        Raises:
            ConfigError: the module is in a resurrection phase.
        """
        check_mask_edit(self)
        self.apply_mask_()
        dense = _transplant(self, self.dense_type)
        close_path(dense)
        slots = dense.__dict__.pop(SLOTS)
        for attribute, slot in slots.items():
            del dense._buffers[mask_name(attribute)]
            for name in beside_mask(slot):
                del dense._buffers[name]
        drop_load_hooks(dense)
        return dense

    def _install(self, spec: MaskSpec, mask: Tensor | None, row_order: Tensor | None = None) -> None:
        install_mask(self, WEIGHT, spec, mask, row_order)

    @property
    def mask_spec(self) -> MaskSpec:
        """The spec of the mask."""
        return slots_of(self)[WEIGHT].spec

    @property
    def effective_weight(self) -> Tensor:
        """The weight as the forward reads it: where(mask, weight, 0)."""
        path = path_of(self)
        if path is not None and path.packed:
            return path.dense_weight(self)
        if self.mask_spec.guard is Guard.GRADIENT:
            return self.weight
        return masked_weight(self.weight, self.weight_mask)

    def fast_output(self, input: Tensor) -> Tensor | None:
        """The output by the fast path of a shared support; None where there is none, or the dense product is taken."""
        path = path_of(self)
        return None if path is None else path.forward(self, input)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        made: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        path = path_of(self)
        if path is not None:
            path.follow(self)
        return made

    def apply_mask_(self) -> None:
        """Write zeros to the dead entries of the weight."""
        if mask_spec(self, WEIGHT) is not None:
            zero_dead_(self, WEIGHT)

    def extra_repr(self) -> str:
        """The torch module's arguments, then density and pattern."""
        described = super().extra_repr()
        if mask_spec(self, WEIGHT) is None:
            return described
        mask = alive_of(self, WEIGHT)
        density = "?" if mask.is_meta or mask.numel() == 0 else f"{int(mask.sum()) / mask.numel():.4g}"
        return f"{described}, density={density}, pattern={self.mask_spec.pattern}"


def _transplant(module: nn.Module, kind: type[M]) -> M:
    """A module of another class with the same contents in containers of its own."""
    twin = object.__new__(kind)
    for key, value in module.__dict__.items():
        twin.__dict__[key] = value.copy() if isinstance(value, dict | set) else value
    for name in ("_load_state_dict_pre_hooks", "_state_dict_pre_hooks"):
        hooks = twin.__dict__.get(name, {})
        for key, hook in hooks.items():
            if getattr(hook, "with_module", False):  # such hooks hold a weak reference to their module
                hooks[key] = type(hook)(hook.hook, twin)
    return twin


def layout_of(module: nn.Module) -> Layout:
    """Which axes of the module's weight are outputs and inputs.

    Raises:
        ConfigError: not a Linear, Conv or ConvTranspose module.
    """
    if isinstance(module, nn.Linear):
        return Layout.linear()
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return Layout.conv_transpose(module.groups)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Layout.conv(module.groups)
    raise ConfigError(f"`module` (={type(module).__name__}) has no known layout; give a Layout in the MaskSpec")


def spec_of(module: nn.Module, pattern: Pattern | None) -> MaskSpec:
    """The spec of a new sparse module; unstructured where no pattern is given."""
    layout = layout_of(module)
    return MaskSpec(layout=layout) if pattern is None else MaskSpec(pattern, layout)
