"""Masks of weights that are computed from a parameter before they are used.

The parameter is masked as everywhere (zeros at dead entries, gradients masked), and so is the weight that comes out of
the computation, because zeros need not survive it:

1. A parametrization (`torch.nn.utils.parametrize`): behind the whole chain.
2. The old `torch.nn.utils.weight_norm`: behind the norm, in the hook that computes it.
3. A weight that the owner's own forward computes, as in weight standardisation: where a linear or convolution function
   takes it.

Weight norm divides by the norm of each slice of v: a slice without alive entries would be 0 / 0. There v is read as
ones before the mask makes the weight zero, so that g of the slice gets the gradient 0. g is never masked: the alive
entries of a slice have the norm g together, as before, however many they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from fxsparse.errors import ConfigError
from fxsparse.nn.functional import masked_weight
from fxsparse.nn.masked import mask_of, mask_spec
from fxsparse.nn.slot import slots_of
from fxsparse.nn.spec import Route

_CONVS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
TAKES_WEIGHT: tuple[Callable[..., Tensor], ...] = (F.linear, *_CONVS)
"""Functions whose second argument is the weight."""


def mask_effective(module: nn.Module, attribute: str) -> None:
    """Mask the weight that is made from this masked parameter of the module itself (cases 1 to 3).

    Raises:
        ConfigError: the module's forward has been replaced on the instance.
    """
    if isinstance(module, parametrize.ParametrizationList):
        first = module[0]
        if isinstance(first, _WeightNorm):
            first.register_forward_pre_hook(_read_direction)
        module.register_forward_hook(MaskOutput(attribute))
        return
    key, norm = weight_norm_hook(module, attribute)
    if key is not None and norm is not None:
        module._forward_pre_hooks[key] = MaskedWeightNorm(norm.name, norm.dim)
    elif "forward" not in module.__dict__:
        module.__dict__["forward"] = MaskedForward(module)
    elif not isinstance(module.__dict__["forward"], MaskedForward):
        raise ConfigError(f"`forward` of {type(module).__name__} has been replaced on the instance; put it back")


def fold_effective(module: nn.Module, attribute: str) -> dict[str, Tensor] | None:
    """What the parameters must hold so that the effective weight is the masked one without help.

    Returns:
        Values by attribute of the module; None where no values do, so that the mask must stay.
    """
    weight = module._parameters[attribute]
    assert weight is not None
    mask = mask_of(module, attribute)
    values = torch.where(mask, weight.detach(), 0.0)
    gain = _gain(module, attribute)
    if isinstance(module, parametrize.ParametrizationList):
        if not all(keeps_zeros(step) for step in module):
            return None
        if gain is None:
            nothing = not mask.is_meta and not bool(mask.any())  # a norm of 0 divides 0 by 0
            return None if nothing else {attribute: values}
    elif gain is None:
        return None
    scale, dim = gain
    magnitude = module._parameters[scale]
    assert magnitude is not None
    lost = _is_zero(values, dim)  # no alive entry: g = 0 and any direction
    kept = torch.where(lost.reshape(magnitude.shape), 0.0, magnitude.detach())
    return {attribute: torch.where(lost, 1.0, values), scale: kept}


def alive_gains(model: nn.Module) -> dict[str, Tensor]:
    """By the name of each g of a masked weight norm: which of its entries have an alive entry in their slice.

    The others have no influence and no gradient while the weight is masked; folded, they have a dense gradient, as
    dead entries do.
    """
    found = {}
    for path, module in model.named_modules():
        for attribute, slot in slots_of(module).items():
            gain = _gain(module, attribute) if slot.spec.route is Route.EFFECTIVE else None
            if gain is not None:
                magnitude = module._parameters[gain[0]]
                assert magnitude is not None
                alive = ~_is_zero(mask_of(module, attribute), gain[1])
                found[f"{path}.{gain[0]}" if path else gain[0]] = alive.reshape(magnitude.shape)
    return found


def _gain(module: nn.Module, attribute: str) -> tuple[str, int] | None:
    """The attribute of g, and the axis of its slices, where this attribute is the v of a weight norm."""
    if isinstance(module, parametrize.ParametrizationList):
        first = module[0]
        return ("original0", first.dim) if isinstance(first, _WeightNorm) else None
    norm = weight_norm_hook(module, attribute)[1]
    return None if norm is None else (f"{norm.name}_g", norm.dim)


def unmask_effective(module: nn.Module, attribute: str) -> None:
    """Undo `mask_effective`."""
    if isinstance(module, parametrize.ParametrizationList):
        _drop(module._forward_hooks, lambda hook: isinstance(hook, MaskOutput) and hook.attribute == attribute)
        _drop(module[0]._forward_pre_hooks, lambda hook: hook is _read_direction)
        return
    key, norm = weight_norm_hook(module, attribute)
    if key is not None and norm is not None:
        module._forward_pre_hooks[key] = WeightNorm(norm.name, norm.dim)
    elif not any(other != attribute and slot.spec.route is Route.EFFECTIVE for other, slot in slots_of(module).items()):
        module.__dict__.pop("forward", None)


def weight_norm_hook(module: nn.Module, attribute: str) -> tuple[int | None, WeightNorm | None]:
    """The hook, and its key, of the old `weight_norm` that reads v from this attribute."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, WeightNorm) and attribute == f"{hook.name}_v":
            return key, hook
    return None, None


