"""Weights that are computed from a parameter before a product uses them: whether and where they can be masked."""

from __future__ import annotations

import copy
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxsparse.graph.derivations import FLIPS, KEEPS_ZEROS, PRODUCTS, mask_place
from fxsparse.graph.scopes import preserved_rng
from fxsparse.nn import weight_norm_hook
from fxsparse.nn.effective import TAKES_WEIGHT, MaskedForward, keeps_zeros
from fxsparse.planning.usage import Usage


class Role(enum.Enum):
    """What a parameter is to the weight that is computed from it."""

    ITSELF = "itself"
    """The weight, or moved or scaled so that every dead entry is a zero of the weight that is used."""
    EFFECTIVE = "effective"
    """It has the weight's shape, but its zeros need not be zeros of the weight: the weight is masked behind."""
    PART = "part"
    """It scales or shifts the weight: its own zeros are exact, and the weight's are another matter."""
    LOST = "lost"
    """Its zeros do not reach the product, and there is no place to mask behind."""


@dataclass(frozen=True)
class Derivation:
    """How a weight is computed from a parameter.

    Attributes:
        role: What the parameter is to the weight.
        by: What computes it, for messages: where it is masked behind, that very operation; "" where the weight is the
            parameter.
        holder: Path of the module whose tensor is computed, with the tensor's name; None unless it is parametrized.
        keeps: Whether zeros of the parameter are zeros of the weight already.
    """

    role: Role = Role.ITSELF
    by: str = ""
    holder: tuple[str, str] | None = None
    keeps: bool = True


def derivation(
    model: nn.Module,
    owners: Mapping[str, tuple[nn.Module, str]],
    parameter: nn.Parameter,
    usages: Sequence[Usage],
    in_graph: bool,
) -> Derivation:
    """How the weights are computed that products use.

    Args:
        model: The model.
        owners: Each name of the parameter -> module and attribute.
        parameter: The parameter.
        usages: Its uses.
        in_graph: Whether a graph executes all the code that uses it.
    """
    for name, (module, attribute) in owners.items():
        if isinstance(module, parametrize.ParametrizationList):
            return _parametrized(model, name, module, attribute, parameter)
        found = _hooked(name, module, attribute)
        if found is not None:
            return found
    products = [usage for usage in usages if usage.op in PRODUCTS and usage.weight]
    lossy = [usage for usage in products if set(usage.derived) - KEEPS_ZEROS]
    if not lossy:
        return Derivation()
    first = next(op for op in lossy[0].derived if op not in KEEPS_ZEROS)
    by = f"`{first}`"
    shape = tuple(parameter.shape)
    if all(usage.seen is not None and _numel(usage.seen) != parameter.numel() for usage in lossy):
        return Derivation(Role.PART, by, keeps=False)
    masked = all(_fits(usage, shape, in_graph) for usage in lossy)
    if masked and (in_graph or _masked_in_forward(model, owners, shape, usages)):
        behind = dict.fromkeys(f"`{usage.derived[_place(usage, shape)]}`" for usage in lossy)
        return Derivation(Role.EFFECTIVE, ", ".join(behind), keeps=False)
    return Derivation(Role.LOST, by, keeps=False)


def _fits(usage: Usage, shape: tuple[int, ...], in_graph: bool) -> bool:
    """Whether a mask of this shape fits behind an operation of the chain; in Python only the last one will do."""
    place, end = mask_place(usage.derived, shape), len(usage.derived) - 1
    if place is None or (place < end and not in_graph):
        return False
    if usage.seen is None or usage.seen == shape:
        return True
    return place < end and _numel(usage.seen) == _numel(shape)


def _place(usage: Usage, shape: tuple[int, ...]) -> int:
    """Behind which operation of the chain the mask goes, of one that fits."""
    place = mask_place(usage.derived, shape)
    assert place is not None
    return place


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _parametrized(
    model: nn.Module, name: str, chain: parametrize.ParametrizationList, attribute: str, parameter: nn.Parameter
) -> Derivation:
    path, _, tensor = name.removesuffix(f".{attribute}").rpartition("parametrizations.")
    holder = (path.removesuffix("."), tensor)
    by = ", ".join(type(step).__name__.strip("_") for step in chain)
    weight, zeros = _probe(chain, attribute)
    if weight is None or weight.shape != parameter.shape:
        return Derivation(Role.PART, by, holder, False)
    if all(keeps_zeros(step) for step in chain) or zeros:
        return Derivation(Role.EFFECTIVE, by, holder)
    return Derivation(Role.EFFECTIVE, by, holder, False)


def _probe(chain: parametrize.ParametrizationList, attribute: str) -> tuple[Tensor | None, bool]:
    """The weight that the chain makes, and whether zeros at random entries stay zeros in it."""
    original = chain._parameters[attribute]
    assert original is not None
    with preserved_rng(), torch.no_grad():
        twin = copy.deepcopy(chain).eval()
        for table in (twin._forward_hooks, twin._forward_pre_hooks):
            table.clear()
        try:
            weight = twin()
        except RuntimeError:
            return None, False
        if weight.shape != original.shape or original.is_meta:
            return weight, False
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            dead = (torch.rand(original.shape, generator=generator) < 0.3).to(original.device)
            twin.get_parameter(attribute).copy_(original.detach().masked_fill(dead, 0.0))
            if bool((twin()[dead] != 0).any()):
                return weight, False
    return weight, True


def _hooked(name: str, module: nn.Module, attribute: str) -> Derivation | None:
    path = name.rpartition(".")[0]
    if weight_norm_hook(module, attribute)[1] is not None:
        return Derivation(Role.EFFECTIVE, "weight_norm", (path, attribute.removesuffix("_v")))
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and attribute == f"{hook.name}_g":
            return Derivation(Role.PART, "weight_norm", (path, hook.name), False)
        if isinstance(hook, SpectralNorm) and attribute == f"{hook.name}_orig":
            return Derivation(Role.ITSELF, "spectral_norm", (path, hook.name))
    return None


def _masked_in_forward(
    model: nn.Module, owners: Mapping[str, tuple[nn.Module, str]], shape: tuple[int, ...], usages: Sequence[Usage]
) -> bool:
    """Whether masking the linear and convolution functions that the owner's forward calls masks this weight only."""
    if len(owners) != 1:
        return False
    ((name, (module, _)),) = owners.items()
    path = name.rpartition(".")[0]
    products = [usage for usage in usages if usage.op in PRODUCTS]
    functions = {function.__name__ for function in TAKES_WEIGHT}
    alone = sum(tuple(other.shape) == shape for other in module.parameters()) == 1
    replaced = "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], MaskedForward)
    inside = all(usage.module == path and usage.op in functions and usage.weight for usage in products)
    turned = any(FLIPS & set(usage.derived) and set(usage.derived) <= KEEPS_ZEROS for usage in products)
    return alone and inside and not turned and not replaced and getattr(module, "_compiled_call_impl", None) is None