def keeps_zeros(step: nn.Module) -> bool:
    """Whether a parametrization is known to leave zeros where they are, whatever the values."""
    return type(step) in (_WeightNorm, torch.nn.utils.parametrizations._SpectralNorm)


class MaskOutput:
    """Forward hook of a parametrization list: masks the weight that comes out."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        """The output, zero at dead entries."""
        return masked_weight(output, mask_of(module, self.attribute))


def _read_direction(module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    gain, direction = args
    assert isinstance(module, _WeightNorm)
    return gain, _ones_for_zero(direction, module.dim)


class MaskedWeightNorm(WeightNorm):
    """The hook of the old weight norm, with the mask of v applied to the weight."""

    def compute_weight(self, module: nn.Module) -> Tensor:
        """W = g v / |v|, zero at dead entries."""
        gain, direction = getattr(module, f"{self.name}_g"), getattr(module, f"{self.name}_v")
        weight = torch._weight_norm(_ones_for_zero(direction, self.dim), gain, self.dim)
        return masked_weight(weight, mask_of(module, f"{self.name}_v"))


def _is_zero(direction: Tensor, dim: int) -> Tensor:
    """Which slices along `dim` (-1: the whole tensor) are zero; axes kept."""
    others = [axis for axis in range(direction.ndim) if dim == -1 or axis != dim % direction.ndim]
    return ~(direction != 0).any(dim=others, keepdim=True) if others else direction == 0


def _ones_for_zero(direction: Tensor, dim: int) -> Tensor:
    return torch.where(_is_zero(direction, dim), 1.0, direction)


class MaskedForward:
    """The forward of a module that computes its weight from a masked parameter."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward, with the weights masked that it hands to functions."""
        module = self.module
        masks = []
        for attribute in slots_of(module):
            spec = mask_spec(module, attribute)
            if spec is not None and spec.route is Route.EFFECTIVE:
                masks.append(mask_of(module, attribute))
        with _Masking(masks):
            return type(module).forward(module, *args, **kwargs)


class _Masking(TorchFunctionMode):
    """Masks the weights of the masks' shapes that linear and convolution functions take."""

    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in TAKES_WEIGHT:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            for mask in self.masks:
                if weight.shape == mask.shape:
                    masked = masked_weight(weight, mask)
                    if len(args) > 1:
                        args = (args[0], masked, *args[2:])
                    else:
                        kwargs = {**kwargs, "weight": masked}
                    break
        return func(*args, **kwargs)


def _drop(hooks: dict[int, Any], which: Callable[[Any], bool]) -> None:
    for key in [key for key, hook in hooks.items() if which(hook)]:
        del hooks[key]
